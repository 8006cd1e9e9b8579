"""Conversations as training data: which tokens count, and in which rows they are."""

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from minillm_core.config import DataConfig
from minillm_core.data import assemble, encode, marks, plan, prepare
from minillm_core.data.assemble import Holdout
from minillm_core.data.batches import Batch
from minillm_core.data.documents import CHAT
from minillm_core.data.inputs import find_sources
from minillm_core.data.inspect import inspect_data
from minillm_core.data.marks import COUNTED, FIRST, pack_rows
from minillm_core.data.merge import merge
from minillm_core.data.mixture import Mixture, Phase
from minillm_core.data.plan import Plan
from minillm_core.data.prepared import SPLITS, PreparedData
from minillm_core.data.run_data import open_or_prepare, prepare_data
from minillm_core.data.token_files import TokenFile, TokenFiles
from minillm_core.errors import InputError
from minillm_core.text.chat_template import ROLE_TOKENS, ChatTemplate
from minillm_core.text.template_process import TemplateEndedError
from minillm_core.text.tokenizer import TOKENIZER_MODEL, Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.text.train_tokenizer import train_tokenizer
from parity_tests.commands import fails, script_here, succeeds_here
from parity_tests.conftest import TINY
from parity_tests.test_hf_tokenizer import byte_level
from parity_tests.test_prepare import files_of, plan_for

pytestmark = pytest.mark.extended

Conversation = list[dict[str, str]]

