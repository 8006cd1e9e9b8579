"""One function for all conversions: between the two frameworks, and from and to the formats of other projects."""

import re
from dataclasses import dataclass
from pathlib import Path

from minillm_core.errors import InputError
from minillm_core.files import user_path
from minillm_core.interop.between_frameworks import copy_checkpoint
from minillm_core.interop.exports import export_gguf, export_hf
from minillm_core.interop.imports import OPENERS, import_checkpoint
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.backend import load_backend
from minillm_core.training.checkpoints import FRAMEWORKS, find_checkpoint, read_info
from minillm_core.training.run_directory import run_name

FORMATS = (*FRAMEWORKS, *OPENERS)
EXPORT_DTYPES = {
    "hf": ("float32", "bfloat16", "float16", "float64"),
    "gguf": ("float32", "bfloat16", "float16", "q8_0"),
}
"""Export format -> the dtypes that it can store."""


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how the result can be used."""

    source_format: str
    target_format: str
    source: Path
    """The checkpoint, folder or file that was read."""
    result: Path
    """The checkpoint, folder or file that was written."""
    generates: bool
    """The result is a checkpoint of this project with a usable tokenizer, so it can continue text."""
    unfinished: bool
    """The result is a checkpoint of a training run that is not finished."""

    @property
    def run_dir(self) -> Path:
        """The run that contains the resulting checkpoint."""
        return self.result.parent.parent.parent


def convert(
    direction: str, source: str | Path, destination: str | Path | None = None, *, dtype: str = "float32"
) -> Conversion:
    """Converts a checkpoint.

    Between the frameworks (`torch->jax`, `jax->torch`), the whole training state is copied bit for bit. Imports
    (`hf->jax`, `minillm->torch`, `gguf->jax`, ...) create a run with one checkpoint: step 0, no optimizer state.
    Exports (`jax->hf`, `torch->gguf`, ...) write the weights and the tokenizer.

    Args:
        direction: `SOURCE->TARGET` or `SOURCE-to-TARGET`, each one of jax, torch, hf, minillm, gguf.
        source: a run, its framework folder or one checkpoint; for an import, the folder or file.
        destination: the run directory, folder or file to write. Required for an import. By default, a copy is written
            into the same run, and an export into a folder or file inside the run.
        dtype: precision of exported weights: float32, bfloat16 or float16; also float64 for `hf`, and q8_0 for `gguf`.

    Raises:
        InputError: the direction or dtype is unknown; the source is missing or damaged, or has features that the target
            cannot express; or the destination holds something different. Nothing is written in these cases.
    """
    source_format, target_format = parse_direction(direction)
    if target_format in EXPORT_DTYPES and dtype not in EXPORT_DTYPES[target_format]:
        expected = ", ".join(EXPORT_DTYPES[target_format])
        raise InputError(
            f"{target_format} has no {dtype}", expected=expected, found=dtype, hint="choose a different dtype"
        )
    if target_format in FRAMEWORKS and dtype != "float32":
        problem = f"a conversion to {target_format} does not round"
        raise InputError(problem, found=f"dtype {dtype}", hint="leave out the dtype: it applies to exports only")
    destination = None if destination is None else user_path(destination)
    if source_format in OPENERS:
        if destination is None:
            expected = f"a source and a run directory for {source_format}->{target_format}"
            raise InputError("a path is missing", expected=expected, found="no run directory", hint="give both paths")
        source = user_path(source)
        result = import_checkpoint(source_format, source, destination, load_backend(target_format))
        return Conversion(source_format, target_format, source, result, _generates(result), False)
    checkpoint, reader = _find_source(source, source_format, target_format), load_backend(source_format)
    run_dir = checkpoint.parent.parent.parent
    if target_format == "hf":
        destination = destination or run_dir / f"hf-{source_format}"
        export_hf(checkpoint, destination, reader, dtype)
    elif target_format == "gguf":
        destination = destination or run_dir / f"{run_name(run_dir)}-{dtype}.gguf"
        export_gguf(checkpoint, destination, reader, dtype)
    else:
        result = copy_checkpoint(checkpoint, destination, reader, load_backend(target_format))
        info = read_info(checkpoint)
        # an imported model has no training data
        unfinished = info.step < info.config.train.steps and info.has_data
        return Conversion(source_format, target_format, checkpoint, result, _generates(result), unfinished)
    return Conversion(source_format, target_format, checkpoint, destination, False, False)


def _find_source(source: str | Path, source_format: str, target_format: str) -> Path:
    """The checkpoint to convert. If there are only checkpoints of the target, the hint is not to convert those."""
    try:
        return find_checkpoint(source, source_format)
    except InputError as error:
        if error.command[:2] != ("convert", f"{target_format}->{source_format}"):
            raise
        raise InputError(
            f"no {source_format} checkpoint to convert",
            found=f"only {target_format} checkpoints",
            where=source,
            hint=f"train in {source_format} first, or name a run that was trained in it",
        ) from None


def _generates(checkpoint: Path) -> bool:
    """Whether the checkpoint has a usable tokenizer, so that it can continue text."""
    vocab_size = read_info(checkpoint).config.model.vocab_size
    try:
        return load_tokenizer(checkpoint, vocab_size).fits(vocab_size)
    except InputError:
        return False


def parse_direction(direction: str) -> tuple[str, str]:
    """The source and target format of a direction such as `torch->jax` or `torch-to-jax`.

    Raises:
        InputError: the conversion does not exist.
    """
    match = re.fullmatch(r"(\w+)(?:->|-to-)(\w+)", direction)
    known = {(source, target) for source in FORMATS for target in FRAMEWORKS}
    known |= {(source, target) for source in FRAMEWORKS for target in EXPORT_DTYPES}
    if not match or match[1] == match[2] or match.groups() not in known:
        expected = "'torch->jax', 'hf->jax', 'minillm->jax', 'gguf->jax', 'jax->hf', 'jax->gguf' or similar"
        hint = f"write 'SOURCE->TARGET', in quotes; the formats are {', '.join(FORMATS)}"
        if match and {*match.groups()} <= {*FORMATS} and match[1] != match[2]:
            hint = f"convert in two steps: '{match[1]}->jax', then 'jax->{match[2]}'"
        raise InputError("unknown conversion", expected=expected, found=repr(direction), hint=hint)
    return match[1], match[2]
