"""Conversations as training data: which tokens count, and in which rows they are."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_core.data import marks, prepare
from minillm_core.data.assemble import Holdout
from minillm_core.data.batches import Batch
from minillm_core.data.documents import CHAT
from minillm_core.data.inputs import find_sources
from minillm_core.data.marks import COUNTED, FIRST, pack_rows
from minillm_core.data.mixture import Mixture, Phase
from minillm_core.data.plan import Plan
from minillm_core.data.prepared import SPLITS, PreparedData
from minillm_core.data.token_files import TokenFile, TokenFiles
from minillm_core.text.chat_template import ROLE_TOKENS
from minillm_core.text.tokenizer import TOKENIZER_MODEL, Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.text.train_tokenizer import train_tokenizer
from parity_tests.conftest import TINY
from parity_tests.test_hf_tokenizer import byte_level
from parity_tests.test_prepare import plan_for

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


def test_windows_of_marks(tmp_path: Path) -> None:
    """A mark may have any value of a byte."""
    np.arange(256, dtype=np.uint8).tofile(tmp_path / "a.marks")
    files = TokenFiles([TokenFile(tmp_path / "a.marks", 256)], "|u1", "")
    assert files.windows(np.array([254]), 3, 256).tolist() == [[254, 255, 255]]
