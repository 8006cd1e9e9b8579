"""Opens a checkpoint of any supported kind, so that it can be run and compared."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from minillm_core.config import ModelConfig
from minillm_core.errors import InputError
from minillm_core.files import user_path
from minillm_core.interop.imports import OPENERS, open_foreign
from minillm_core.model.params import read_weights
from minillm_core.model.stages import Trace
from minillm_core.tensors import Tensors
from minillm_core.text.tokenizer import Tokenizer
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.backend import load_backend
from minillm_core.training.checkpoints import (
    FRAMEWORKS,
    checkpoint_steps,
    find_checkpoint,
    foreign_kind,
    read_info,
    verify_checkpoint,
)

logger = logging.getLogger(__name__)

KINDS = (*FRAMEWORKS, *OPENERS)

Run = Callable[[ModelConfig, Tensors, np.ndarray, str], Trace]
"""(configuration, weights, tokens (B, T), dtype) -> what the model computes, as in `Backend.trace`."""


@dataclass(frozen=True)
class Engine:
    """An independent implementation that runs checkpoints of one kind."""

    name: str
    run: Callable[[Path], Run]
    """Checkpoint folder -> the function that runs it."""
    encoder: Callable[[Path], Callable[[str], list[int]]] | None = None
    """Checkpoint folder -> the engine's own tokenizer (text -> token ids). Raises InputError if it cannot be loaded.
    None: the engine has no tokenizer of its own."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint, and the code that runs it."""

    kind: str
    path: Path
    """Where the weights are: a checkpoint, or a folder or file of another project."""
    config: ModelConfig
    weights: Tensors
    engine: str
    """What runs it: jax, torch or transformers."""
    run: Run
    tokenizer: Tokenizer | None = None
    """None if it has no usable tokenizer."""
    own_encoder: Callable[[Path], Callable[[str], list[int]]] | None = None
    """Loads the engine's own tokenizer, if the engine has one."""

    def encoder(self) -> Callable[[str], list[int]]:
        """Text -> token ids, by the engine's own tokenizer if it can be loaded, otherwise by this project's."""
        assert self.tokenizer is not None
        if self.own_encoder is not None:
            try:
                return self.own_encoder(self.path)
            except InputError as error:
                logger.warning(f"using this project's tokenizer, because the engine's own cannot be loaded: {error}")
        return partial(self.tokenizer.encode, bos=True)

    @property
    def label(self) -> str:
        return f"{self.kind} {self.path}"


def open_subject(place: str, engines: Mapping[str, Engine]) -> Subject:
    """Opens the checkpoint at a path, or at `KIND:PATH` if the path could mean several kinds.

    Args:
        engines: kind of checkpoint -> independent implementation that runs it. Imported kinds without an engine run in
            torch, or in JAX if torch is not installed.

    Raises:
        InputError: there is no checkpoint, the path is ambiguous, or the checkpoint is damaged.
    """
    kind, path = _kind_of(place)
    if kind in FRAMEWORKS:
        backend = load_backend(kind)
        checkpoint = find_checkpoint(path, kind)
        verify_checkpoint(checkpoint)
        run_config = read_info(checkpoint).config
        weights = read_weights(run_config.model, backend.open_weights(checkpoint, run_config).items())
        tokenizer = _tokenizer(checkpoint, run_config.model)
        return Subject(kind, checkpoint, run_config.model, weights, kind, backend.trace, tokenizer)
    opened = open_foreign(kind, path)
    weights = read_weights(opened.config, opened.tensors())
    with tempfile.TemporaryDirectory() as folder:
        try:
            opened.write_tokenizer(Path(folder))
        except InputError as error:
            logger.warning(f"the tokenizer cannot be used: {' '.join(str(error).split())}")
            tokenizer = None
        else:
            tokenizer = _tokenizer(Path(folder), opened.config)
    if engine := engines.get(kind):
        run = engine.run(path)
        return Subject(kind, path, opened.config, weights, engine.name, run, tokenizer, engine.encoder)
    try:
        backend = load_backend("torch")
    except InputError:
        backend = load_backend("jax")
    return Subject(kind, path, opened.config, weights, backend.FRAMEWORK, backend.trace, tokenizer)


def compare_tokenizers(a: Subject, b: Subject, texts: Sequence[str]) -> str:
    """Says in words whether two tokenizers agree on the ids of every text (including the token at its beginning) and on
    the tokens that end a text. An engine's own tokenizer is used if it can be loaded."""
    if a.tokenizer is None or b.tokenizer is None:
        missing = " and ".join(name for name, subject in (("A", a), ("B", b)) if subject.tokenizer is None)
        return f"not compared: no usable tokenizer in {missing}"
    encoders = [subject.encoder() for subject in (a, b)]
    for text in texts:
        ours, theirs = (encode(text) for encode in encoders)
        if ours != theirs:
            shorter = min(len(ours), len(theirs))
            at = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
            return (
                f"differ: {text[:60]!r} has {len(ours)} ids in A and {len(theirs)} in B; "
                f"the first different ones are {ours[at:][:5]} and {theirs[at:][:5]}"
            )
    ends = [sorted(tokenizer.end_ids) for tokenizer in (a.tokenizer, b.tokenizer)]
    return "the same" if ends[0] == ends[1] else f"differ: texts end with {ends[0]} in A and {ends[1]} in B"


def _tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    try:
        return load_tokenizer(folder, config.vocab_size)
    except InputError as error:
        logger.warning(f"the tokenizer cannot be used: {' '.join(str(error).split())}")
        return None


def _kind_of(place: str) -> tuple[str, Path]:
    """The kind and the path of a checkpoint. Raises InputError if there is none, or if several are possible."""
    kind, colon, rest = place.partition(":")
    if colon and kind in KINDS:
        return kind, user_path(rest)
    path = user_path(place)
    expected = (
        f"a run, a checkpoint, a Hugging Face folder or a file of another project; or KIND:PATH ({', '.join(KINDS)})"
    )
    if not path.exists():
        raise InputError("no such checkpoint", expected=expected, where=path, hint="check the path")
    if (path / "checkpoint.json").is_file():
        return read_info(path).framework, path
    if trained := [name for name in FRAMEWORKS if checkpoint_steps(path / name / "checkpoints")]:
        if len(trained) > 1:
            expected = " or ".join(str(path / name) for name in trained)
            problem, hint = "the run has checkpoints of both frameworks", "name one of the two folders"
            raise InputError(problem, expected=expected, where=path, hint=hint)
        return trained[0], path
    if steps := checkpoint_steps(path / "checkpoints"):
        return read_info(path / "checkpoints" / str(steps[-1])).framework, path
    if (foreign := foreign_kind(path)) is not None:
        return foreign, path
    raise InputError("not a checkpoint", expected=expected, where=path, hint="check the path")
