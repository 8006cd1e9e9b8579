"""The train loop, one for both frameworks: data, schedule, logging, evaluation, checkpoints.

It dispatches step n before it reads the metrics of step n - 1, and reads those only at log ticks: between ticks nothing
waits for the device. A step whose loss or gradient is not finite changes nothing, so finding it late does no harm.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from minillm_core.backend import Backend, EvalStep, State
from minillm_core.checkpoints import (
    CheckpointInfo,
    CheckpointWriter,
    checkpoint_steps,
    newest_good,
    prune_checkpoints,
    read_info,
)
from minillm_core.cli import print_stream, say
from minillm_core.config import RunConfig, TrainConfig
from minillm_core.data import PreparedData, prepare_data
from minillm_core.errors import InputError, Interrupted
from minillm_core.files import flush
from minillm_core.interrupt import StopRequest
from minillm_core.metrics import MetricsLog, Row, bits_per_byte, peak_flops, perplexity, plot_loss
from minillm_core.params import count_params, forward_flops
from minillm_core.rundir import open_run, require_same_data
from minillm_core.schedule import learning_rate
from minillm_core.tokenizer import Tokenizer
from minillm_core.trackers import TensorBoard, WeightsAndBiases, open_trackers

SAMPLE_PROMPT = "The state of the Union is"


def train_and_sample(config: RunConfig, backend: Backend) -> None:
    """Trains, then prints a sample to stdout and the next commands to stderr."""
    checkpoint = train(config, backend)
    ours, other = backend.FRAMEWORK, "torch" if backend.FRAMEWORK == "jax" else "jax"
    say("\na sample of the trained model (greedy decoding would repeat itself; this is temperature 0.8, top-p 0.95):\n")
    generator = backend.Generator(backend.load(checkpoint), Tokenizer(checkpoint / "tokenizer.model"))
    room = config.model.context_length - len(generator.tokenizer.encode(SAMPLE_PROMPT, bos=True))
    stream = generator.stream(SAMPLE_PROMPT, max_new_tokens=min(120, room), temperature=0.8, top_p=0.95)
    print_stream(SAMPLE_PROMPT, stream)
    run = config.train.out_dir
    say(
        f"""
