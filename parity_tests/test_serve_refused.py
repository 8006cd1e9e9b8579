"""Bad requests to `minillm serve`: the right status and message, nothing else disturbed, no failure of the server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from parity_tests.commands import environment, fails
from parity_tests.conftest import ROOT
from parity_tests.server import Server, make_run, serving
from parity_tests.test_serve import PROMPT

pytestmark = pytest.mark.extended

JSON_TYPE = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return make_run(tmp_path_factory.mktemp("serve"), corpus)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    with serving(run, "--backend", "torch", "--name", "tiny-torch", "--max-batch", "2", "--max-queue", "4") as found:
        yield found


def refused(answer: httpx.Response, status: int, *words: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error
    assert error["param"] == param
    return error


FIELDS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"max_tokens": -1}, "greater than or equal to 0", "max_tokens"),
    ({"max_tokens": 0}, "only with echo", "max_tokens"),
    ({"max_tokens": 10**9}, "ask for at most 31", "prompt"),
    ({"max_tokens": 10**400}, "longer than the context", "prompt"),
    ({"max_tokens": "5"}, "valid integer", "max_tokens"),
    ({"max_tokens": True}, "valid integer", "max_tokens"),
    ({"temperature": -1}, "greater than or equal to 0", "temperature"),
    ({"temperature": 1e-9}, "1e-6 to 1e6", "temperature"),
    ({"top_p": 0}, "greater than 0", "top_p"),
    ({"top_p": 1.5}, "less than or equal to 1", "top_p"),
    ({"n": 0}, "greater than or equal to 1", "n"),
    ({"n": 1000}, "less than or equal to 128", "n"),
    ({"logprobs": 21}, "less than or equal to 20", "logprobs"),
    ({"seed": 1 << 64}, "less than", "seed"),
    ({"stop": ""}, "none of them empty", "stop"),
    ({"stop": ["a"] * 17}, "stop: expected", "stop"),
    ({"stop_token_ids": [608]}, "outside the vocabulary", None),
    ({"frequency_penalty": 0.5}, "only 0 is supported", "frequency_penalty"),
    ({"presence_penalty": -1}, "only 0 is supported", "presence_penalty"),
    ({"logit_bias": {"5": 3}}, "only an empty value", "logit_bias"),
    ({"max_token": 5}, "did you mean max_tokens?", "max_token"),
    ({"suffix": "end"}, "only '' is supported", "suffix"),
    ({"best_of": 2}, "only 1 is supported", "best_of"),
    ({"guided_json": {}}, "not supported", "guided_json"),
    ({"stream_options": {"include_usage": True}}, "only with stream", "stream_options"),
    ({"prompt": []}, "there is none", "prompt"),
    ({"prompt": ""}, "empty prompt", "prompt"),
    ({"prompt": [[]]}, "empty prompt", "prompt"),
    ({"prompt": [5, "a"]}, "a text, token ids", "prompt"),
    ({"prompt": [5, -1]}, "a text, token ids", "prompt"),
    ({"prompt": [5, 608]}, "608 (number 2 of 2)", "prompt"),
    ({"prompt": [5] * 400}, "longer than the context", "prompt"),
    ({"prompt": "word " * 100_000}, "longer than the context", "prompt"),
    ({"prompt": ["a"] * 65, "n": 2}, "at most 128", "prompt"),
    ({"prompt": ["a"] * 5}, "at most 4, the server's queue", "prompt"),
    ({"prompt": None}, "a text, token ids", "prompt"),
    ({"model": 7}, "valid string", "model"),
]


@pytest.mark.parametrize(("fields", "word", "param"), FIELDS, ids=[str(fields)[:40] for fields, _, _ in FIELDS])
def test_fields(fields: dict[str, Any], word: str, param: str | None, server: Server) -> None:
    refused(server.post(**{"prompt": PROMPT} | fields), 400, word, param=param)


CHATS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": []}, "at least 1 item", "messages"),
    ({"messages": "Hi"}, "valid list", "messages"),
    ({"messages": [{"role": "user"}]}, "expected a text", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "expected a text", "messages"),
    ({"messages": [{"role": "<|im_end|>", "content": "a"}]}, "not a role", None),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "only an empty value", "messages"),
    ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "not supported", "messages"),
    ({"tools": [{"type": "function"}]}, "tools", "tools"),
    ({"response_format": {"type": "json_object"}}, "only 'text' is supported", "response_format"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "not both", "max_tokens"),
    ({"top_logprobs": 2}, "only with logprobs", "top_logprobs"),
    ({"max_tokens": 400}, "longer than the context", "prompt"),
]


@pytest.mark.parametrize(("fields", "word", "param"), CHATS, ids=[str(fields)[:40] for fields, _, _ in CHATS])
def test_conversations(fields: dict[str, Any], word: str, param: str | None, server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]} | fields
    refused(server.post("/v1/chat/completions", **body), 400, word, param=param)


BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "not a JSON object"),
    (b"{", 400, "not JSON"),
    (b"[1]", 400, "not a JSON object"),
    (b'{"model": "tiny-torch", "prompt": "\xff"}', 400, "UTF-8"),
    (b"[" * 100_000, 400, "cannot be read"),
    (b'{"prompt": "' + b"a" * 5_000_000 + b'"}', 413, "4,194,304 bytes"),
    (b'{"model": "tiny-torch", "prompt": "\\ud800"}', 400, "not Unicode text"),
    (b'{"model": "tiny\\ud800", "prompt": "a"}', 404, "no model"),
]


@pytest.mark.parametrize(("body", "status", "word"), BODIES, ids=[str(body[:30]) for body, _, _ in BODIES])
@pytest.mark.parametrize("in_parts", [False, True])
def test_bodies(body: bytes, status: int, word: str, in_parts: bool, server: Server) -> None:
    content = (body[i : i + 65_536] for i in range(0, len(body), 65_536)) if in_parts else body
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=JSON_TYPE, timeout=30)
    param = "model" if status == 404 else "prompt" if word == "not Unicode text" else None
    refused(answer, status, word, param=param)


MANY: list[dict[str, Any]] = [
    {"prompt": ["a", *[1] * 800_000]},
    {"prompt": [[None, 5]] * 300_000},
    {"messages": [1] * 1_000_000},
    {"messages": [{"role": "user", "content": [1] * 1_000_000}]},
    {"prompt": "a", "logit_bias": {str(i): "a" for i in range(200_000)}},
    {"prompt": "a", **{f"a{i}": 1 for i in range(200_000)}},
]


@pytest.mark.parametrize("fields", MANY, ids=[str(fields)[:30] for fields in MANY])
def test_a_body_with_a_million_errors(fields: dict[str, Any], server: Server) -> None:
    """It is read up to the first ones: all of them would take a minute, in which nobody is answered, and 3 GB."""
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    started = time.monotonic()
    answer = server.post(path, **fields)
    assert answer.status_code == 400
    assert len(answer.content) < 4000
    assert time.monotonic() - started < 10


def test_paths_methods_and_hosts(server: Server) -> None:
    refused(server.client.get("/v1/nothing"), 404, "no /v1/nothing")
    refused(server.client.get("/v1/completions"), 405, "does not accept GET")
    refused(server.client.get("/v1/models/gpt-4"), 404, "tiny-torch", param="model")
    refused(server.client.get("/playground/../../etc/passwd"), 404)
    refused(server.client.get("/v1/models", headers={"Host": "evil.example:8000"}), 421, "evil.example")
    body = {"prompt": "a", "max_tokens": 5, "temperature": -1, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0}
    answer = server.post("/playground/generate", **body, repetition_penalty=1, stop=[])
    refused(answer, 400, "temperature is out of range", param="temperature")


def test_pages_of_different_sites(server: Server) -> None:
    """A page of a different site, or of a different port of this machine, cannot make the server work; a link to the
    server's page works, and so do programs."""
    own = server.url
    refusals: list[tuple[str, dict[str, str]]] = [
        ("POST", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Origin": "https://evil.example"}),
        ("POST", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors", "Origin": "http://127.0.0.1:3000"}),
        ("POST", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}),
        ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}),
        ("POST", {"Origin": "http://127.0.0.1:3000"}),
        ("POST", {"Origin": "null"}),
    ]
    for method, headers in refusals:
        path = "/v1/completions" if method == "POST" else "/playground/faults"
        error = refused(server.client.request(method, path, headers=headers), 403, "different site")
        assert error["code"] == "cross_site"
    for headers in (
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Origin": own},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
        {"Origin": own},
    ):
        assert server.client.get("/", headers=headers).status_code == 200, headers


