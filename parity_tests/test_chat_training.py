"""Runs on conversations: the loss is that of the assistant's tokens, and the same in both frameworks."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import minillm_jax
import minillm_torch
from minillm_core.config import DataConfig
from minillm_core.data import prepare
from minillm_core.data.assemble import Holdout
from minillm_core.data.batches import Batch
from minillm_core.data.mixture import Mixture
from minillm_core.data.prepared import PreparedData
from minillm_core.data.run_data import open_data
from minillm_core.decoding.scoring import score_split
from minillm_core.errors import InputError
from minillm_core.interop.evaluation import evaluate_checkpoint
from minillm_core.interop.initial import with_initial_checkpoint
from minillm_core.training.checkpoints import TrainingState, find_checkpoint
from minillm_core.training.train import train
from minillm_jax.loss import mean_loss as jax_mean_loss
from minillm_jax.weights import Params, merge_model, split_model
from minillm_torch.device import to_device
from minillm_torch.loss import mean_loss as torch_mean_loss
from parity_tests.commands import fails, succeeds, succeeds_here
from parity_tests.conftest import (
    BACKENDS,
    MODELS,
    TIERS,
    TINY,
    Tier,
    losses_of,
    make_pair,
    metrics_of,
    random_weights,
    text_run,
    train_until,
)
from parity_tests.test_chat_data import (
    Chat,
    Conversation,
    InRow,
    chat_of,
    chat_plan,
    chats,
    conversations,
    rows_by_hand,
    split_of,
    write_lines,
)
from parity_tests.test_docs import PAGES, tiny
from parity_tests.test_hf import save_llama
from parity_tests.test_prepare import plan_for

__all__ = ["chats", "conversations"]  # fixtures

pytestmark = pytest.mark.extended

SEQ_LEN = 64


@pytest.fixture(scope="module")
def folders(
    chats: dict[str, Chat], corpus: Path, conversations: list[Conversation], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Conversations and text, prepared with the tokenizer of this project: `chat` and `text`."""
    root, chat = tmp_path_factory.mktemp("folders"), chats["minillm"]
    prepare.prepare(chat_plan([write_lines(root / "in.jsonl", conversations)], chat), root / "chat")
    prepare.prepare(plan_for([corpus], chat.tokenizer, holdout=Holdout(every=4)), root / "text")
    return root


@pytest.fixture(params=["conversations", "with a mask", "with text"])
def data_config(request: pytest.FixtureRequest, folders: Path) -> DataConfig:
    plain = DataConfig("unused", str(folders / "chat"))
    if request.param == "with a mask":
        return replace(plain, document_mask=True)
    if request.param == "with text":
        return replace(plain, dir=str(folders), document_mask=True, mixture={"chat": 0.7, "text": 0.3})
    return plain


@pytest.mark.parametrize("precision", TIERS)
def test_both_frameworks_have_the_same_curve(precision: str, data_config: DataConfig, tmp_path: Path) -> None:
    """50 steps; one of the runs is stopped and resumed. The last evaluation is that of the checkpoint, and bits per
    byte, which would need the loss of all tokens, are not logged."""
    run = text_run(
        data_config,
        tmp_path / "run",
        steps=50,
        eval_every=25,
        checkpoint_every=25,
        compute_dtype=precision,
        seq_len=SEQ_LEN,
        grad_accum=2,
    )
    train(run, BACKENDS["jax"])
    train_until(run, BACKENDS["torch"], 31)
    train(run, BACKENDS["torch"])
    ours, theirs = (losses_of(tmp_path / "run", framework) for framework in BACKENDS)
    assert len(ours) == 52
    assert np.abs(ours / theirs - 1).max() <= TIERS[precision].run_loss
    assert ours[-1] < ours[0] - 0.5
    data = open_data(run.data, TINY.vocab_size)
    for framework, backend in BACKENDS.items():
        last = metrics_of(tmp_path / "run", framework)[-1]
        assert "bits_per_byte" not in last
        found = evaluate_checkpoint(find_checkpoint(tmp_path / "run", framework), backend, dtype=precision)
        assert found.loss.mean == pytest.approx(last["loss"], rel=10 * TIERS[precision].run_loss)
        assert found.is_chat
        assert found.bits_per_byte is None
        assert found.n_targets == sum(data.targets_of_parts("val").values())
        if isinstance(data, Mixture):
            assert found.loss.parts.keys() == {"chat", "text"}


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("framework", BACKENDS)
def test_the_loss_is_that_of_the_replies(
    framework: str, document_mask: bool, folders: Path, chats: dict[str, Chat], conversations: list[Conversation]
) -> None:
    """Of a batch and of a whole split: the mean over the tokens of the assistant, each scored after its conversation.
    The rows, the tokens and which of them count are written out by hand."""
    config = DataConfig("unused", str(folders / "chat"), document_mask=document_mask)
    run = text_run(config, Path("unused"), compute_dtype="float64", seq_len=SEQ_LEN)
    backend, data = BACKENDS[framework], PreparedData(config.dir, TINY.vocab_size, document_mask=document_mask)
    state = backend.import_state(run, TrainingState(random_weights(TINY), {}, {}), 0)
    generator = backend.Generator(backend.model_of(run, state), chats["minillm"].tokenizer)
    expected = {split: [chats["minillm"].expected(found) for found in own]
                for split, own in split_of(conversations).items()}  # fmt: skip

    def losses_of_row(row: Sequence[InRow]) -> list[float]:
        """Minus the log-probability of each token that counts."""
        texts = [
            [token for token in row if token.conversation == n] for n in dict.fromkeys(t.conversation for t in row)
        ]
        if not document_mask:
            texts = [[*row]]
        scored = [text for text in texts if len(text) > 1]
        scores = generator.score([[token.id for token in text] for text in scored])
        return [
            -float(score)
            for text, own in zip(scored, scores, strict=True)
            for token, score in zip(text[1:], own, strict=True)
            if token.counts
        ]

    rows = {tuple(token.id for token in row): row for row in rows_by_hand(expected["train"], SEQ_LEN)}
    batch = data.batch(0, run.train.batch_size, SEQ_LEN, run.train.seed)
    losses = []
    for b in range(run.train.batch_size):
        ids = (*batch.tokens_BT[b].tolist(), int(batch.targets_BT[b, -1]))
        losses += losses_of_row(next(row for tokens, row in rows.items() if ids[: len(tokens)] == tokens))
    all_losses = [loss for row in rows_by_hand(expected["val"], SEQ_LEN) for loss in losses_of_row(row)]
    generator = backend.Generator(backend.model_of(run, state), data.tokenizer)
    assert score_split(generator, data, "val", SEQ_LEN).mean == pytest.approx(np.mean(all_losses), rel=1e-11)
    assert len(all_losses) == data.n_targets("val")
    _, metrics = backend.make_train_step(run)(state, batch, 0.0)  # last: the step takes the memory of the state
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-11)


