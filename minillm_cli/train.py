"""Trains a model, from raw text to a sample of what it has learnt."""

import contextlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minillm_cli.backends import load_backend
from minillm_cli.console import command_line, parse_run_config, print_stream, say
from minillm_core.config import RunConfig
from minillm_core.data.marks import COUNTED
from minillm_core.data.mixture import Mixture
from minillm_core.data.prepared import PreparedData
from minillm_core.data.run_data import open_data
from minillm_core.errors import InputError
from minillm_core.interop.initial import with_initial_checkpoint
from minillm_core.text.chat_template import ChatTemplate
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.backend import Backend
from minillm_core.training.checkpoints import read_info
from minillm_core.training.train import train

SAMPLE_PROMPT = "The state of the Union is"
SAMPLE_TOKENS = 10


@dataclass(frozen=True)
class TrainCommand(RunConfig):
    """A run, and the framework that trains it."""

    backend: Literal["jax", "torch"] = "jax"
    """The framework to train in."""


def main() -> None:
    command = parse_run_config(__doc__, TrainCommand)
    train_and_sample(RunConfig(command.model, command.optim, command.data, command.train), command.backend)


def main_in(framework: str) -> None:
    """The command for one framework, without the option `--backend`."""
    train_and_sample(parse_run_config(__doc__, RunConfig), framework)


def train_and_sample(config: RunConfig, framework: str) -> None:
    """Trains, then prints a sample to stdout and the next commands to stderr."""
    backend = load_backend(framework)
    checkpoint = train(with_initial_checkpoint(config, backend), backend)
    data = open_data(config.data, read_info(checkpoint).config.model.vocab_size)
    prompt = sample_question(data) if data.is_chat else sample_prompt(data)
    print_sample(checkpoint, backend, prompt)
    run, other = config.train.out_dir, "torch" if framework == "jax" else "jax"
    say("\nnext:")
    commands: list[tuple[str, ...]] = [("chat", run, "--backend", framework)]
    if isinstance(prompt, str):
        commands = [("generate", run, "--backend", framework, "--prompt", prompt)]
    commands.append(("evaluate", run, "--backend", framework))
    if importlib.util.find_spec(other):
        commands.append(("convert", f"{framework}->{other}", run))
    for command in commands:
        say(f"  {command_line(command)}")


def sample_question(data: PreparedData | Mixture) -> list[int]:
    """What the sample answers: the first held-out conversation, up to its first reply."""
    folder = next(folder for folder in _folders(data) if folder.is_chat)
    n = next(at for at in range(folder.n_tokens("val")) if folder.marks["val"][at] & COUNTED)
    ids: list[int] = folder.tokens["val"][:n].tolist()
    return ids


def _folders(data: PreparedData | Mixture) -> list[PreparedData]:
    return [*data.parts.values()] if isinstance(data, Mixture) else [data]


def sample_prompt(data: PreparedData | Mixture) -> str:
    """What the sample continues: usual words for the default corpus, or the beginning of the held-out text."""
    folder = _folders(data)[0]
    if folder.index.get("corpus") == "sotu":
        return SAMPLE_PROMPT
    with contextlib.suppress(InputError):  # the token files of another project may come without a tokenizer
        tokenizer = load_tokenizer(folder.dir, folder.vocab_size)
        ids = [token for token in folder.tokens["val"][:SAMPLE_TOKENS].tolist() if token != tokenizer.bos_id]
        return tokenizer.decode(ids).strip() or SAMPLE_PROMPT
    return SAMPLE_PROMPT


def print_sample(checkpoint: Path, backend: Backend, prompt: str | list[int]) -> None:
    """
    Args:
        prompt: a text, or the tokens of a conversation.
    """
    say("\na sample of the trained model (temperature 0.8, top-p 0.95; greedy decoding would repeat itself):\n")
    model = backend.load(checkpoint)
    try:
        tokenizer = load_tokenizer(checkpoint, model.config.vocab_size)
    except InputError as error:  # the token files of another project may come without
        say(f"(no sample: {str(error).splitlines()[0]})")
        return
    generator = backend.Generator(model, tokenizer)
    if isinstance(prompt, str):
        n_prompt, shown, stop = len(tokenizer.encode(prompt, bos=True)), prompt, list[int]()
    else:
        prompt = prompt[-(model.config.context_length // 2) :]
        n_prompt, shown, stop = len(prompt), tokenizer.decode(prompt), sorted(ChatTemplate.of(tokenizer).stop_ids)
    n_new = min(120, model.config.context_length - n_prompt)
    print_stream(shown, generator.stream(prompt, max_new_tokens=n_new, temperature=0.8, top_p=0.95, stop=stop))
