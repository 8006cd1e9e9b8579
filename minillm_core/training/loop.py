"""The training loop, shared by both frameworks: schedule, logging, evaluation, checkpoints.

The loop dispatches step n, then reads the metrics of step n - 1. So the device always has work, and the host reads at
most one step late. This is safe: a step whose loss or gradient norm is not finite changes nothing.
"""

import logging
import math
import time
from collections import deque
from functools import partial
from pathlib import Path

from minillm_core.config import RunConfig
from minillm_core.data.batches import Batch
from minillm_core.data.prefetch import prefetched
from minillm_core.data.training_data import TrainingData
from minillm_core.errors import InputError, Interrupted
from minillm_core.files import flush
from minillm_core.interrupt import StopRequest
from minillm_core.model.params import count_params
from minillm_core.training.backend import Backend, State, StepMetrics, TrainStep
from minillm_core.training.checkpoints import CheckpointInfo, CheckpointWriter, TrainingState, read_info
from minillm_core.training.evaluation import evaluate
from minillm_core.training.metrics import METRICS, MetricsLog, Row, bits_per_byte, losses_by_step, perplexity
from minillm_core.training.plots import plot_loss
from minillm_core.training.run_directory import RunDirectory, require_same_config, require_same_data, require_same_past
from minillm_core.training.schedule import learning_rate
from minillm_core.training.speed import Speed
from minillm_core.training.trackers import Tracker, open_trackers

MAX_SKIPS = 20
"""Skipped updates in a row at which the run stops, even with `train.nonfinite: skip`."""

logger = logging.getLogger(__name__)


def run_to_end(run: RunDirectory, backend: Backend, data: TrainingData, init: Path | None = None) -> Path:
    """Trains a run to its last step, from the newest good checkpoint or the initial weights.

    Args:
        init: the checkpoint that has the initial weights; None: random ones.

    Returns:
        the final checkpoint.

    Raises:
        InputError, Interrupted: as `train` in train.py.
    """
    with (
        StopRequest() as stop,
        run.opened(data.dir, data.hashes()),
        CheckpointWriter(run.path / backend.FRAMEWORK / "checkpoints", run.config.train.keep_last) as writer,
    ):
        return _Loop(run.config, backend, data, writer, stop, init).run_to_end()


def initial_or_newest(
    config: RunConfig, backend: Backend, data: TrainingData, writer: CheckpointWriter, init: Path | None = None
) -> tuple[State, int]:
    """The state to start from, and its step: the newest good checkpoint, or the initial weights.

    Raises:
        InputError: every checkpoint is damaged; or the newest good one has different data, a different configuration
            or a different format version.
    """
    newest = writer.newest_good()
    for problem in writer.damaged.values():
        logger.warning(f"skipping a damaged checkpoint; resuming from the previous one: {problem}")
    if newest is None and init is not None:
        weights = backend.read_payload(init, read_info(init).config).weights
        logger.info(f"starting with the weights of {init}")
        return backend.import_state(config, TrainingState(weights, {}, {}), 0), 0
    if newest is None:
        return backend.init_state(config), 0
    info = read_info(newest)
    require_same_data(info.data_hashes, data.hashes(), newest)
    require_same_config(config, info.config, newest)
    require_same_past(config, info.config, info.step, newest)
    if info.step < config.train.steps:
        logger.info(f"resuming from {newest}")
    saved = backend.read_payload(newest, config)
    if not saved.exp_avg:
        logger.warning("this checkpoint has no optimizer state: Adam's moments and its count start again at zero")
    return backend.import_state(config, saved, info.updates), info.step