CHATML = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Of Qwen, SmolLM and others."""
LLAMA_3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + \
message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}\
{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
FORMATS = ("minillm", "chatml", "llama 3")


@dataclass(frozen=True)
class Chat:
    """A chat format, with a tokenizer."""

    name: str
    tokenizer: Tokenizer

    def expected(self, conversation: Conversation) -> list[tuple[int, bool]]:
        """Each token, and whether it counts: written out by hand, without the template."""
        encode, end, ids = self.tokenizer.encode, self.tokenizer.eos_id, list[tuple[int, bool]]()

        def write(found: list[int], *, counts: bool = False) -> None:
            ids.extend((id, counts) for id in found)

        if self.name != "chatml":
            write([self.tokenizer.bos_id])
        for message in conversation:
            is_reply = message["role"] == "assistant"
            if self.name == "minillm":
                write(encode(f"<{message['role']}>"))
                write(encode(message["content"]) + [end] * is_reply, counts=is_reply)
            elif self.name == "chatml":
                write([self.id("<|im_start|>"), *encode(f"{message['role']}\n")])
                write([*encode(message["content"]), end], counts=is_reply)
                write(encode("\n"))
            else:
                header = [*encode(message["role"]), self.id("<|end_header_id|>"), *encode("\n\n")]
                write([self.id("<|start_header_id|>"), *header])
                write([*encode(message["content"]), end], counts=is_reply)
        return ids

    def id(self, token: str) -> int:
        return self.tokenizer.vocabulary()[token]  # type: ignore[attr-defined]


def chat_of(name: str, corpus: Path, folder: Path) -> Chat:
    folder.mkdir()
    if name == "minillm":
        texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
        train_tokenizer(texts, TINY.vocab_size, folder / TOKENIZER_MODEL, symbols=ROLE_TOKENS)
        return Chat(name, load_tokenizer(folder, TINY.vocab_size))
    names = ["<|im_start|>", "<|im_end|>"] if name == "chatml" else ["<|start_header_id|>", "<|end_header_id|>"]
    names += ["<|eot_id|>"] * (name == "llama 3")
    byte_level(folder, TINY.vocab_size - len(names))
    data = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = max(data["model"]["vocab"].values()) + 1
    data["added_tokens"] += [{"id": first + i, "content": name} | flags for i, name in enumerate(names)]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = CHATML if name == "chatml" else LLAMA_3
    settings |= {"eos_token": names[-1], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Chat(name, load_tokenizer(folder, TINY.vocab_size))


@pytest.fixture(scope="module")
def chats(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    root = tmp_path_factory.mktemp("chats")
    return {name: chat_of(name, corpus, root / name) for name in FORMATS}


@pytest.fixture(params=FORMATS)
def chat(request: pytest.FixtureRequest, chats: dict[str, Chat]) -> Chat:
    return chats[request.param]


@pytest.fixture(scope="session")
def conversations(corpus: Path) -> list[Conversation]:
    """Real sentences as messages: with and without a system message, with one to three questions, one of them without
    an answer; some with one word, some longer than the rows of the tests."""
    rng = random.Random(0)
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())).split()

    def text(longest: int) -> str:
        start = rng.randrange(len(words) - longest)
        return " ".join(words[start : start + rng.randint(1, longest)]).strip("- ") or "yes"

    found = []
    for number in range(80):
        longest = 150 if number % 20 == 7 else 12
        roles = ["user", "assistant"] * rng.randint(1, 3) + ["user"] * (rng.random() < 0.2)
        roles = ["system"] * (rng.random() < 0.3) + roles
        found.append([{"role": role, "content": text(longest)} for role in roles])
    return found


def write_lines(path: Path, conversations: Sequence[Any]) -> Path:
    """Conversations in a .jsonl file, every third of them without the name of the field."""
    rows = [found if i % 3 == 2 else {"id": i, "messages": found} for i, found in enumerate(conversations)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_plan(inputs: Sequence[Path], chat: Chat, **more: Any) -> Plan:
    sources, folder = tuple(find_sources(inputs)), chat.tokenizer.path.parent
    return Plan(sources, folder, TINY.vocab_size, CHAT, **({"holdout": Holdout(every=5)} | more))


def split_of(conversations: Sequence[Conversation], every: int = 5) -> dict[str, list[Conversation]]:
    is_held_out = [i % every == every - 1 for i in range(len(conversations))]
    return {
        split: [found for found, out in zip(conversations, is_held_out, strict=True) if out == (split == "val")]
        for split in SPLITS
    }


def counted_targets(batches: Sequence[Batch]) -> list[int]:
    assert all(set(np.unique(batch.weights_BT)) <= {0, 1} for batch in batches)
    return [id for batch in batches for id in batch.targets_BT[batch.weights_BT > 0].tolist()]


@pytest.mark.parametrize("document_mask", [False, True])
def test_only_replies_count(document_mask: bool, chat: Chat, conversations: list[Conversation], tmp_path: Path) -> None:
    """Every token of the assistant is a target with a weight once in an epoch and once in an evaluation, with its
    whole conversation before it; no other token has a weight."""
    path = write_lines(tmp_path / "in.jsonl", conversations)
    prepare.prepare(chat_plan([path], chat), tmp_path / "out")
    data = PreparedData(tmp_path / "out", TINY.vocab_size, document_mask=document_mask)
    data.verify()
    seq_len, batch_size = 64, 3
    for split, own in split_of(conversations).items():
        expected = [chat.expected(conversation) for conversation in own]
        ids, counts = zip(*(token for found in expected for token in found), strict=True)
        assert data.tokens[split][:].tolist() == list(ids)
        assert ((data.marks[split][:] & COUNTED) > 0).tolist() == list(counts)
        firsts = np.cumsum([0, *map(len, expected)])[:-1]
        assert np.flatnonzero(data.marks[split][:] & FIRST).tolist() == firsts.tolist()
        wanted = [id for id, is_counted in zip(ids, counts, strict=True) if is_counted]
        assert 50 < len(wanted) < len(ids) / 1.5
        assert data.n_targets(split) == len(wanted)
        batches = [*data.eval_batches(split, batch_size, seq_len)]
        assert len(batches) == data.n_eval_batches(split, batch_size, seq_len)
        assert counted_targets(batches) == wanted
        assert data.tokens_per_byte(split) is None

    # an epoch: each row once, in a different order
    n_rows = len(pack_rows(data.marks["train"], seq_len).starts)
    wanted = counted_targets([*data.eval_batches("train", 1, seq_len)])
    rows = [data.batch(step, 1, seq_len, 5) for step in range(2 * n_rows)]
    assert all(batch.weights_BT.any() for batch in rows)
    for epoch in (rows[:n_rows], rows[n_rows:]):
        assert sorted(counted_targets(epoch)) == sorted(wanted)
        assert counted_targets(epoch) != wanted

    # the rows have whole conversations, as many as fit
    wanted_rows = rows_by_hand([chat.expected(found) for found in split_of(conversations)["train"]], seq_len)
    found_rows = [*data.eval_batches("train", 1, seq_len)]
    assert len(found_rows) == len(wanted_rows) == n_rows
    for batch, row in zip(found_rows, wanted_rows, strict=True):
        n = len(row) - 1
        assert [*batch.tokens_BT[0, :n].tolist(), batch.targets_BT[0, n - 1]] == [token.id for token in row]
        assert batch.weights_BT[0].tolist() == [float(token.counts) for token in row[1:]] + [0.0] * (seq_len - n)
        assert (batch.segments_BT is not None) == (batch.positions_BT is not None) == document_mask
        if batch.segments_BT is not None and batch.positions_BT is not None:
            firsts = np.array([i for i in range(n) if i == 0 or row[i].conversation != row[i - 1].conversation])
            segments = np.searchsorted(firsts, np.arange(n), side="right") - 1
            assert batch.segments_BT[0, :n].tolist() == segments.tolist()
            assert batch.positions_BT[0, :n].tolist() == (np.arange(n) - firsts[segments]).tolist()


@dataclass(frozen=True)
class InRow:
    """A token of a row, the number of its conversation, and whether it counts."""

    id: int
    conversation: int
    counts: bool


def rows_by_hand(conversations: Sequence[list[tuple[int, bool]]], seq_len: int) -> list[list[InRow]]:
    rows, row = list[list[InRow]](), list[InRow]()
    for number, conversation in enumerate(conversations):
        tokens = [InRow(id, number, counts) for id, counts in conversation]
        if len(row) + len(tokens) > seq_len + 1:
            rows.append(row)
            row = []
        row = row + tokens
        while len(row) > seq_len + 1:
            rows.append(row[: seq_len + 1])
            row = row[seq_len:]
    return [row for row in [*rows, row] if any(token.counts for token in row[1:])]


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=12), st.integers(1, 12))
def test_rows(documents: list[list[bool]], seq_len: int) -> None:
    """Any documents in rows of any length: every token that counts is one target, and no short document is cut."""
    bits = [COUNTED * (counts and i > 0) + FIRST * (i == 0) for found in documents for i, counts in enumerate(found)]

    class InMemory(TokenFiles):
        def __init__(self) -> None:
            pass

        def __len__(self) -> int:
            return len(bits)

        def __getitem__(self, index: Any) -> Any:
            return np.array(bits, np.uint8)[index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marks, "SCANNED", 7)
        rows = pack_rows(InMemory(), seq_len)
    pairs = [*zip(rows.starts.tolist(), rows.stops.tolist(), strict=True)]
    targets = [at for start, stop in pairs for at in range(start + 1, stop)]
    assert len(targets) == len({*targets})
    counted = {at for at, mark in enumerate(bits) if mark & COUNTED}
    assert counted <= {*targets}
    for start, stop in pairs:
        assert stop - start <= seq_len + 1
        assert counted & {*range(start + 1, stop)}, "a row in which nothing counts"
    start = 0
    for found in documents:
        stop = start + len(found)
        inside = [(a, b) for a, b in pairs if a < stop and b > start]
        if len(found) <= seq_len + 1 and counted & {*range(start, stop)}:
            cut = [pair for pair in inside if not (pair[0] <= start and stop <= pair[1])]
            # the tokens after a long document follow it in its last row, as far as they fit
            assert not cut
        start = stop


@pytest.mark.parametrize("n_workers", [1, 2, 4])
def test_the_same_bytes_for_any_number_of_workers(
    n_workers: int,
    chats: dict[str, Chat],
    conversations: list[Conversation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With several tasks, blocks and shards, a compressed file, a table and duplicates."""
    monkeypatch.setattr(plan, "TASK_BYTES", (4096, 4096))
    monkeypatch.setattr(assemble, "SHARD_TOKENS", 997)
    folder = tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "a.jsonl", conversations[:30])
    lines = write_lines(tmp_path / "b.jsonl", conversations[30:60]).read_bytes()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    table = pyarrow.table({"messages": [*conversations[60:], *conversations[:5]]})
    parquet.write_table(table, folder / "c.parquet", row_group_size=7)
    chat = chats["llama 3"]
    whole = chat_plan([folder], chat, holdout=Holdout(share=0.3), drop_duplicates=True)
    prepare.prepare(whole, tmp_path / "out", n_workers=n_workers)
    data = PreparedData(tmp_path / "out", TINY.vocab_size)
    data.verify()
    index = data.index
    assert index["duplicates"] == 5
    assert index["format_version"] == 3
    assert len(index["train"]["shards"]) > 2
    expected = sorted(tuple(chat.expected(found)) for found in conversations)
    found = []
    for split in SPLITS:
        marked = data.marks[split][:]
        edges = [*np.flatnonzero(marked & FIRST).tolist(), len(marked)]
        ids, counts = data.tokens[split][:].tolist(), ((marked & COUNTED) > 0).tolist()
        found += [tuple(zip(ids[a:b], counts[a:b], strict=True)) for a, b in pairwise(edges)]
    assert sorted(found) == expected
    for i in range(3):
        prepare.prepare(replace(whole, part=(i, 3)), tmp_path / f"part{i}", n_workers=n_workers)
    merge([tmp_path / f"part{i}" for i in (2, 0, 1)], tmp_path / "merged")
    first = tmp_path / "first"
    with monkeypatch.context() as patch:
        patch.setattr(encode, "BLOCK_TEXT", 2000)
        patch.setattr(encode, "CHUNK_BYTES", 500)
        prepare.prepare(whole, first)
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "out") == files_of(first)