@partial(jax.jit, static_argnums=0)
def _jax_gradient(graphdef: Any, params: Params, rope: Params, batch: Batch) -> Params:
    return jax.grad(lambda p: jax_mean_loss(merge_model(graphdef, p, rope), batch))(params)


def test_the_words_of_the_user_are_only_context(folders: Path, float64: Tier) -> None:
    """No gradient depends on the targets that do not count; every gradient depends on the tokens before a reply."""
    pair = make_pair(replace(MODELS["gqa"], vocab_size=TINY.vocab_size), float64)
    batch = PreparedData(folders / "chat", TINY.vocab_size).batch(0, 2, SEQ_LEN, 0)

    def gradients(batch: Batch) -> list[dict[str, np.ndarray]]:
        pair.torch.zero_grad()
        torch_mean_loss(pair.torch, to_device(batch, torch.device("cpu"))).backward()
        theirs = {path: param.grad for path, param in pair.torch.named_parameters()}
        ours = _jax_gradient(*split_model(pair.jax), batch)
        found = [minillm_jax.to_canonical(pair.config, ours), minillm_torch.to_canonical(pair.config, theirs)]
        return [{name: array.copy() for name, array in tensors.items()} for tensors in found]

    noise = np.random.default_rng(0).integers(0, TINY.vocab_size, batch.targets_BT.shape).astype(np.int32)
    is_counted = batch.weights_BT > 0
    other_targets = replace(batch, targets_BT=np.where(is_counted, batch.targets_BT, noise))
    first = int(np.flatnonzero(is_counted[0])[0])
    tokens_BT = batch.tokens_BT.copy()
    tokens_BT[0, first - 2] = (tokens_BT[0, first - 2] + 1) % TINY.vocab_size  # the user's last word
    for before, same, changed in zip(
        gradients(batch), gradients(other_targets), gradients(replace(batch, tokens_BT=tokens_BT)), strict=True
    ):
        for name, gradient in before.items():
            assert np.abs(gradient - same[name]).max() <= 1e-15 * np.abs(gradient).max(), name
            assert np.abs(gradient - changed[name]).max() > 1e-9, name


def test_changed_conversations_are_refused(
    folders: Path, chats: dict[str, Chat], conversations: list[Conversation], tmp_path: Path
) -> None:
    """The same tokens, of which different ones count, are different data."""
    shutil.copytree(folders / "chat", tmp_path / "data")
    run = text_run(DataConfig("unused", str(tmp_path / "data")), tmp_path / "run", steps=6, checkpoint_every=3)
    train_until(run, BACKENDS["torch"], 4)
    path = tmp_path / "data" / "train-00000.marks"
    path.write_bytes(bytes(mark | 1 for mark in path.read_bytes()))
    with pytest.raises(InputError, match=r"(?s)was changed after it was prepared.*train-00000\.marks"):
        train(run, BACKENDS["torch"])
    write_lines(tmp_path / "new.jsonl", conversations[::-1])
    prepare.prepare(chat_plan([tmp_path / "new.jsonl"], chats["minillm"]), tmp_path / "new")
    changed = replace(run, data=replace(run.data, dir=str(tmp_path / "new")))
    with pytest.raises(InputError, match="the run uses a different training text"):
        train(changed, BACKENDS["torch"])