class _Loop:
    """The part of a run that one process does: from the current step to the last one, or until a stop request."""

    def __init__(
        self,
        config: RunConfig,
        backend: Backend,
        data: TrainingData,
        writer: CheckpointWriter,
        stop: StopRequest,
        init: Path | None,
    ):
        self.config, self.backend, self.data, self.writer, self.stop = config, backend, data, writer, stop
        self.folder = writer.folder.parent
        self.state, self.step = initial_or_newest(config, backend, data, writer, init)
        self.updates = 0
        """Adam's count after the last step whose metrics were read."""
        self.saved_step = self.step
        self.last_save_failed = False
        self.skips_in_a_row = 0
        self.log = MetricsLog(self.folder / METRICS, self.step)
        if self.log.old is not None:
            logger.warning(f"no checkpoint to resume from: starting at step 0; the old metrics are in {self.log.old}")
        self.trackers: list[Tracker] = []
        self.speed = Speed(config, backend.describe_device(), self.step)
        self.unread: deque[tuple[int, float, float, StepMetrics]] = deque()
        """Dispatched steps whose metrics are not read yet: step, learning rate, time of dispatch, metrics."""

    def run_to_end(self) -> Path:
        """Trains the remaining steps; returns the final checkpoint."""
        c = self.config.train
        final = self.writer.folder / str(c.steps)
        # False if the process ended after it committed the checkpoint of this step, but before the evaluation.
        is_evaluated = not self._evaluates(self.step) or self.log.has(self.step, "val")
        if self.step == c.steps and is_evaluated:
            source = read_info(final).converted_from
            origin = f", converted from {source}" if source else ""
            logger.info(f"found the finished run in {self.folder}: {self.step} of {c.steps} steps done{origin}")
            _report(self.log.rows)
        else:
            with open_trackers(self.config, self.folder, self.log.rows) as self.trackers:
                try:
                    if not is_evaluated:
                        self._evaluate()
                    self._train()
                except Interrupted:
                    self._save()
                    self.writer.wait()
                    saved = f"saved {self.writer.folder / str(self.step)}" if self.step else "nothing to save"
                    logger.info(f"stopped at step {self.step} of {c.steps}: {saved}; run the same command to continue")
                    raise
            self.writer.wait()
            self.writer.prune(self.step, self._best())
            logger.info(f"saved {final}")
        self.stop.check()
        return final

    def _train(self) -> None:
        c = self.config.train
        if self.step == c.steps:
            return
        train_step = self.backend.make_train_step(self.config)
        logger.info(
            f"training {count_params(self.config.model):,} parameters for {c.steps - self.step} steps "
            f"of {c.batch_size} x {c.seq_len} tokens, {c.compute_dtype}, {self.backend.describe_device()}, "
            f"{self.backend.describe_attention(self.config)}"
        )

        def read(n: int) -> Batch:
            return self.data.batch(n, c.batch_size, c.seq_len, c.seed)

        with prefetched(read, range(self.step, c.steps)) as batches:
            for n in range(self.step, c.steps):
                self.stop.check()
                self._take_step(n, train_step, next(batches))

    def _take_step(self, n: int, train_step: TrainStep, batch: Batch) -> None:
        c = self.config.train
        rate = learning_rate(self.config.optim, n, c.steps)
        self.state, metrics = train_step(self.state, batch, rate)
        self.step = n + 1
        self.unread.append((self.step, rate, time.perf_counter(), metrics))
        saves, evaluates = self.step % c.checkpoint_every == 0 or self.step == c.steps, self._evaluates(self.step)
        # The metrics of a step are read while the next step runs. If this step's state is saved or evaluated,
        # its metrics are read first: such a state contains only updates that were checked to be finite.
        self._read_metrics(self.step if saves or evaluates else n)
        if saves:
            self._save()
        if evaluates:
            self._evaluate()

    def _evaluates(self, step: int) -> bool:
        return step > 0 and (step % self.config.train.eval_every == 0 or step == self.config.train.steps)

    def _logs(self, step: int) -> bool:
        return step == 1 or step % self.config.train.log_every == 0 or self._evaluates(step)

    def _read_metrics(self, last: int) -> None:
        """Waits for the steps up to `last`, checks that each is finite, and logs those that are due for logging."""
        while self.unread and self.unread[0][0] <= last:
            step, rate, at, metrics = self.unread.popleft()
            loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
            self.updates = int(float(metrics["updates"]))
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.skips_in_a_row = 0
            else:
                self._skip_or_stop(step, f"loss {loss}, gradient norm {grad_norm}, learning rate {rate:.3e}")
            if self._logs(step):
                values = {"grad_norm": grad_norm, "learning_rate": rate}
                values |= self.speed.tick(step, at, loss, grad_norm, rate)
                if self.config.train.nonfinite == "skip":
                    values["updates"] = self.updates
                self._log(step, "train", loss, **values)

    def _skip_or_stop(self, step: int, found: str) -> None:
        self.skips_in_a_row += 1
        if self.config.train.nonfinite == "skip" and self.skips_in_a_row < MAX_SKIPS:
            logger.warning(f"step {step}: skipping this update, which is not finite ({found})")
            return
        problem = f"step {step}: the loss or the gradient norm is not finite; this update was not applied"
        hint = "start a new run (--train.out_dir) with a lower optim.learning_rate or a higher optim.warmup_steps"
        if self.config.train.nonfinite == "skip":
            problem += f", nor were the {self.skips_in_a_row - 1} before it"
        else:
            hint = "resume from the last checkpoint and skip such updates (--train.nonfinite skip), or " + hint
        raise InputError(problem, found=found, where=self.folder, hint=hint)

    def _save(self) -> None:
        """Starts saving the current step, unless it is saved already."""
        if self.saved_step == self.step:
            return
        self._read_metrics(self.step)
        with self.speed.paused():
            flush(self.log.path)  # a committed checkpoint has all its metrics, even after a crash
            try:
                self.writer.wait()
                self.last_save_failed = False
            except InputError as error:
                if self.last_save_failed:
                    raise
                self.last_save_failed = True
                logger.warning(f"{error}\nsaving again at step {self.step}; the run stops if this fails too")
            info = CheckpointInfo(self.backend.FRAMEWORK, self.step, self.updates, self.config, self.data.hashes())
            start_payload = partial(self.backend.start_payload, config=self.config, state=self.state)
            n_bytes = 3 * count_params(self.config.model) * (8 if self.config.train.compute_dtype == "float64" else 4)
            self.writer.save(info, self.data.dir, start_payload, self._best(), n_bytes)
            self.saved_step = self.step
            plot_loss(self.log.rows, self.folder / "loss.png")

    def _evaluate(self) -> None:
        c, step = self.config.train, self.step
        with self.speed.paused():
            n_batches = c.final_eval_batches if step == c.steps else c.eval_batches
            if n_batches is None:
                counted = f"; {sum(self.data.targets_of_parts('val').values()):,} count" if self.data.is_chat else ""
                logger.info(f"evaluating on the whole held-out text, {self.data.n_tokens('val'):,} tokens{counted}")
            model = self.backend.model_of(self.config, self.state)
            eval_step = self.backend.make_eval_step(model, deterministic=c.deterministic)
            found = evaluate(eval_step, self.data, "val", c, n_batches, self.stop.check)
            loss = found.mean
            if not math.isfinite(loss) and c.nonfinite == "stop":
                hint = "start a new run (--train.out_dir) with a lower optim.learning_rate, or resume with "
                hint += "--train.nonfinite skip"
                raise InputError(
                    f"step {step}: the held-out loss is not finite", found=loss, where=self.folder, hint=hint
                )
            per_byte = self.data.tokens_per_byte("val")
            compression = {} if per_byte is None else {"bits_per_byte": bits_per_byte(loss, per_byte)}
            parts = {f"loss_{name}": part for name, part in found.parts.items()}
            self._log(step, "val", loss, **compression, perplexity=perplexity(loss), **parts)
            _report(self.log.rows)
            plot_loss(self.log.rows, self.folder / "loss.png")

    def _log(self, step: int, split: str, loss: float, **values: float) -> None:
        row = self.log.write(step, split, loss, **values)
        for tracker in self.trackers:
            tracker.write(row)

    def _best(self) -> int | None:
        """Step of the good checkpoint with the lowest held-out loss. Not the last step, whose loss is over other text,
        unless the setting is the same."""
        losses, c = losses_by_step(self.log.rows, "val"), self.config.train
        other = set() if c.final_eval_batches == c.eval_batches else {c.steps}
        steps = [step for step in self.writer.good_steps() if step in losses and step not in other]
        return min(steps, key=lambda step: losses[step], default=None)


def _report(rows: list[Row]) -> None:
    """Logs the newest held-out result."""
    for row in [row for row in rows if row["split"] == "val"][-1:]:
        if row["loss"] is None:
            logger.info(f"step {row['step']:>6}  held-out loss is not finite")
            continue
        compression = f"  {row['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in row else ""
        parts = [f"  {name} {x:.4f}" for name, x in row.items() if name.startswith("loss_") and x is not None]
        logger.info(
            f"step {row['step']:>6}  held-out loss {row['loss']:.4f}  perplexity {row['perplexity'] or math.inf:.2f}"
            + "".join([compression, *parts])
        )
