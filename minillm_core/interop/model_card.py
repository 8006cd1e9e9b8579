"""The model card: the README.md of an exported Hugging Face folder."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from minillm_core.config import DataConfig, RunConfig, dump_config
from minillm_core.files import as_text
from minillm_core.interop.evaluation import Evaluation
from minillm_core.model.params import count_params
from minillm_core.training.checkpoints import CheckpointInfo
from minillm_core.training.metrics import METRICS, losses_by_step, perplexity, read_metrics
from minillm_core.training.run_directory import run_name
from minillm_core.version import __version__

LOADERS = {"model": "AutoModelForCausalLM", "tokenizer": "AutoTokenizer"}
"""What a user loads -> the class of transformers that loads it."""


def model_name(info: CheckpointInfo) -> str:
    """The name of the run's folder."""
    return as_text(run_name(info.config.train.out_dir))


def model_card(
    checkpoint: Path,
    info: CheckpointInfo,
    dtype: str,
    has_curve: bool,
    *,
    evaluation: Evaluation | None = None,
    repo: str | None = None,
) -> str:
    """The model card in Markdown: size, origin, losses, evaluation, how to load the model, configuration, hashes of the
    data. It names no licence: only the owner of the model can choose one.

    Args:
        dtype: of the weights of the folder.
        evaluation: the result to show, as a table and as metadata (`model-index`).
        repo: the repository OWNER/NAME that the folder is written for.
    """
    model, metrics = info.config.model, checkpoint.parent.parent / METRICS
    rows = read_metrics(metrics, info.step) if metrics.is_file() else []
    name = model_name(info) if repo is None else repo.split("/")[1]
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    header["tags"] = ["llama", "mini-llm"]
    if evaluation is not None:
        header["model-index"] = _model_index(name, evaluation)
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {name}",
        "",
        f"A Llama-architecture model of {count_params(model):,} parameters ({dtype}), exported by Mini-LLM "
        f"{__version__} from a {info.framework} checkpoint of step {info.step}.",
        "",
    ]
    if info.step:
        tokens = info.step * info.config.train.tokens_per_step
        text = evaluation.data if evaluation and evaluation.is_run_data else _text_of(info.config.data)
        lines += [
            f"Trained on {tokens:,} tokens of `{text}`.",
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
    if evaluation is not None:
        lines += _evaluation_table(evaluation, dtype)
    place = repo or "."
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f"{name} = {auto}.from_pretrained('{place}')" for name, auto in LOADERS.items()]
    lines += ["```", "", "## Configuration", "", "```yaml", dump_config(without_paths(info.config)).rstrip(), "```", ""]
    lines += ["## Data (SHA-256)", "", *(f"- {name}: `{value}`" for name, value in info.data_hashes.items()), ""]
    return "\n".join(lines)


def _text_of(data: DataConfig) -> str:
    """What a run was trained on, in words that name no folder of this machine."""
    return ", ".join(sorted(data.mixture)) if data.mixture is not None else _last_part(data.corpus)


def _last_part(path: str) -> str:
    return as_text(Path(path).name) or "text"


def without_paths(config: RunConfig) -> RunConfig:
    """The configuration with only the last part of each path: a model card is public."""
    init_from = config.train.init_from
    data = replace(config.data, corpus=_last_part(config.data.corpus), dir=_last_part(config.data.dir))
    train = replace(
        config.train,
        out_dir=_last_part(config.train.out_dir),
        init_from=None if init_from is None else _last_part(init_from),
    )
    return replace(config, data=data, train=train)


def _measures(evaluation: Evaluation) -> list[tuple[str, str, float]]:
    """Identifier, name and value of each measure that is known."""
    found = [
        ("loss", "loss, nats per token", evaluation.loss.mean),
        ("perplexity", "perplexity", evaluation.perplexity),
        ("bits_per_byte", "bits per byte", evaluation.bits_per_byte),
    ]
    return [(key, name, round(value, 6)) for key, name, value in found if value is not None]


def _model_index(name: str, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The metadata from which the Hub shows evaluation results."""
    dataset = {
        "name": f"{evaluation.data} (held-out text)" if evaluation.split == "val" else evaluation.data,
        "type": re.sub(r"[^\w.-]+", "-", evaluation.data, flags=re.ASCII).strip("-.") or "text",
        "split": evaluation.split,
        "args": {
            "seq_len": evaluation.seq_len,
            "n_tokens": evaluation.n_targets,
            "document_mask": evaluation.document_mask,
            **({"counted": "replies of the assistant"} if evaluation.is_chat else {}),
        },
    }
    measures = [{"type": key, "name": name, "value": value} for key, name, value in _measures(evaluation)]
    task = {"type": "text-generation", "name": "language modelling"}
    return [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": measures}]}]


def _evaluation_table(evaluation: Evaluation, dtype: str) -> list[str]:
    rounded = "" if dtype in ("float32", "float64") else f" It used the weights before they were rounded to {dtype}."
    first = "of each document" if evaluation.document_mask else "of each folder" if evaluation.loss.parts else "one"
    chat = " Of conversations, only the tokens of the assistant's replies count." if evaluation.is_chat else ""
    return [
        "## Evaluation",
        "",
        f"Every token of `{evaluation.data}`, split `{evaluation.split}`, except the first {first} is predicted once, "
        f"in windows that start without context.{chat} The computation is in {evaluation.dtype}.{rounded}",
        "",
        "| measure | value |",
        "|---|---|",
        *(f"| {name} | {value:.6g} |" for _, name, value in _measures(evaluation)),
        *(f"| loss of `{name}` | {loss:.6g} |" for name, loss in evaluation.loss.parts.items()),
        f"| predicted tokens | {evaluation.n_targets:,} |",
        f"| tokens per window (`seq_len`) | {evaluation.seq_len} |",
        "",
    ]
