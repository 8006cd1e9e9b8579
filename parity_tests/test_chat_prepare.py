"""Conversations from files to prepared data: the same bytes however the work is divided, and what is refused."""

import gzip
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from minillm_core.config import DataConfig
from minillm_core.data import assemble, encode, plan, prepare, run_data
from minillm_core.data.assemble import Holdout
from minillm_core.data.documents import CHAT
from minillm_core.data.inspect import inspect_data
from minillm_core.data.marks import COUNTED, FIRST
from minillm_core.data.merge import merge
from minillm_core.data.prepared import SPLITS, PreparedData
from minillm_core.data.run_data import open_or_prepare, prepare_data
from minillm_core.errors import InputError
from minillm_core.text.chat_template import ChatTemplate
from minillm_core.text.template_process import TemplateEndedError
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer
from parity_tests.commands import fails, script_here, succeeds_here
from parity_tests.conftest import TINY
from parity_tests.test_chat_data import (
    CHATML,
    Chat,
    Conversation,
    chat_plan,
    chats,
    conversations,
    split_of,
    write_lines,
)
from parity_tests.test_prepare import files_of

__all__ = ["chats", "conversations"]  # fixtures

pytestmark = pytest.mark.extended


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
    monkeypatch.setattr(plan, "TASK_BYTES", (2048, 2048))
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
    assert len(conversations) < len(calls) < len(conversations) + 49, "finished tasks are not done again"
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
    conversations: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A character that is only there has no piece, also if the messages are read in several pieces."""
    marked = [[{**m, "content": m["content"] + "\u65e5" * (i % 5 == 4)} for m in found]
              for i, found in enumerate(conversations)]  # fmt: skip
    monkeypatch.setattr(run_data, "CHUNK_BYTES", 500)
    config = DataConfig(str(write_lines(tmp_path / "a.jsonl", marked)), str(tmp_path / "data"), holdout_every=5)
    prepare_data(config, 400)
    found = PreparedData(tmp_path / "data", 400).tokenizer
    assert len(found.encode("\u65e5")) == 3, "its bytes"
    assert len(found.encode("<user>")) == 1


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
