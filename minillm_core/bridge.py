"""Checkpoints of others made into runs, and checkpoints of runs made into folders that others read."""

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from minillm_core import __version__
from minillm_core.backend import Backend
from minillm_core.checkpoints import (
    CheckpointInfo,
    CheckpointWriter,
    LazyTensors,
    TrainingState,
    checkpoint_steps,
    foreign_kind,
    payload_bytes,
    read_info,
    verify_checkpoint,
)
from minillm_core.cli import say
from minillm_core.config import ModelConfig, RunConfig, dump_config, load_config
from minillm_core.errors import InputError
from minillm_core.files import hash_arrays, hash_file, refuse_existing, written_aside
from minillm_core.gguf import GGUFCheckpoint, open_gguf, write_gguf
from minillm_core.gguf_tokenizer import NO_TOKENIZER, tokenizer_fields
from minillm_core.hf import HFCheckpoint, open_hf, to_hf_config, write_hf_weights
from minillm_core.metrics import losses_by_step, perplexity, read_metrics
from minillm_core.original import OriginalCheckpoint, open_original
from minillm_core.params import count_params
from minillm_core.rundir import open_run
from minillm_core.tokenizer import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    TOKENIZER_MODEL,
    Tokenizer,
    copy_tokenizer,
    read_generation_config,
    read_tokenizer_config,
)
from minillm_core.tokenizer_json import contradicting, load_tokenizer, sentencepiece_to_json, special_tokens

OPENERS: dict[str, Callable[[Path], HFCheckpoint | OriginalCheckpoint | GGUFCheckpoint]] = {
    "hf": open_hf,
    "minillm": open_original,
    "gguf": open_gguf,
}
"""By format: what looks at a checkpoint without reading its weights."""


def import_checkpoint(format: str, source: Path, run_dir: Path, backend: Backend) -> Path:
    """Makes a run with one checkpoint, of step 0, from another project's checkpoint; returns the new one.

    Weights are kept as float32 (float64 ones as they are). The tokenizer files beside them go along as they are.

    Args:
        format: `hf`: a Hugging Face folder; `minillm`: the original Mini-LLM's ckpt.pt or folder; `gguf`: a file.

    Raises:
        InputError: the source is damaged or has what the architecture cannot express, or the run directory holds
            something else. Nothing is written then.
    """
    kind = foreign_kind(source)
    if kind not in (None, format) and (format, kind) != ("minillm", "hf"):  # the original's config.json may be bare
        do = f"python scripts/convert.py '{kind}->{backend.FRAMEWORK}' {source} {run_dir}"
        raise InputError("a checkpoint of another kind", expected=format, found=kind, where=source, do=do)
    opened = OPENERS[format](source)
    result = run_dir / backend.FRAMEWORK / "checkpoints" / "0"
    if checkpoint_steps(result.parent):
        raise InputError("the run has checkpoints of its own", where=result.parent, do="give another run directory")
    weights = dict(opened.tensors())
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside)
        generates = False
        try:
            opened.write_tokenizer(folder)
            if contradicting(folder):
                say("its tokenizer.json and tokenizer.model give other ids: the first is taken, as transformers does")
                (folder / TOKENIZER_MODEL).unlink()
            tokenizer = load_tokenizer(folder, opened.config.vocab_size)
            generates = tokenizer.fits(opened.config.vocab_size)
        except InputError as error:
            say(f"text cannot be generated from it, token ids can: {str(error).replace(beside, str(opened.folder))}")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
        hashes["weights"] = hash_arrays(weights)
        with (
            open_run(run_dir, _run_config(opened.config, run_dir), folder, hashes, "float32") as config,
            CheckpointWriter(result.parent) as writer,
        ):

            def start_payload(partial_folder: Path) -> Callable[[], None]:
                return partial(backend.write_payload, partial_folder, config, TrainingState(weights, {}, {}))

            info, n_bytes = CheckpointInfo(backend.FRAMEWORK, 0, 0, config, hashes, format), payload_bytes(weights)
            writer.save(info, folder, start_payload, n_bytes=n_bytes)
    say(f"imported {source}: {len(weights)} weights, {count_params(opened.config):,} parameters")
    place = shlex.quote(str(source) if kind == format else f"{format}:{source}")
    say(f"compare: python scripts/parity.py {place} {shlex.quote(str(result))}")
    if generates:
        say(f"try: python scripts/generate.py {shlex.quote(str(run_dir))} --backend {backend.FRAMEWORK}")
    return result


def _run_config(model: ModelConfig, run_dir: Path) -> RunConfig:
    """The model under the training settings of the smallest preset, which nothing but further training would use."""
    preset = load_config("quickstart")
    train = replace(preset.train, out_dir=str(run_dir), seq_len=min(preset.train.seq_len, model.context_length))
    return replace(preset, model=model, train=train)


def _open_export(checkpoint: Path, destination: Path, backend: Backend) -> tuple[CheckpointInfo, LazyTensors]:
    """A checkpoint that is whole, for a destination that does not exist yet."""
    refuse_existing(destination)
    verify_checkpoint(checkpoint)
    info = read_info(checkpoint)
    return info, backend.open_weights(checkpoint, info.config)


