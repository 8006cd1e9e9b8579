"""Compares the decoding speed of both frameworks and of `transformers`' generate, greedy by default.

All use the same model, prompts and machine. Every engine runs in its own process and waits while the others are timed.
The engines take turns, so that changes in the machine's speed affect all of them. A measured time is a whole call of
`generate`: prefill, all tokens, ids on the host. Compilation happens before.

Needs `pip install -c constraints.txt -e '.[test]'`.
"""

import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import tyro

from minillm_cli.backends import load_backend
from minillm_cli.console import parse, run, say
from minillm_core.config import ModelConfig, load_config
from minillm_core.interop.hf_config import to_hf_config
from minillm_core.model.params import init_params

ENGINES = ("transformers", "jax", "torch")


class NoTokenizer:
    """A stand-in for the tokenizer: this script uses only token ids, and no id ends a text."""

    path = None
    end_ids: frozenset[int] = frozenset()

    def __init__(self, config: ModelConfig):
        self.vocab_size = config.vocab_size

    def fits(self, vocab_size: int) -> bool:
        return True

    def decode_after(self, ids: list[int]) -> str:
        return ""


def prompts_of(config: ModelConfig, batch: int) -> list[list[int]]:
    """One prompt of 32 tokens, or several prompts of 8 to 64 tokens."""
    rng = np.random.default_rng(0)
    lengths = [32] if batch == 1 else np.linspace(8, 64, batch).astype(int).tolist()
    return [rng.integers(4, config.vocab_size, length).tolist() for length in lengths]


def make_engine(engine: str, config: ModelConfig, compile: bool) -> Callable[[int, int, float], None]:
    """A function of (batch, new tokens, temperature) that generates one batch of texts."""
    weights: Any = init_params(config, 0)
    if engine == "transformers":
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        fields = {k: v for k, v in to_hf_config(config, "float32").items() if k not in ("architectures", "model_type")}
        model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
        model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()}, strict=False)
        model.generation_config.eos_token_id = None

        def generate(batch: int, n_tokens: int, temperature: float) -> None:
            prompts = prompts_of(config, batch)
            width = max(map(len, prompts))
            ids, mask = np.zeros((2, batch, width), np.int64)
            for row, prompt in enumerate(prompts):
                ids[row, width - len(prompt) :] = prompt
                mask[row, width - len(prompt) :] = 1
            chosen = (
                {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
            )
            out = model.generate(
                torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                max_new_tokens=n_tokens,
                pad_token_id=0,
                **chosen,
            )
            assert out.shape == (batch, width + n_tokens)

        return generate
    backend = load_backend(engine, decoding=True)
    arguments = {"compile": True} if compile and engine == "torch" else {}
    dtype = importlib.import_module("torch").float32 if engine == "torch" else np.float32
    model = backend.build_model(config, weights, param_dtype=dtype, compute_dtype=dtype)
    generator = backend.Generator(model, NoTokenizer(config), **arguments)

    def generate(batch: int, n_tokens: int, temperature: float) -> None:
        texts = generator.generate(prompts_of(config, batch), max_new_tokens=n_tokens, temperature=temperature)
        assert len(texts) == batch

    return generate


def serve(engine: str, preset: str, tokens: int, compile: bool) -> None:
    """For every line "batch temperature" on stdin, runs one call and prints its seconds."""
    generate = make_engine(engine, load_config(preset).model, compile)
    for line in sys.stdin:
        batch, temperature = int(line.split()[0]), float(line.split()[1])
        started = time.perf_counter()
        generate(batch, tokens, temperature)
        print(time.perf_counter() - started, flush=True)


def main(
    preset: tyro.conf.Positional[str] = "mini-llm-50m",
    tokens: int = 128,
    rounds: int = 5,
    batches: tuple[int, ...] = (1, 16),
    temperature: float = 0.0,
    compile: bool = False,
    engine: Literal["transformers", "jax", "torch"] | None = None,
) -> None:
    """Compares the float32 decoding speed of both frameworks and of `transformers`' generate, greedy by default.

    Args:
        preset: the model's shape; weights are random.
        tokens: new tokens per row.
        rounds: timed calls per engine and batch size, after one warm-up call.
        batches: batch sizes: one row has a prompt of 32 tokens, several rows have prompts of 8 to 64.
        temperature: 0 is greedy; otherwise tokens are sampled with top_p 0.95.
        compile: compile torch's decoding step with torch.compile.
        engine: run only this engine, controlled over stdin and stdout; by default, all engines run and are compared.
    """
    if engine:
        return serve(engine, preset, tokens, compile)
    command = [
        sys.executable,
        __file__,
        preset,
        "--tokens",
        str(tokens),
        *(["--compile"] if compile else []),
        "--engine",
    ]
    processes = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        for name in ENGINES
    }

    def seconds(name: str, batch: int) -> float:
        process = processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{batch} {temperature}\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    print("| engine | batch | token/s, median (range) | times transformers, median of rounds |\n|---|---|---|---|")
    for batch in batches:
        for name in ENGINES:
            say(f"warming up {name}, batch {batch}: {seconds(name, batch):.1f} s")
        times: dict[str, list[float]] = {name: [] for name in ENGINES}
        for _ in range(rounds):
            for name in ENGINES:
                times[name].append(seconds(name, batch))
        for name in ENGINES:
            rates = [batch * tokens / t for t in times[name]]
            ratio = statistics.median(a / b for a, b in zip(times["transformers"], times[name], strict=True))
            print(
                f"| {name} | {batch} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) "
                f"| {ratio:.2f} |"
            )
    for process in processes.values():
        process.communicate()
    return None


if __name__ == "__main__":
    run(lambda: parse(main), as_script=True)
