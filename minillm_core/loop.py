"""The train loop, one for both frameworks: data, schedule, logging, evaluation, checkpoints.

It dispatches step n before it reads the metrics of step n - 1, and reads those only at log ticks: between ticks nothing
waits for the device.
"""

import math
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

from minillm_core.backend import Backend, EvalStep, State
from minillm_core.checkpoints import CheckpointInfo, CheckpointWriter, checkpoint_steps, read_info, verify_checkpoint
from minillm_core.cli import print_stream, say
from minillm_core.config import RunConfig, TrainConfig
from minillm_core.data import PreparedData, prepare_data
from minillm_core.errors import InputError
from minillm_core.metrics import MetricsLog, bits_per_byte, perplexity, plot_loss, read_metrics
from minillm_core.params import count_params
from minillm_core.rundir import open_run
from minillm_core.schedule import learning_rate
from minillm_core.tokenizer import Tokenizer

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
    """Prepares the data if needed and trains from the newest checkpoint, or from the initial weights, to the end.

    Returns:
        the final checkpoint.

    Raises:
        InputError: the data or the run directory do not belong to this configuration, or the loss is not finite.
    """
    if prepare_data(config.data, config.model.vocab_size):
        say(f"prepared {config.data.corpus} in {config.data.dir}")
    else:
        say(f"found prepared data in {config.data.dir}")
    data = PreparedData(config.data.dir, config.model.vocab_size)
    run_dir = Path(config.train.out_dir)
    open_run(run_dir, config, data.tokenizer.path)
    folder = run_dir / backend.FRAMEWORK
    checkpoints = folder / "checkpoints"

    state, start = initial_or_newest(config, backend, data, checkpoints)
    final = checkpoints / str(config.train.steps)
    if start == config.train.steps:
        say(f"found the finished run in {folder}: {start} of {config.train.steps} steps done")
        _report(read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else [])
        return final
    _run_steps(config, backend, data, state, start, folder)
    return final


def initial_or_newest(config: RunConfig, backend: Backend, data: PreparedData, checkpoints: Path) -> tuple[State, int]:
    """The state to go on from, and its step: the newest checkpoint, or the initial weights.

    Raises:
        InputError: the newest checkpoint is damaged, or was trained on other data.
    """
    steps = checkpoint_steps(checkpoints)
    if not steps:
        return backend.init_state(config), 0
    newest = checkpoints / str(steps[-1])
    verify_checkpoint(newest)
    info = read_info(newest)
    if info.data_hashes != data.hashes():
        raise InputError(
            "the checkpoint was trained on other data",
            expected=info.data_hashes,
            found=data.hashes(),
            where=f"{newest} and {data.dir}",
            do="use the data of that run, or another --train.out_dir",
        )
    if info.step < config.train.steps:
        say(f"resuming from {newest}")
    saved = backend.read_payload(newest, config, moments=True)
    return backend.import_state(config, saved, info.step), info.step