def test_a_full_queue(server: Server) -> None:
    """More requests than may wait: some are told to come back, all others are answered."""
    before = server.metric("minillm_prompt_tokens_total")
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(server.post, prompt=[5, i], max_tokens=200, stop_token_ids=[]) for i in range(24)]
        answers = [found.result() for found in asked]
    busy = [answer for answer in answers if answer.status_code == 429]
    assert busy
    for answer in busy:
        assert refused(answer, 429, "the server is busy")["code"] == "queue_full"
        assert answer.headers["Retry-After"] == "1"
    assert len(busy) + sum(answer.status_code == 200 for answer in answers) == 24
    assert server.metric("minillm_prompt_tokens_total") - before == 2 * (24 - len(busy)), "accepted prompts only"
    assert server.post(prompt=[5], max_tokens=2).status_code == 200
    assert "Traceback" not in server.log.read_text(encoding="utf-8")


def test_dead_clients(server: Server) -> None:
    """Clients that leave in the middle of a request, of a body, or of an answer cost nothing afterwards."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    body = json.dumps({"model": "tiny-torch", "prompt": [5], "max_tokens": 300, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    whole = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    plain = whole.replace(b"true", b"null")
    for sent in (b"", b"GARBAGE\r\n\r\n", head, whole[:-20], whole, plain, whole, plain):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
            if sent in (whole, plain):
                time.sleep(0.2)
    give_up = time.monotonic() + 20
    while server.metric("minillm_running") + server.metric("minillm_waiting") and time.monotonic() < give_up:
        time.sleep(0.05)
    assert server.metric("minillm_running") + server.metric("minillm_waiting") == 0
    assert server.post(prompt=[5], max_tokens=2).status_code == 200


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/playground/generate", "/playground/break"]
)
def test_schemathesis(path: str, mode: GenerationMode, server: Server) -> None:
    """Bodies that follow the server's schema, and bodies that do not: no answer is a failure of the server."""
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path]["POST"]
    statuses = set()

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny-torch"
        answer = case.call(timeout=30)
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        assert answer.status_code < 400 or answer.json().keys() == {"error"}

    check()
    assert statuses <= {200, 400, 404, 405, 413, 421, 429}


