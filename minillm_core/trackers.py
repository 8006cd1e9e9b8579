"""Optional places, besides metrics.jsonl, that a run's metrics go to: TensorBoard, Weights & Biases."""

import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from minillm_core.config import RunConfig, to_dict
from minillm_core.errors import InputError
from minillm_core.metrics import Row


class TensorBoard:
    """An event file next to metrics.jsonl, and always equal to it: made anew from its rows when a run is resumed."""

    def __init__(self, folder: Path, rows: Iterable[Row]):
        try:
            from tensorboard.summary import Writer
        except ModuleNotFoundError as error:
            raise _not_installed("tensorboard", error) from error
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = Writer(str(folder))
        for row in rows:
            self.write(row)

    def write(self, row: Row) -> None:
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One Weights & Biases run for each run and framework; resumed, it goes on, and rows it has are not sent again."""

    def __init__(self, folder: Path, config: RunConfig):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise _not_installed("wandb", error) from error
        name = f"{Path(config.train.out_dir).name}-{folder.name}"
        id_file = folder / "wandb-id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        mode = config.train.wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minillm"),
            name=name,
            id=id_file.read_text(),
            resume="allow",
            mode=mode,
            dir=folder,
            config=to_dict(config),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        self._run.log(_scalars(row) | {"step": row["step"]})

    def close(self) -> None:
        self._run.finish()


def open_trackers(config: RunConfig, folder: Path, rows: Iterable[Row]) -> list[TensorBoard | WeightsAndBiases]:
    """Those that the configuration asks for.

    Args:
        folder: the framework's folder of the run.
        rows: what metrics.jsonl already holds.

    Raises:
        InputError: the package that one needs is not installed.
    """
    trackers: list[TensorBoard | WeightsAndBiases] = []
    if config.train.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard", rows))
    if config.train.wandb != "disabled":
        trackers.append(WeightsAndBiases(folder, config))
    return trackers


def _scalars(row: Row) -> dict[str, float]:
    """`train/loss` and so on; values that are not finite are left out."""
    return {
        f"{row['split']}/{name}": value
        for name, value in row.items()
        if name not in ("step", "split") and value is not None
    }


def _not_installed(package: str, error: ModuleNotFoundError) -> InputError:
    do = f"pip install -c constraints.txt -e '.[{package}]', or leave --train.{package} out"
    return InputError(f"{package} is not installed", found=error, do=do)
