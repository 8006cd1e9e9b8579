"""Datasets of the Hugging Face Hub as inputs: a server on this machine answers as the Hub does."""

import contextlib
import hashlib
import http.server
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import pyarrow
import pyarrow.parquet
import pytest

from minillm_core.data.hub import DATASET
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.commands import environment
from parity_tests.test_prepare import documents_of, files_of

pytestmark = pytest.mark.extended

REVISION = "a" * 40
TEXTS = [f"Speech {i}: my fellow citizens,\nwe {'go on ' * (i % 7)}\u00e9." for i in range(3000)]


def parquet(texts: list[str]) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), content)
    return content.getvalue()


class Hub(http.server.BaseHTTPRequestHandler):
    """The dataset `o/n`: two files for the split `train`, one for `test`."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        api, file = f"/api/datasets/o/n/tree/{REVISION}", "/datasets/o/n/resolve/"
        if path.startswith(api):
            folder = path.removeprefix(api).strip("/")
            inside = [name for name in self.files if name.startswith(f"{folder}/" if folder else "")]
            entries = [self._entry(name) for name in inside]
            self._send(json.dumps(entries if folder else [{"type": "directory", "path": "data", "oid": "0"}]).encode())
        elif path.startswith("/api/datasets/o/n"):
            siblings = [{"rfilename": name} for name in self.files]
            self._send(json.dumps({"id": "o/n", "sha": REVISION, "tags": [], "siblings": siblings}).encode())
        elif path.startswith(file) and (name := path.removeprefix(file).partition("/")[2]) in self.files:
            self._send(self.files[name], {"X-Repo-Commit": REVISION, "ETag": f'"{self._entry(name)["oid"]}"'})
        else:
            code = "EntryNotFound" if path.startswith(file) else "RepoNotFound"
            self._send(b"{}", {"X-Error-Code": code, "X-Repo-Commit": REVISION}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        names = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self._send(json.dumps([self._entry(name) for name in names if name in self.files]).encode())

    def _entry(self, name: str) -> dict[str, object]:
        data = self.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _send(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on this machine that answers with `handler`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files = {f"data/train-{i}-of-2.parquet": parquet(TEXTS[i * 1500 : (i + 1) * 1500]) for i in range(2)}
    Hub.files["data/test-0-of-1.parquet"] = parquet(["only for tests"] * 10)
    with served(Hub) as address:
        yield address


@pytest.mark.parametrize(
    ("rest", "revision", "files"),
    [
        ("", None, None),
        ("@v1/data/*.parquet", "v1", "data/*.parquet"),
        ("@refs/convert/parquet", "refs/convert/parquet", None),
        ("@refs/pr/3/x.jsonl", "refs/pr/3", "x.jsonl"),
    ],
)
def test_addresses(rest: str, revision: str | None, files: str | None) -> None:
    found = DATASET.fullmatch(f"hf://datasets/owner/na-me.1{rest}")
    assert found is not None
    assert (found["name"], found["revision"], found["files"]) == ("owner/na-me.1", revision, files)


def test_a_dataset_of_the_hub(hub: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One split is downloaded and read; then it is in the cache, and no network is needed."""

    def prepare(url: str, out: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        given = [url, "--tokenizer", str(tokenizer.path), "--out", out, "--text-field", "body", *options]
        return subprocess.run(
            [sys.executable, "-m", "minillm_cli", "prepare", *given],
            cwd=tmp_path,
            env=environment() | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home")} | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    done = prepare("hf://datasets/o/n", "out", "--holdout", "0.1", "--workers", "2")
    assert done.returncode == 0, done.stderr
    train, val = (documents_of(tmp_path / "out", split, tokenizer) for split in ("train", "val"))
    assert val
    sources = json.loads((tmp_path / "out" / "index.json").read_text())["sources"]
    assert [source["origin"] for source in sources] == [f"hf://datasets/o/n@{REVISION}, default, train"]
    assert {*val}.isdisjoint(train)
    assert [text for text in TEXTS if text in {*train}] == train
    assert sorted(train + val) == sorted(TEXTS)
    offline = prepare("hf://datasets/o/n", "again", "--holdout", "0.1", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    for url, options, message in (
        ("hf://datasets/o/n", ("--split", "train[:1%]"), "--split takes the name of one split"),
        ("hf://datasets/o/n", ("--split", "dev"), r"(?s)cannot be loaded.*dev.*check the name"),
        ("hf://models/o/n", (), "not a dataset of the Hugging Face Hub"),
    ):
        refused = prepare(url, "none", *options)
        assert refused.returncode == 2
        assert not (tmp_path / "none").exists()
        assert re.search(message, refused.stderr), refused.stderr
