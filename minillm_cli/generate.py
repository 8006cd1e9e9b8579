"""Continues a prompt, or every prompt of a file, from any checkpoint of either framework."""

import shlex
from functools import partial
from typing import Annotated, Any, Literal

import tyro

from minillm_cli.backends import load_backend
from minillm_cli.console import parse, print_stream
from minillm_core.decoding.prompts import continue_file
from minillm_core.errors import InputError
from minillm_core.files import hash_file, output_file, user_path
from minillm_core.text.chat_template import ChatTemplate
from minillm_core.text.tokenizer_json import load_tokenizer
from minillm_core.training.checkpoints import find_checkpoint


def main() -> None:
    parse(generate)


def generate(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[RUN]")]] = "runs/quickstart",
    backend: Literal["jax", "torch"] = "jax",
    prompt: str = "The state of the Union is",
    prompts: str | None = None,
    output: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    n: int = 1,
    stop: tuple[str, ...] = (),
    stop_ids: tuple[int, ...] = (),
    truncate: bool = False,
    logprobs: bool = False,
    chat: bool = False,
    system: str = "",
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    compile: bool = False,
) -> None:
    """Continues a prompt until the end of the document, a stop, or max_new_tokens, and prints the text to stdout as it
    is generated. The same options and seed give the same text in both frameworks.

    With --prompts and --output, continues every prompt of a file, in batches of similar length, and writes one JSON
    object per line, in the order of the prompts. If the command is stopped, the same command continues.

    Args:
        path: a run, a run's framework folder, or one checkpoint.
        backend: the framework that runs the model.
        prompt: the text to continue.
        prompts: a file with one prompt per line or, if its name ends in .jsonl, one object with a "prompt" per line.
        output: the file for the continuations of these prompts (JSON lines); it must not exist yet.
        batch_size: number of prompts of the file to continue at a time.
        max_new_tokens: maximum number of tokens to add.
        temperature: 0 takes the most likely token; 1 leaves the distribution as it is.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this total probability.
        min_p: keep the tokens at least this many times as likely as the most likely one; 0 keeps all.
        repetition_penalty: above 1, tokens that already occur become less likely.
        seed: seed of the sampling.
        n: number of continuations of every prompt of the file.
        stop: texts that end a continuation.
        stop_ids: token ids that end a continuation.
        truncate: drop the beginning of a prompt that does not fit, instead of refusing it.
        logprobs: add every token and its log-probability to the output file.
        chat: send each prompt as a user's message in the chat format of the model, and print only the reply. An object
            of a .jsonl file may have "messages" (objects with "role" and "content") instead of a "prompt".
        system: the system message before these messages.
        dtype: dtype of the parameters and the computation.
        compile: compile torch's decoding step with torch.compile (takes minutes at first, then decodes faster).
    """
    if (prompts is None) != (output is None):
        missing = "--output FILE.jsonl" if output is None else "--prompts FILE"
        raise InputError("--prompts and --output need each other", expected=missing, hint=f"add {missing}")
    if prompts == "-":
        raise InputError("not a file of prompts", found="-", hint="to read standard input: --prompts /dev/stdin")
    answers = None if output is None else output_file(output)
    if prompts is None and (n != 1 or logprobs):
        raise InputError("--n and --logprobs need a file to write to", hint="give --prompts FILE --output FILE.jsonl")
    if system and not chat:
        raise InputError("--system is for the chat format", hint="add --chat")
    if chat and truncate:
        raise InputError("--truncate would cut the beginning of the chat format", hint="omit --truncate")
    if compile and backend == "jax":
        raise InputError("--compile is for torch; JAX always compiles", hint="omit --compile, or add --backend torch")
    if " " in path and not user_path(path).exists():
        raise InputError("no such run", found=repr(path), hint=f"did you mean --prompt {shlex.quote(path)}?")
    framework = load_backend(backend, decoding=True)
    checkpoint = find_checkpoint(path, backend)
    extra = {"compile": True} if compile else {}
    model = framework.load(checkpoint, dtype)
    generator = framework.Generator(model, load_tokenizer(checkpoint, model.config.vocab_size), **extra)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": (*stop, *stop_ids),
        "truncate": truncate,
    }
    template = ChatTemplate.of(generator.tokenizer) if chat else None
    encode = partial(template.prompt, system=system) if template else None
    if template is not None:
        options["stop"] = (*stop, *sorted(template.stop_ids.union(stop_ids)))
    if prompts is None or answers is None:
        print_stream("" if encode else prompt, generator.stream(encode(prompt) if encode else prompt, **options))
    else:
        hashes = hash_file(checkpoint / "manifest.json")  # it holds the hashes of all files of the checkpoint
        setup: dict[str, Any] = {"checkpoint": str(checkpoint), "hashes": hashes, "backend": backend, "dtype": dtype}
        options |= {"n": n, "logprobs": logprobs}
        setup |= {"chat": chat, "system": system} if chat else {}
        continue_file(generator, user_path(prompts), answers, batch_size, setup, options, encode)