def test_an_imported_chat_model_is_tuned(corpus: Path, conversations: list[Conversation], tmp_path: Path) -> None:
    """In its own format, from its own weights, with the same curve in both frameworks."""
    chat = chat_of("chatml", corpus, tmp_path / "hf")
    save_llama(TINY, tmp_path / "hf", torch.float32)
    path = write_lines(tmp_path / "chat.jsonl", conversations)
    data_config = DataConfig(str(path), str(tmp_path / "data"), holdout_every=5, document_mask=True)
    settings = {"steps": 6, "eval_every": 6, "seq_len": SEQ_LEN, "compute_dtype": "float64"}
    run = text_run(data_config, tmp_path / "run", init_from=str(tmp_path / "hf"), **settings)
    for backend in BACKENDS.values():
        checkpoint = train(with_initial_checkpoint(run, backend), backend)
        assert (checkpoint / "tokenizer_config.json").is_file()
    ours, theirs = (losses_of(tmp_path / "run", framework) for framework in BACKENDS)
    assert np.abs(ours / theirs - 1).max() <= TIERS["float64"].run_loss
    expected = [id for found in split_of(conversations)["train"] for id, _ in chat.expected(found)]
    assert PreparedData(tmp_path / "data", None).tokens["train"][:].tolist() == expected


def test_commands(corpus: Path, conversations: list[Conversation], tmp_path: Path) -> None:
    """A model that was trained on text with the pieces for roles is tuned on conversations, evaluated, and answers. One
    without these pieces is refused."""
    chat = chat_of("minillm", corpus, tmp_path / "tokenizer")
    prepare.prepare(plan_for([corpus], chat.tokenizer, holdout=Holdout(every=4)), tmp_path / "text")
    sizes = {"steps": 6, "checkpoint_every": 6, "eval_every": 6, "seq_len": SEQ_LEN}
    base = text_run(DataConfig("unused", str(tmp_path / "text")), tmp_path / "base", **sizes)
    train(base, BACKENDS["torch"])
    write_lines(tmp_path / "chat.jsonl", conversations)
    options = [
        *("--train.init_from", "base", "--data.corpus", "chat.jsonl", "--data.dir", "data", "--train.seq_len", "64")
    ]
    options += [
        "--train.steps",
        "6",
        "--optim.warmup_steps",
        "1",
        "--train.out_dir",
        "tuned",
        "--train.batch_size",
        "4",
    ]
    done = succeeds("train_torch", *options, cwd=tmp_path)
    data = PreparedData(tmp_path / "data", None)
    assert data.is_chat
    counted = f"{data.n_tokens('val'):,} tokens; {data.n_targets('val'):,} count"
    assert f"evaluating on the whole held-out text, {counted}" in done.stderr
    question = split_of(conversations, every=10)["val"][0]
    start = "".join(f"<{m['role']}>{m['content']}" for m in question[: 1 + (question[0]["role"] == "system")])
    assert done.stdout.startswith(f"{start}<assistant>"), "the sample answers a held-out question"
    assert "chat.py tuned --backend torch" in done.stderr
    found = succeeds_here("evaluate", "tuned", "--backend", "torch", cwd=tmp_path).stdout
    assert f"nats per token, over {data.n_targets('val')} tokens of the assistant's replies" in found
    assert "bits_per_byte" not in found
    answer = succeeds_here("generate", "tuned", "--backend", "torch", "--chat", "--prompt", "one", cwd=tmp_path)
    assert answer.stdout.strip()

    text_run_done = text_run(DataConfig(str(corpus), str(tmp_path / "plain"), holdout_every=5), tmp_path / "p", **sizes)
    train(text_run_done, BACKENDS["torch"])
    options[1], options[5] = "p", "data-p"
    options[options.index("tuned")] = "tuned-p"
    message = r"no chat template.*expected.*<user>"
    assert "Traceback" not in fails(message, "train_torch", *options, cwd=tmp_path)


def test_the_example_of_the_documentation(corpus: Path, tmp_path: Path) -> None:
    """The Python and the commands of docs/training.md, at a tiny size."""
    section = PAGES["training.md"].split("## Tune a model for chats")[1].split("\n## ")[0]
    (code,), (block,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "bash"))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for line in block.splitlines():
        _, path, *arguments = shlex.split(line.replace("4096", str(TINY.vocab_size)))
        done = succeeds(Path(path).stem, *tiny(Path(path).stem, arguments, corpus), cwd=tmp_path)
        if "--chat" in arguments:
            assert done.stdout.strip()
    data = PreparedData(tmp_path / "data" / "chat", TINY.vocab_size)
    n_lines = len((tmp_path / "chat.jsonl").read_text().splitlines())
    assert data.index["train"]["n_documents"] + data.index["val"]["n_documents"] == n_lines
