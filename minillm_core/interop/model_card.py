"""The model card: the README.md of an exported Hugging Face folder."""

from pathlib import Path

from minillm_core.config import dump_config
from minillm_core.model.params import count_params
from minillm_core.training.checkpoints import CheckpointInfo
from minillm_core.training.metrics import METRICS, losses_by_step, perplexity, read_metrics
from minillm_core.training.run_directory import run_name
from minillm_core.version import __version__


def model_name(info: CheckpointInfo) -> str:
    """The name of the run's folder, as text: a folder's name need not be valid UTF-8."""
    return run_name(info.config.train.out_dir).encode(errors="replace").decode()


def model_card(checkpoint: Path, info: CheckpointInfo, dtype: str, has_curve: bool) -> str:
    """The model card in Markdown: size, origin, losses, how to load the model, configuration, hashes of the data."""
    model, metrics = info.config.model, checkpoint.parent.parent / METRICS
    rows = read_metrics(metrics, info.step) if metrics.is_file() else []
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [llama, mini-llm]",
        "---",
        f"# {model_name(info)}",
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
