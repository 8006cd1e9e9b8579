"""Optional destinations for a run's metrics, in addition to metrics.jsonl: TensorBoard, Weights & Biases."""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minillm_core.config import RunConfig, to_dict
from minillm_core.errors import missing_package
from minillm_core.files import replace_file
from minillm_core.training.metrics import Row
from minillm_core.training.run_directory import run_name


class TensorBoard:
    """An event file with the same rows as metrics.jsonl. When a run is resumed, it is rebuilt from those rows."""

    def __init__(self, folder: Path, rows: Iterable[Row]):
        try:
            from tensorboard.summary import Writer
        except ModuleNotFoundError as error:
            raise missing_package(error, "tensorboard", otherwise="or leave out --train.tensorboard") from error
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = Writer(str(folder))
        for row in rows:
            self.write(row)

    def write(self, row: Row) -> None:
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self, status: int) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One Weights & Biases run per run and framework; a resumed run continues it.

    Rows are sent in the order of their steps; the server ignores steps that it already has. Offline, every process
    writes a separate part, and the server joins the parts when they are synchronised.
    """

    def __init__(self, folder: Path, config: RunConfig, rows: Iterable[Row]):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise missing_package(error, "wandb", otherwise="or leave out --train.wandb") from error
        id_file = folder / "wandb-id"
        is_new = not id_file.exists()
        if is_new:
            replace_file(id_file, secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minillm"),
            name=f"{run_name(config.train.out_dir)}-{folder.name}",
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            mode=config.train.wandb,
            dir=folder,
            config=to_dict(config),
        )
        for row in rows if is_new else ():
            self.write(row)

    def write(self, row: Row) -> None:
        self._run.log(_scalars(row), step=row["step"])

    def close(self, status: int) -> None:
        self._run.finish(exit_code=status)


Tracker = TensorBoard | WeightsAndBiases


@contextmanager
def open_trackers(config: RunConfig, folder: Path, rows: Iterable[Row]) -> Iterator[list[Tracker]]:
    """Opens the trackers that the configuration enables. Closes them with status 1 after an exception, otherwise 0.

    Args:
        folder: the run's framework folder (`runs/x/jax`).
        rows: the rows that metrics.jsonl already has.

    Raises:
        InputError: a tracker's package is not installed.
    """
    trackers: list[Tracker] = []
    status = 1
    try:
        if config.train.tensorboard:
            trackers.append(TensorBoard(folder / "tensorboard", rows))
        if config.train.wandb != "disabled":
            trackers.append(WeightsAndBiases(folder, config, rows))
        yield trackers
        status = 0
    finally:
        for tracker in trackers:
            tracker.close(status)


def _scalars(row: Row) -> dict[str, float]:
    """`train/loss` and so on, without values that are not finite."""
    return {
        f"{row['split']}/{name}": value
        for name, value in row.items()
        if name not in ("step", "split") and value is not None
    }
