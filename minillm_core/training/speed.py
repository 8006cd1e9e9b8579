"""Training speed: tokens per second, time left, and MFU (model FLOP utilisation, the share of the device's peak)."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from minillm_core.config import RunConfig
from minillm_core.model.params import training_flops_per_token

logger = logging.getLogger(__name__)

PEAK_FLOPS = {
    "GB200": {"bfloat16": 2500e12},
    "B200": {"bfloat16": 2250e12},
    "H200": {"bfloat16": 989e12, "float32": 67e12},
    "H100 PCIe": {"bfloat16": 756e12, "float32": 51e12},
    "H100": {"bfloat16": 989e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "float32": 19.5e12},
    "L40S": {"bfloat16": 362e12, "float32": 91.6e12},
    "A10": {"bfloat16": 125e12, "float32": 31.2e12},
    "RTX 4090": {"bfloat16": 165e12, "float32": 82.6e12},
}
"""Dense peak of a GPU in FLOP/s, by a part of its name and the dtype of the matrix products (NVIDIA's data sheets)."""


def peak_flops(device: str, dtype: str) -> float | None:
    """Peak FLOP/s of a device, found by its name; None if it is unknown. The table's first match is used."""
    return next((peaks.get(dtype) for name, peaks in PEAK_FLOPS.items() if name in device), None)


class Speed:
    """Training speed and time left. The time that evaluations and checkpoints take is not counted."""

    def __init__(self, config: RunConfig, device: str, start: int):
        c = config.train
        self.steps, self.tokens_per_step = c.steps, c.tokens_per_step
        self.flops_per_token = training_flops_per_token(config.model, c.seq_len)
        self.peak = peak_flops(device, c.compute_dtype)
        self.last_step, self.last_time = start, time.perf_counter()
        self.ticks = 0

    def tick(self, step: int, at: float, loss: float, grad_norm: float, rate: float) -> dict[str, float]:
        """Logs a line. Returns the tokens per second since the previous line and, if the peak is known, MFU.

        Args:
            at: `time.perf_counter()` when the step was dispatched.
        """
        seconds_per_step = (at - self.last_time) / max(1, step - self.last_step)
        values = {"tokens_per_second": round(self.tokens_per_step / seconds_per_step, 1)}
        if self.peak is not None:
            values["mfu"] = round(values["tokens_per_second"] * self.flops_per_token / self.peak, 4)
        left, is_first = int(seconds_per_step * (self.steps - step)), not self.ticks  # the first includes compilation
        self.ticks += 1
        self.last_step, self.last_time = step, at
        logger.info(
            f"step {step:>6}/{self.steps}  loss {loss:.4f}  gradient norm {grad_norm:.2f}  learning rate {rate:.2e}  "
            f"{values['tokens_per_second']:,.0f} token/s  "
            + (f"MFU {values['mfu']:.1%}  " if self.peak is not None else "")
            + ("" if is_first else f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        )
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent in this context is not counted."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.last_time += time.perf_counter() - started
