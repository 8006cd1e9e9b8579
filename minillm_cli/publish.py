"""Publishes a checkpoint: evaluates it, writes a Hugging Face repository folder, and uploads it."""

from typing import Annotated, Literal

import tyro

from minillm_cli.console import parse, say
from minillm_cli.process import let_threads_sleep
from minillm_core.interop.hub import upload_command
from minillm_core.interop.publish import publish


def main() -> None:
    parse(publish_run)


def publish_run(
    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[RUN]")]] = "runs/quickstart",
    folder: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[FOLDER]")]] = None,
    repo: str | None = None,
    private: bool = False,
    backend: Literal["jax", "torch"] = "jax",
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
    split: Literal["val", "train"] = "val",
    data_dir: str | None = None,
    seq_len: int | None = None,
    evaluate: bool = True,
) -> None:
    """Evaluates a checkpoint on its whole held-out text and writes it as the folder of a Hugging Face repository:
    weights, tokenizer, and a model card with the loss curve and the evaluation. With --repo, uploads the folder in one
    commit.

    The model card contains the configuration of the run and names no licence: read it, and add the licence of your
    choice (`license: mit`, for example) to the first lines of README.md.

    Args:
        path: a run, a run's framework folder, or one checkpoint.
        folder: the folder to write; it must not exist (default: published-BACKEND in the run).
        repo: the repository OWNER/NAME on the Hub to upload to; it is created if it does not exist.
        private: create a private repository.
        backend: the framework of the checkpoint.
        dtype: dtype of the published weights.
        split: the prepared split to evaluate.
        data_dir: a folder of prepared data. Default: the data that the run was trained on.
        seq_len: tokens per window of the evaluation; each window starts without context. Default: the run's seq_len.
        evaluate: --no-evaluate leaves out the evaluation.
    """
    let_threads_sleep()
    done = publish(
        path,
        folder,
        backend=backend,
        repo=repo,
        private=private,
        dtype=dtype,
        split=split,
        data_dir=data_dir,
        seq_len=seq_len,
        evaluate=evaluate,
    )
    place = done.folder / "README.md" if repo is None else f"the README.md of {repo}"
    say(f"the model card names no licence: add one to {place}")
    if done.commit_url is None:
        say(f"next: {upload_command(done.folder, 'OWNER/NAME')}")
    print(done.commit_url or done.folder)