def export_hf(checkpoint: Path, folder: Path, backend: Backend, dtype: str) -> Path:
    """Writes a checkpoint as a Hugging Face folder: config.json, weights, tokenizer, model card, loss curve.

    Args:
        dtype: of the weights: float32, bfloat16, float16 or float64.

    Raises:
        InputError: the folder exists, or the checkpoint is damaged.
    """
    info, weights = _open_export(checkpoint, folder, backend)
    model = info.config.model
    with written_aside(folder) as beside:
        beside.mkdir()
        write_hf_weights(beside, model, weights, dtype)
        copy_tokenizer(checkpoint, beside)
        ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        try:
            ids = _write_tokenizer(beside, load_tokenizer(checkpoint, model.vocab_size), model)
        except InputError as error:
            say(f"its tokenizer does not work here; its files go along as they are: {error}")
        known = read_generation_config(beside)
        ids |= {key: known[key] for key in ids if key in known}
        _write_json(beside / GENERATION_CONFIG, known or ids)
        _write_json(beside / "config.json", to_hf_config(model, dtype) | ids)
        curve = checkpoint.parent.parent / "loss.png"
        if curve.is_file():
            shutil.copyfile(curve, beside / "loss.png")
        (beside / "README.md").write_text(_model_card(checkpoint, info, dtype, curve.is_file()))
    _say_exported(checkpoint, folder, f"{len(weights)} weights in {dtype}")
    return folder


def export_gguf(checkpoint: Path, file: Path, backend: Backend, dtype: str) -> Path:
    """Writes a checkpoint as a file for llama.cpp, its tokenizer in it.

    Args:
        dtype: of the matrices: float32, bfloat16, float16 or q8_0; norms are float32.

    Raises:
        InputError: the file exists, or the checkpoint is damaged.
    """
    info, weights = _open_export(checkpoint, file, backend)
    model = info.config.model
    fields: dict[str, Any] = {"general.name": Path(info.config.train.out_dir).name, **NO_TOKENIZER}
    try:
        fields |= tokenizer_fields(load_tokenizer(checkpoint, model.vocab_size), model.vocab_size)
    except InputError as error:
        say(f"the tokenizer is left out: {error}")
    with written_aside(file) as beside:
        kept = write_gguf(beside, model, weights, dtype, fields)
    if kept:
        say(f"rows that are no multiple of 32 do not fit q8_0: float16 in {len(kept)} matrices, as {kept[0]}")
    _say_exported(checkpoint, file, f"{len(weights)} weights in {dtype}")
    return file


def _say_exported(checkpoint: Path, destination: Path, what: str) -> None:
    say(f"exported {checkpoint}: {what}")
    say(f"compare: python scripts/parity.py {shlex.quote(str(checkpoint))} {shlex.quote(str(destination))}")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, model: ModelConfig) -> dict[str, int | None]:
    """Adds a SentencePiece model as tokenizer.json; other files stay as they came. Returns the special ids."""
    found = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    ids = {key: i if i >= 0 else None for key, i in found.items()} | {"pad_token_id": None}
    if (folder / "tokenizer.json").is_file():
        return ids
    data = sentencepiece_to_json(tokenizer.content, tokenizer.adds_bos)
    if data is None:
        say("its tokenizer is of a kind that tokenizer.json cannot express: tokenizer.model goes along alone")
        return ids
    settings: dict[str, object] = dict(special_tokens(tokenizer.content))
    settings |= {"model_max_length": model.context_length, "clean_up_tokenization_spaces": False}
    settings["split_special_tokens"] = True  # "</s>" in a text is text, as it was in training
    _write_json(folder / "tokenizer.json", data)
    settings |= read_tokenizer_config(folder) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }  # which takes it as it is
    _write_json(folder / TOKENIZER_CONFIG, settings)
    return ids | {"pad_token_id": data["model"]["vocab"].get(settings.get("pad_token"))}


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def _model_card(checkpoint: Path, info: CheckpointInfo, dtype: str, has_curve: bool) -> str:
    model, metrics = info.config.model, checkpoint.parent.parent / "metrics.jsonl"
    rows = read_metrics(metrics, info.step) if metrics.is_file() else []
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [llama, mini-llm]",
        "---",
        f"# {info.config.train.out_dir.rstrip('/').rsplit('/', 1)[-1]}",
        "",
        f"A Llama-architecture model of {count_params(model):,} parameters ({dtype}), exported by Mini-LLM "
        f"{__version__} from a {info.framework} checkpoint of step {info.step}.",
        "",
    ]
    if info.step:
        tokens = info.step * info.config.train.batch_size * info.config.train.seq_len
        lines += [
            f"Trained on {tokens:,} tokens of `{info.config.data.corpus}`.",
            "",
            "| split | step | loss, nats per token | perplexity |",
            "|---|---|---|---|",
        ]
        for split in ("train", "val"):
            losses = losses_by_step(rows, split)
            if losses:
                step = max(losses)
                lines.append(f"| {split} | {step} | {losses[step]:.4f} | {perplexity(losses[step]):.2f} |")
        lines += ["", *(["![loss curve](loss.png)", ""] if has_curve else [])]
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ["model = AutoModelForCausalLM.from_pretrained('.')", "tokenizer = AutoTokenizer.from_pretrained('.')"]
    lines += ["```", "", "## Configuration", "", "```yaml", dump_config(info.config).rstrip(), "```", ""]
    lines += ["## Data (SHA-256)", "", *(f"- {name}: `{value}`" for name, value in info.data_hashes.items()), ""]
    return "\n".join(lines)
