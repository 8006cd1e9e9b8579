"""Optional places, besides metrics.jsonl, that a run's metrics go to: TensorBoard, Weights & Biases."""

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


class TensorBoard:
    """An event file next to metrics.jsonl, and always equal to it: made anew from its rows when a run is resumed."""

    def __init__(self, folder: Path, rows: Iterable[Row]):
        try:
            from tensorboard.summary import Writer
        except ModuleNotFoundError as error:
            raise missing_package("tensorboard", "tensorboard", error, where="train.tensorboard") from error
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
    """One Weights & Biases run for each run and framework, which a resumed run goes on with.

    Rows go by their step, in order; on the server, those that it already has are passed over. Offline, every process
    writes a part of its own, and the server joins them when they are synchronised.
    """

    def __init__(self, folder: Path, config: RunConfig, rows: Iterable[Row]):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise missing_package("wandb", "wandb", error, where="train.wandb") from error
        id_file = folder / "wandb-id"
        is_new = not id_file.exists()
        if is_new:
            replace_file(id_file, secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minillm"),
            name=f"{Path(config.train.out_dir).name}-{folder.name}",
            id=id_file.read_text(),
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
    """Those that the configuration asks for; they are told whether they are left by an exception.

    Args:
        folder: the framework's folder of the run.
        rows: what metrics.jsonl already holds.

    Raises:
        InputError: the package that one needs is not installed.
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
    """`train/loss` and so on; values that are not finite are left out."""
    return {
        f"{row['split']}/{name}": value
        for name, value in row.items()
        if name not in ("step", "split") and value is not None
    }