def _run_steps(config: RunConfig, backend: Backend, data: PreparedData, state: State, start: int, folder: Path) -> None:
    c = config.train
    train_step = backend.make_train_step(config)
    log = MetricsLog(folder / "metrics.jsonl", start)
    writer = CheckpointWriter(folder / "checkpoints")
    progress = _Progress(config, start)
    say(
        f"training {count_params(config.model):,} parameters for {c.steps - start} steps "
        f"of {c.batch_size} x {c.seq_len} tokens, {backend.resolve_dtype(c.compute_dtype)}, {backend.describe_device()}"
    )
    unread: deque[tuple[int, float, dict[str, Any]]] = deque()

    def read_metrics_until(n_left: int) -> None:
        while len(unread) > n_left:
            step, rate, metrics = unread.popleft()
            loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                writer.wait()
                raise InputError(
                    f"step {step}: the loss or the gradient is not finite",
                    found=f"loss {loss}, gradient norm {grad_norm}, learning rate {rate:.3e}",
                    where=f"last checkpoint: {checkpoint_steps(folder / 'checkpoints')[-1:] or 'none'}",
                    do="lower optim.learning_rate or raise optim.warmup_steps, and give another --train.out_dir",
                )
            speed = progress.tick(step, loss, grad_norm, rate)
            log.write(step, "train", loss, grad_norm=grad_norm, learning_rate=rate, tokens_per_second=round(speed, 1))

    def evaluate_now(step: int) -> None:
        if step == c.steps:
            say(f"evaluating on the whole held-out text, {len(data.tokens['val']):,} tokens")
        eval_step = backend.make_eval_step(backend.model_of(config, state))
        loss = evaluate(eval_step, data, "val", c, None if step == c.steps else c.eval_batches)
        compression = bits_per_byte(loss, data.tokens_per_byte("val"))
        row = {"bits_per_byte": compression, "perplexity": perplexity(loss)}
        log.write(step, "val", loss, **row)
        _report([{"step": step, "split": "val", "loss": loss, **row}])
        plot_loss(log.path, folder / "loss.png")

    try:
        for n in range(start, c.steps):
            rate = learning_rate(config.optim, n, c.steps)
            state, metrics = train_step(state, data.batch(n, c.batch_size, c.seq_len, c.seed), rate)
            step = n + 1
            evaluates, saves = (step == c.steps or step % every == 0 for every in (c.eval_every, c.checkpoint_every))
            if step == 1 or step % c.log_every == 0 or evaluates or saves:
                unread.append((step, rate, metrics))
            # The step just dispatched is read after the next one, unless something hangs on it: no state is evaluated
            # or saved whose loss and gradient were not seen to be finite.
            read_metrics_until(0 if evaluates or saves or (unread and unread[-1][0] != step) else 1)
            with progress.paused():
                # Evaluation first: a committed checkpoint then has all its metrics, also after a crash.
                if evaluates:
                    evaluate_now(step)
                if saves:
                    info = CheckpointInfo(backend.FRAMEWORK, step, config, data.hashes())
                    start_payload = partial(backend.start_payload, config=config, state=state)
                    writer.save(info, data.tokenizer.path, start_payload)
    finally:
        writer.wait()
    say(f"saved {folder / 'checkpoints' / str(c.steps)}")


def evaluate(
    eval_step: EvalStep, data: PreparedData, split: str, config: TrainConfig, n_batches: int | None = None
) -> float:
    """Mean loss in nats per token over a whole split, or over `n_batches` micro-batches spread evenly over it."""
    sums, n_targets = [], 0.0
    for window in data.windows(split, config.batch_size // config.grad_accum, config.seq_len, n_batches):
        sums.append(eval_step(window.tokens, window.mask))
        n_targets += float(window.mask.sum())
    return math.fsum(float(value) for value in sums) / n_targets


def _report(rows: list[dict[str, Any]]) -> None:
    """Says the newest held-out result."""
    for row in [row for row in rows if row["split"] == "val"][-1:]:
        say(
            f"step {row['step']:>6}  held out: loss {row['loss']:.4f}  perplexity {row['perplexity']:.2f}  "
            f"{row['bits_per_byte']:.4f} bits per byte"
        )


class _Progress:
    """Rate and time left, the evaluations' and checkpoints' time not counted in the rate."""

    def __init__(self, config: RunConfig, start: int):
        self.steps = config.train.steps
        self.tokens_per_step = config.train.batch_size * config.train.seq_len
        self.last_step, self.last_time = start, time.perf_counter()

    def tick(self, step: int, loss: float, grad_norm: float, rate: float) -> float:
        """Prints a line; returns tokens per second since the last one."""
        now = time.perf_counter()
        seconds_per_step = (now - self.last_time) / max(1, step - self.last_step)
        speed = self.tokens_per_step / seconds_per_step
        left = int(seconds_per_step * (self.steps - step))
        self.last_step, self.last_time = step, now
        say(
            f"step {step:>6}/{self.steps}  loss {loss:.4f}  gradient norm {grad_norm:.2f}  learning rate {rate:.2e}  "
            f"{speed:,.0f} token/s  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        return speed

    def paused(self) -> "_Progress":
        return self

    def __enter__(self) -> None:
        self._paused_at = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.last_time += time.perf_counter() - self._paused_at