def test_hostile_templates(tmp_path: Path, corpus: Path) -> None:
    """A template that loops or reads files fails alone, and the server goes on answering meanwhile."""
    hello, template = [{"role": "user", "content": "Hi"}], "{% for i in range(99999) %}{% for j in range(99999) %}"
    template = "{% if messages[0].content == 'read' %}{{ cycler.__init__.__globals__ }}{% else %}" + template
    template += "{% endfor %}{% endfor %}{% endif %}"
    with (
        serving(make_run(tmp_path, corpus, template=template), "--backend", "torch") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        path = "/v1/chat/completions"
        looping = pool.submit(server.post, path, model="tiny", messages=hello)
        assert server.post(model="tiny", prompt=[5], max_tokens=2).status_code == 200
        assert not looping.done()
        refused(looping.result(), 400, "the chat template took too long")
        reading = server.post(path, model="tiny", messages=[{"role": "user", "content": "read"}])
        refused(reading, 400, "template")


def test_an_api_key(run: Path) -> None:
    """Any address that other machines can reach needs a key; without it, everything but /health is refused."""
    with serving(run, "--backend", "torch", "--host", "0.0.0.0", MINILLM_API_KEY="secret") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        for given_key in ("", "Bearer wrong", "Basic !", "B\u00e4"):
            for path in ("/", "/v1/models", "/metrics", "/playground/models", "/openapi.json"):
                answer = httpx.get(url + path, headers={"Authorization": given_key.encode()})
                refused(answer, 401, "API key")
                assert answer.headers["WWW-Authenticate"].startswith("Basic")
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(url, auth=("anyone", "secret")).status_code == 200


def test_starting_and_stopping(run: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that is in use, an open address without a key, a model that cannot be loaded: exit status 2. SIGINT ends
    the server; a client that waits gets an answer."""
    port = server.url.rpartition(":")[2]
    fails(f"port {port} is in use.*--port", "serve", str(run), "--backend", "torch", "--port", port, cwd=tmp_path)
    fails("other machines.*MINILLM_API_KEY", "serve", str(run), "--host", "0.0.0.0", "--backend", "torch", cwd=tmp_path)
    fails("--port is out of range", "serve", str(run), "--port", "70000", "--backend", "torch", cwd=tmp_path)
    monkeypatch.setenv("MINILLM_API_KEY", "secret")
    fails("cannot listen", "serve", str(run), "--host", "192.0.2.1", "--backend", "torch", cwd=tmp_path)
    fails("cannot listen", "serve", str(run), "--host", "no such host", "--backend", "torch", cwd=tmp_path)
    monkeypatch.delenv("MINILLM_API_KEY")
    fails("only torch checkpoints", "serve", str(run), cwd=tmp_path)
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(run), "--backend", "torch", "--port", "0"]
    done = subprocess.run(
        [*command, "--max-batch", "0"], capture_output=True, text=True, env=environment(), timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "max_batch is out of range" in done.stderr
    stopped = Server(run, "--backend", "torch")
    stopped.wait()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stopped.post, model="tiny", prompt=[5], max_tokens=300)
        time.sleep(0.3)
        os.kill(stopped.process.pid, signal.SIGINT)
        assert stopped.process.wait(timeout=30) == 130
        assert waiting.result().status_code in (200, 503)
    assert "Traceback" not in stopped.log.read_text(encoding="utf-8")
    stopped.client.close()
    stopped.log.unlink()
