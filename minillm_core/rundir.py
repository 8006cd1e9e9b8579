"""The run directory: `runs/<name>/` with config.yaml, tokenizer.model, and a folder for each framework."""

import shutil
from pathlib import Path

from minillm_core.config import RunConfig, config_differences, dump_config, load_config
from minillm_core.errors import InputError


def open_run(run: Path, config: RunConfig, tokenizer: Path) -> None:
    """Creates the run directory, or checks that it is this run's.

    Raises:
        InputError: it belongs to a run of another configuration (every differing field named) or tokenizer, or to no
            run at all.
    """
    saved, saved_tokenizer = run / "config.yaml", run / "tokenizer.model"
    if saved.exists():
        differences = config_differences(config, load_config(str(saved)))
        if differences:
            raise InputError(
                "the run directory belongs to another configuration:\n  " + "\n  ".join(differences),
                where=run,
                do="use that run's configuration, or another run directory (--train.out_dir)",
            )
    elif run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError("not empty and not a run directory", expected="config.yaml in it", where=run)
    run.mkdir(parents=True, exist_ok=True)
    if saved_tokenizer.exists() and saved_tokenizer.read_bytes() != tokenizer.read_bytes():
        raise InputError(
            "the run has another tokenizer",
            where=f"{saved_tokenizer} and {tokenizer}",
            do="use the data of that run, or another run directory (--train.out_dir)",
        )
    if not saved.exists():
        saved.write_text(dump_config(config))
    if not saved_tokenizer.exists():
        shutil.copyfile(tokenizer, saved_tokenizer)