def test_held_out_conversations_stay(chats: dict[str, Chat], conversations: list[Conversation], tmp_path: Path) -> None:
    """Also if they are written differently: the hash is of the messages."""
    held_out = []
    for n, spaces in ((40, None), (80, 1)):
        text = "".join(json.dumps({"messages": found}, indent=None) + "\n" for found in conversations[:n])
        text = text.replace('", "', '",   "') if spaces else text
        (tmp_path / f"{n}.jsonl").write_text(text)
        plan_n = chat_plan([tmp_path / f"{n}.jsonl"], chats["minillm"], holdout=Holdout(share=0.3))
        prepare.prepare(plan_n, tmp_path / f"out{n}")
        data = PreparedData(tmp_path / f"out{n}", None)
        edges = [*np.flatnonzero(data.marks["val"][:] & FIRST).tolist(), len(data.marks["val"])]
        ids = data.tokens["val"][:].tolist()
        held_out.append({tuple(ids[a:b]) for a, b in pairwise(edges)})
    assert held_out[0] < held_out[1]


GOOD = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
BAD: dict[str, tuple[Any, str]] = {
    "no field": ({"text": "a"}, "no field `messages`, but text"),
    "a text": ({"messages": "a"}, "not a list of messages, but of the type str"),
    "empty": ({"messages": []}, "no messages"),
    "not objects": ({"messages": ["a"]}, "message 1 is not an object, but of the type str"),
    "unknown role": (
        {"messages": [*GOOD, {"role": "bot", "content": "a"}]},
        "message 3 has the role 'bot', not one of",
    ),
    "no role": ([{"content": "a"}], "message 1 has the role 'None', not one of system, user, assistant"),
    "no content": ([{"role": "user"}], "the content of message 1 is not text, but of the type NoneType"),
    "parts": (
        [{"role": "user", "content": [{"type": "text"}]}],
        "content of message 1 is not text, but of the type list",
    ),
    "NUL": ([*GOOD, {"role": "user", "content": "a\0"}], "a NUL byte in message 3"),
    "surrogate": ([{"role": "user", "content": "\ud800"}, GOOD[1]], "half of a surrogate pair"),
    "no reply": ({"messages": [GOOD[0]]}, "no reply of the assistant"),
    "an empty reply": ([GOOD[0], {"role": "assistant", "content": ""}], "no reply of the assistant"),
    "the template": ([GOOD[0], GOOD[0], GOOD[1]], "users must not write twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_conversations(name: str, chats: dict[str, Chat], tmp_path: Path) -> None:
    chat = chats["chatml"]
    (tmp_path / "tokenizer").mkdir()
    for path in chat.tokenizer.path.parent.iterdir():
        (tmp_path / "tokenizer" / path.name).write_bytes(path.read_bytes())
    strict = "{% for m in messages %}{% if not loop.first and m.role == 'user' and loop.previtem.role == 'user' %}"
    strict += "{{ raise_exception('users must not write twice') }}{% endif %}{% endfor %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(strict + CHATML)
    chat = Chat("chatml", load_tokenizer(tmp_path / "tokenizer", TINY.vocab_size))
    row, message = BAD[name]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in [GOOD, GOOD, GOOD, row, GOOD, GOOD, GOOD]))
    bad = chat_plan([tmp_path / "in.jsonl"], chat)
    for n_workers in (1, 2):
        with pytest.raises(InputError, match=rf"(?s)cannot be used.*{message}.*in\.jsonl, line 4.*--skip-bad"):
            prepare.prepare(bad, tmp_path / "out", n_workers=n_workers)
    prepare.prepare(replace(bad, skip_bad=True), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["skipped"]["n_documents"] == 1
    assert index["train"]["n_documents"] + index["val"]["n_documents"] == 6
    expected = [token for found in [GOOD] * 5 for token in chat.expected(found)]
    assert PreparedData(tmp_path / "out", None).tokens["train"][:].tolist() == [id for id, _ in expected]


def test_a_slow_template_changes_no_data(
    chats: dict[str, Chat], conversations: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No conversation is left out because the machine was busy: the command stops, and continues when it is given
    again."""
    path = write_lines(tmp_path / "in.jsonl", conversations)
    slow = chat_plan([path], chats["minillm"], skip_bad=True)
    prepare.prepare(slow, tmp_path / "whole")
    encode_training, calls = ChatTemplate.encode_training, []

    def encode(template: ChatTemplate, messages: Any) -> Any:
        calls.append(messages)
        if len(calls) == 50:
            raise TemplateEndedError("the chat template took too long")
        return encode_training(template, messages)

    monkeypatch.setattr(ChatTemplate, "encode_training", encode)
    with pytest.raises(InputError, match="took too long"):
        prepare.prepare(slow, tmp_path / "out")
    prepare.prepare(slow, tmp_path / "out")
    assert len(calls) > 50
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_what_is_not_chat_data(
    chats: dict[str, Chat], tokenizer: Tokenizer, conversations: list[Conversation], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", conversations)
    with pytest.raises(InputError, match=r"(?s)no chat template.*expected.*<user>"):
        prepare.prepare(chat_plan([path], Chat("plain", tokenizer)), tmp_path / "out", n_workers=2)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"(?s)a file of text has no conversations.*\.jsonl.*a\.txt"):
        prepare.prepare(chat_plan([path, tmp_path / "a.txt"], chats["minillm"]), tmp_path / "out")
    parts = [chat_plan([path], chats["minillm"], part=(i, 2), skip_bad=True) for i in (0, 1)]
    prepare.prepare(parts[0], tmp_path / "part0")
    prepare.prepare(replace(parts[1], how=replace(CHAT, chat=False)), tmp_path / "part1")
    with pytest.raises(InputError, match="the parts have a different chat"):
        merge([tmp_path / "part0", tmp_path / "part1"], tmp_path / "no")


@pytest.mark.parametrize("name", ["train-00000.marks", "val-00000.marks"])
def test_damage(name: str, chats: dict[str, Chat], conversations: list[Conversation], tmp_path: Path) -> None:
    prepare.prepare(chat_plan([write_lines(tmp_path / "in.jsonl", conversations)], chats["minillm"]), tmp_path / "data")
    before = PreparedData(tmp_path / "data", None).hashes()
    path = tmp_path / "data" / name
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:7] + bytes([content[7] ^ COUNTED]) + content[8:])
    with pytest.raises(InputError, match=rf"(?s)was changed after it was prepared.*{name}"):
        PreparedData(tmp_path / "data", None).verify()
    assert f"DAMAGED: data/{name}" in script_here("inspect_data", "data", cwd=tmp_path).stdout
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"(?s)missing or truncated data file.*{name}"):
        PreparedData(tmp_path / "data", None)
    path.unlink()
    with pytest.raises(InputError, match=rf"(?s)missing or truncated data file.*{name}"):
        PreparedData(tmp_path / "data", None)
    # the same tokens, of which others count, are different data
    swapped = [[{**m, "role": {"user": "assistant", "assistant": "user"}.get(m["role"], m["role"])} for m in found]
               for found in conversations]  # fmt: skip
    prepare.prepare(chat_plan([write_lines(tmp_path / "x.jsonl", swapped)], chats["minillm"]), tmp_path / "x")
    after = PreparedData(tmp_path / "x", None).hashes()
    assert {split for split in SPLITS if before[split] != after[split]} == {*SPLITS}
    index = json.loads((tmp_path / "x" / "index.json").read_text())
    assert after["train"] != index["train"]["shards"][0]["sha256"]


def test_a_corpus(chats: dict[str, Chat], conversations: list[Conversation], tmp_path: Path) -> None:
    """A .jsonl file as the corpus of a configuration, with the tokenizer of a model or with one of its own."""
    corpus = write_lines(tmp_path / "chat.jsonl", conversations)
    chat = chats["chatml"]
    config = DataConfig(str(corpus), str(tmp_path / "given"), holdout_every=4)
    assert prepare_data(config, TINY.vocab_size, tokenizer=chat.tokenizer.path.parent)
    data = open_or_prepare(config, TINY.vocab_size, tokenizer=chat.tokenizer.path.parent)
    assert isinstance(data, PreparedData)
    for split, own in split_of(conversations, every=4).items():
        expected = [id for found in own for id, _ in chat.expected(found)]
        assert data.tokens[split][:].tolist() == expected

    own_config = replace(config, dir=str(tmp_path / "own"))
    assert prepare_data(own_config, 400)
    data = open_or_prepare(own_config, 400)
    assert isinstance(data, PreparedData)
    own_chat = Chat("minillm", data.tokenizer)
    for split, own in split_of(conversations, every=4).items():
        expected = [id for found in own for id, _ in own_chat.expected(found)]
        assert data.tokens[split][:].tolist() == expected
    assert not prepare_data(own_config, 400), "it is found again"
    write_lines(corpus, conversations[1:])
    with pytest.raises(InputError, match="the corpus has changed since"):
        open_or_prepare(own_config, 400)
    write_lines(corpus, conversations[:3])
    with pytest.raises(InputError, match=r"(?s)no document is left to hold out.*data\.holdout_every"):
        prepare_data(replace(config, dir=str(tmp_path / "few")), TINY.vocab_size, tokenizer=chat.tokenizer.path.parent)
    corpus.write_text(json.dumps(GOOD) + "\n" + json.dumps({"messages": 5}) + "\n")
    with pytest.raises(InputError, match=r"(?s)cannot be used.*not a list of messages.*chat\.jsonl, line 2"):
        prepare_data(replace(config, dir=str(tmp_path / "bad")), 400)


def test_the_tokenizer_has_not_seen_the_held_out_conversations(
    conversations: list[Conversation], tmp_path: Path
) -> None:
    """A character that is only there has no piece, also if the messages are read in several pieces."""
    marked = [[{**m, "content": m["content"] + "\u65e5" * (i % 5 == 4)} for m in found]
              for i, found in enumerate(conversations)]  # fmt: skip
    config = DataConfig(str(write_lines(tmp_path / "a.jsonl", marked)), str(tmp_path / "data"), holdout_every=5)
    prepare_data(config, 400)
    found = PreparedData(tmp_path / "data", 400).tokenizer
    assert len(found.encode("\u65e5")) == 3, "its bytes"
    assert len(found.encode("<user>")) == 1


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_mixture_with_text(
    document_mask: bool, chats: dict[str, Chat], corpus: Path, conversations: list[Conversation], tmp_path: Path
) -> None:
    """All targets of the rows of text count, except the first token of a document with a mask."""
    chat = chats["minillm"]
    prepare.prepare(chat_plan([write_lines(tmp_path / "in.jsonl", conversations)], chat), tmp_path / "chat")
    prepare.prepare(plan_for([corpus], chat.tokenizer, holdout=Holdout(every=4)), tmp_path / "text")
    parts = {n: PreparedData(tmp_path / n, TINY.vocab_size, document_mask=document_mask) for n in ("chat", "text")}
    mixture = Mixture(parts, [Phase(0, (5000, 5000))])
    assert mixture.is_chat
    counts = [0, 0]
    for step in range(20):
        batch = mixture.batch(step, 8, 48, 7)
        part, _ = mixture.rows_of(np.arange(step * 8, step * 8 + 8), 8, 7)
        for row, number in enumerate(part.tolist()):
            alone = parts[("chat", "text")[number]].batch(counts[number], 1, 48, 7)
            counts[number] += 1
            for name in ("tokens_BT", "targets_BT", "weights_BT", "positions_BT", "segments_BT"):
                whole, own = getattr(batch, name), getattr(alone, name)
                assert (whole is None) == (own is None) == (not document_mask and name[0] in "ps")
                if own is not None:
                    assert np.array_equal(whole[row], own[0]), name
            first_in_document = alone.tokens_BT[0] == chat.tokenizer.eos_id
            if number:
                assert np.array_equal(alone.weights_BT[0], ~first_in_document if document_mask else np.ones(48))
    assert min(counts) > 50
    assert mixture.tokens_per_byte("val") is None
    assert mixture.targets_of_parts("val") == {name: data.n_targets("val") for name, data in parts.items()}


def test_looking_into_chat_data(chats: dict[str, Chat], tmp_path: Path) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, *GOOD, *GOOD[:1]]
    path = write_lines(tmp_path / "in.jsonl", [conversation, GOOD, GOOD, GOOD, GOOD])
    done = succeeds_here(
        *("prepare_data", str(path), "--chat", "--tokenizer", str(chats["minillm"].tokenizer.path.parent)),
        *("--holdout", "0.4", "--out", "data"),
        cwd=tmp_path,
    )
    report = inspect_data(tmp_path / "data")
    samples = {sample for split in report.splits.values() for sample in split.samples}
    assert samples == {
        "<system>Be brief.<user>one<assistant>\u27e6two\u27e7<user>one",
        "<user>one<assistant>\u27e6two\u27e7",
    }
    shown = succeeds_here("inspect_data", "data", cwd=tmp_path).stdout
    for name, split in report.splits.items():
        assert split.n_counted == PreparedData(tmp_path / "data", None).n_targets(name)
        assert f"{split.n_counted:,} tokens ({split.n_counted / split.n_tokens:.1%}) are replies of the ass" in shown
        assert f", {name}: {split.n_tokens} tokens of {split.n_bytes} bytes, {split.n_counted} count" in done.stdout
    fails("--separator is for files of text", "prepare_data", str(path), "--chat", "--separator", "x", "--tokenizer",
          str(chats["minillm"].tokenizer.path.parent), "--out", "no", cwd=tmp_path)  # fmt: skip


def test_windows_of_marks(tmp_path: Path) -> None:
    """A mark may have any value of a byte."""
    np.arange(256, dtype=np.uint8).tofile(tmp_path / "a.marks")
    files = TokenFiles([TokenFile(tmp_path / "a.marks", 256)], "|u1", "")
    assert files.windows(np.array([254]), 3, 256).tolist() == [[254, 255, 255]]