next:
  python scripts/generate.py {run} --backend {ours} --prompt "My fellow citizens,"
  python scripts/evaluate.py {run} --backend {ours}
  python scripts/convert.py '{ours}->{other}' {run}"""
    )


def train(config: RunConfig, backend: Backend) -> Path:
    """Prepares the data if needed and trains from the newest good checkpoint, or from the initial weights, to the end.

    Returns:
        the final checkpoint.

    Raises:
        InputError: the data or the run directory do not belong to this configuration, another process is at work
            there, the disk is full, or the loss is not finite.
        Interrupted: by SIGTERM or Ctrl-C, after saving.
    """
    if prepare_data(config.data, config.model.vocab_size):
        say(f"prepared {config.data.corpus} in {config.data.dir}")
    else:
        say(f"found prepared data in {config.data.dir}")
    data = PreparedData(config.data.dir, config.model.vocab_size)
    data.verify()
    dtype = str(backend.resolve_dtype(config.train.compute_dtype)).removeprefix("torch.")
    with (
        open_run(Path(config.train.out_dir), config, data.tokenizer.path, data.hashes(), dtype) as config,
        StopRequest() as stop,
    ):
        return _Run(config, backend, data, stop).finish()


def initial_or_newest(
    config: RunConfig, backend: Backend, data: PreparedData, checkpoints: Path
) -> tuple[State, int, int]:
    """The state to go on from, its step, and Adam's count: the newest good checkpoint, or the initial weights.

    Raises:
        InputError: every checkpoint is damaged; or the newest good one was trained on other data, or by a newer
            version.
    """
    newest = newest_good(checkpoints, say)
    if newest is None:
        return backend.init_state(config), 0, 0
    info = read_info(newest)
    require_same_data(info.data_hashes, data.hashes(), newest)
    if info.step < config.train.steps:
        say(f"resuming from {newest}")
    saved = backend.read_payload(newest, config, moments=True)
    if not saved.exp_avg:
        say("this checkpoint has no optimizer state: Adam's moments start again at zero")
    return backend.import_state(config, saved, info.updates), info.step, info.updates


class _Run:
    """A run in one process: from where it stands to its last step, or until it is asked to stop."""

    def __init__(self, config: RunConfig, backend: Backend, data: PreparedData, stop: StopRequest):
        self.config, self.backend, self.data, self.stop = config, backend, data, stop
        self.folder = Path(config.train.out_dir) / backend.FRAMEWORK
        self.checkpoints = self.folder / "checkpoints"
        self.writer = CheckpointWriter(self.checkpoints, config.train.keep_last)
        self.state, self.step, self.updates = initial_or_newest(config, backend, data, self.checkpoints)
        self.saved_step = self.step
        self.log = MetricsLog(self.folder / "metrics.jsonl", self.step)
        self.trackers: list[TensorBoard | WeightsAndBiases] = []
        self.progress = _Progress(config, backend, self.step)
        self.unread: deque[tuple[int, float, dict[str, Any]]] = deque()

    def finish(self) -> Path:
        """Trains to the end; returns the final checkpoint."""
        c = self.config.train
        final = self.checkpoints / str(c.steps)
        # An evaluation that a stop or a crash prevented; its step was committed before.
        is_evaluated = not self._evaluates(self.step) or self.step in self.log.held_out()
        if self.step == c.steps and is_evaluated:
            say(f"found the finished run in {self.folder}: {self.step} of {c.steps} steps done")
            _report(self.log.rows)
            return final
        self.trackers = open_trackers(self.config, self.folder, self.log.rows)
        try:
            if not is_evaluated:
                self._evaluate()
            if self.step < c.steps:
                self._train()
        except Interrupted:
            self._save()
            self.writer.wait()
            say(f"stopped at step {self.step} of {c.steps}; the same command goes on from {self.checkpoints}")
            raise
        finally:
            self.writer.wait()
            for tracker in self.trackers:
                tracker.close()
        prune_checkpoints(self.checkpoints, c.keep_last, self.step, self._best())
        best = self._best()
        say(f"saved {final}" + (f"; the lowest held-out loss was at step {best}" if best != c.steps else ""))
        return final

    def _train(self) -> None:
        c = self.config.train
        train_step = self.backend.make_train_step(self.config)
        say(
            f"training {count_params(self.config.model):,} parameters for {c.steps - self.step} steps "
            f"of {c.batch_size} x {c.seq_len} tokens, {c.compute_dtype}, {self.backend.describe_device()}"
        )
        for n in range(self.step, c.steps):
            self.stop.check()
            rate = learning_rate(self.config.optim, n, c.steps)
            batch = self.data.batch(n, c.batch_size, c.seq_len, c.seed)
            self.state, metrics = train_step(self.state, batch, rate)
            self.step = n + 1
            self.unread.append((self.step, rate, metrics))
            saves, evaluates = self.step % c.checkpoint_every == 0 or self.step == c.steps, self._evaluates(self.step)
            # A step to be logged is read once the next one is under way; but no state is saved or evaluated whose loss
            # and gradient were not seen to be finite.
            if saves or evaluates:
                self._read_metrics(self.step)
            elif self._logs(n):
                self._read_metrics(n)
            if saves:
                self._save()
            if evaluates:
                self._evaluate()

    def _evaluates(self, step: int) -> bool:
        return step > 0 and (step % self.config.train.eval_every == 0 or step == self.config.train.steps)

    def _logs(self, step: int) -> bool:
        return step == 1 or step % self.config.train.log_every == 0 or self._evaluates(step)

    def _read_metrics(self, last: int) -> None:
        """Waits for the steps up to `last`; checks every one, and logs those of the log's rhythm."""
        while self.unread and self.unread[0][0] <= last:
            step, rate, metrics = self.unread.popleft()
            loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
            self.updates = int(metrics["updates"])
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self._report_nonfinite(step, rate, loss, grad_norm)
            if self._logs(step):
                values = {"grad_norm": grad_norm, "learning_rate": rate}
                values |= self.progress.tick(step, loss, grad_norm, rate)
                if self.config.train.nonfinite == "skip":
                    values["skipped_updates"] = step - self.updates
                self._log(step, "train", loss, **values)

    def _report_nonfinite(self, step: int, rate: float, loss: float, grad_norm: float) -> None:
        found = f"loss {loss}, gradient norm {grad_norm}, learning rate {rate:.3e}"
        if self.config.train.nonfinite == "skip":
            say(f"step {step}: {found}: this update is skipped, {step - self.updates} so far")
            return
        self.writer.wait()
        raise InputError(
            f"step {step}: the loss or the gradient norm is not finite; this update was not made",
            found=found,
            where=f"last checkpoint: {checkpoint_steps(self.checkpoints)[-1:] or 'none'}",
            do="go on from there without such updates: --train.nonfinite skip; or begin again in another "
            "--train.out_dir with a lower optim.learning_rate or a higher optim.warmup_steps",
        )

    def _save(self) -> None:
        """Starts saving where the run stands, unless that is saved already."""
        if self.saved_step == self.step:
            return
        self._read_metrics(self.step)
        with self.progress.paused():
            flush(self.log.path)  # a committed checkpoint has all its metrics, whatever happens next
            plot_loss(self.log.rows, self.folder / "loss.png")
            info = CheckpointInfo(self.backend.FRAMEWORK, self.step, self.updates, self.config, self.data.hashes())
            start_payload = partial(self.backend.start_payload, config=self.config, state=self.state)
            self.writer.save(info, self.data.tokenizer.path, start_payload, self._best())
        self.saved_step = self.step

    def _evaluate(self) -> None:
        c, step = self.config.train, self.step
        with self.progress.paused():
            if step == c.steps:
                say(f"evaluating on the whole held-out text, {len(self.data.tokens['val']):,} tokens")
            model = self.backend.model_of(self.config, self.state)
            eval_step = self.backend.make_eval_step(model, deterministic=c.deterministic)
            n_batches = None if step == c.steps else c.eval_batches
            loss = evaluate(eval_step, self.data, "val", c, n_batches, self.stop.check)
            compression = bits_per_byte(loss, self.data.tokens_per_byte("val"))
            self._log(step, "val", loss, bits_per_byte=compression, perplexity=perplexity(loss))
            _report(self.log.rows)
            plot_loss(self.log.rows, self.folder / "loss.png")

    def _log(self, step: int, split: str, loss: float, **values: float) -> None:
        row = self.log.write(step, split, loss, **values)
        for tracker in self.trackers:
            tracker.write(row)

    def _best(self) -> int | None:
        """The committed step of the lowest held-out loss."""
        losses, steps = self.log.held_out(), checkpoint_steps(self.checkpoints)
        return min((step for step in steps if step in losses), key=lambda step: losses[step], default=None)


def evaluate(
    eval_step: EvalStep,
    data: PreparedData,
    split: str,
    config: TrainConfig,
    n_batches: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss in nats per token over a whole split, or over `n_batches` micro-batches spread evenly over it.

    Args:
        check: called before each micro-batch, to stop by raising.
    """
    sums, n_targets = [], 0.0
    for window in data.windows(split, config.batch_size // config.grad_accum, config.seq_len, n_batches):
        check()
        sums.append(eval_step(window.tokens, window.mask))
        n_targets += float(window.mask.sum())
    return math.fsum(float(value) for value in sums) / n_targets


def _report(rows: list[Row]) -> None:
    """Says the newest held-out result."""
    for row in [row for row in rows if row["split"] == "val"][-1:]:
        say(
            f"step {row['step']:>6}  held out: loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}  "
            f"{row['bits_per_byte']:.4f} bits per byte"
        )


class _Progress:
    """Rate and time left, the evaluations' and checkpoints' time not counted in the rate."""

    def __init__(self, config: RunConfig, backend: Backend, start: int):
        c = config.train
        self.steps, self.tokens_per_step = c.steps, c.batch_size * c.seq_len
        self.flops_per_token = 3 * forward_flops(config.model, 1, c.seq_len) / c.seq_len
        self.peak = peak_flops(backend.describe_device(), c.compute_dtype)
        self.last_step, self.last_time = start, time.perf_counter()

    def tick(self, step: int, loss: float, grad_norm: float, rate: float) -> dict[str, float]:
        """Prints a line; returns tokens per second since the last one and, where the peak is known, MFU."""
        now = time.perf_counter()
        seconds_per_step = (now - self.last_time) / max(1, step - self.last_step)
        values = {"tokens_per_second": round(self.tokens_per_step / seconds_per_step, 1)}
        if self.peak is not None:
            values["mfu"] = round(values["tokens_per_second"] * self.flops_per_token / self.peak, 4)
        left = int(seconds_per_step * (self.steps - step))
        self.last_step, self.last_time = step, now
        say(
            f"step {step:>6}/{self.steps}  loss {loss:.4f}  gradient norm {grad_norm:.2f}  learning rate {rate:.2e}  "
            f"{values['tokens_per_second']:,.0f} token/s  "
            + (f"MFU {values['mfu']:.1%}  " if self.peak is not None else "")
            + f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        return values

    def paused(self) -> "_Progress":
        return self

    def __enter__(self) -> None:
        self._paused_at = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.last_time += time.perf_counter() - self._paused_at
