"""Paths as the operating system resolves them, whatever their characters; and the same files in every locale."""

import codecs
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from minillm_cli import console
from minillm_core.config import DataConfig, to_dict
from minillm_core.data.corpus import list_documents
from minillm_core.errors import InputError
from minillm_core.files import beside, hash_file, replace_file, user_path, written_aside
from minillm_core.interop import convert
from minillm_core.interop.imports import import_checkpoint, open_foreign
from minillm_core.training.checkpoints import (
    CheckpointInfo,
    CheckpointWriter,
    find_checkpoint,
    foreign_kind,
    verify_checkpoint,
)
from minillm_core.training.train import train
from minillm_jax import payload
from parity_tests.conftest import BACKENDS, ROOT, TINY, run_config, text_run, train_until
from parity_tests.test_payload import assert_same_tensors, random_state

# fmt: off
NAMES = [
    "a b", " lead", "trail ", "a%20b", "%", "a?b", "a*b", "[x]", "{c}", "a\\b", "a:b", "file:x", "a|b", "a;b", "a&b=c",
    "a#b", "a$b", "a@b", "a'b", 'a"b', "~x", "-dash", "...", "a.b.zip", ".hidden", "a\nb", "a\tb", "\x01",
    "\u00e4\u65e5\U0001f600", "e\u0301", os.fsdecode(b"\xe9"), "n" * 200, "link/../v", "./w", "x/./y", "x//z",
]
# fmt: on


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with `link`, which leads into a deeper folder: `link/..` is not the folder of the link."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    return tmp_path


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
def test_tensors_are_where_the_path_leads(framework: str, root: Path) -> None:
    backend, config, state = BACKENDS[framework], run_config(TINY), random_state(TINY)
    for name in NAMES:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        backend.write_payload(folder, config, state)
        assert os.listdir(folder), ascii(name)
        found = backend.read_payload(folder, config)
        for ours, theirs in zip(vars(found).values(), vars(state).values(), strict=True):
            assert_same_tensors(ours, theirs)
        if name == "link/../v":
            assert os.listdir(root / "deep/v")
            assert not (root / "v").exists()


@pytest.mark.extended
@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize(
    "place",
    ["../run", ".", "../link/../run", "[a]\\*b \u00e4'", os.fsdecode(b"\xe9")],
    ids=["above", "here", "through a link", "odd characters", "not UTF-8"],
)
def test_a_run_in_any_place(
    framework: str, place: str, data_config: DataConfig, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is stopped, resumed, found again, loaded and converted by the path that it was given."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest-xdist reports only UTF-8
    (root / "here").mkdir()
    monkeypatch.chdir(root / "here")
    backend, other = BACKENDS[framework], next(name for name in BACKENDS if name != framework)

    config = text_run(data_config, Path(place), steps=6, eval_every=6, checkpoint_every=3)
    train_until(config, backend, 2)
    final = train(config, backend)
    assert final == Path(place) / framework / "checkpoints" / "6"
    verify_checkpoint(final)
    assert train(config, backend) == final
    assert backend.load(place).config == TINY
    copy = convert(f"{framework}->{other}", place, None).result
    verify_checkpoint(copy)
    assert BACKENDS[other].load(place).config == TINY
    monkeypatch.chdir(final)
    again = convert(f"{framework}->hf", ".", None).result  # the checkpoint that one stands in
    assert (again / "model.safetensors").is_file()
    assert find_checkpoint(".", framework) == Path.cwd()


def test_a_checkpoint_without_tensors_is_not_committed(tmp_path: Path) -> None:
    """As if a library had written them to a different place."""
    info = CheckpointInfo("jax", 3, 3, run_config(TINY), {})
    with CheckpointWriter(tmp_path) as writer:
        writer.save(info, tmp_path, lambda folder: lambda: None)
        with pytest.raises(InputError, match="written to a different place"):
            writer.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [".", "..", "deep/..", "link", "link/..", "new"])
def test_hidden_neighbours(path: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    place = Path(os.path.realpath(path))
    assert beside(Path(path), "lock") == place.parent / f".{place.name}.lock"
    with pytest.raises(InputError, match="not a usable path"):
        beside(Path("/"), "lock")


@pytest.mark.parametrize("name", ["x.pt", "x.gguf", "x"])
def test_a_folder_is_what_is_in_it(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    assert foreign_kind(folder) is None
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert foreign_kind(folder) == "hf"


@pytest.mark.parametrize("name", ["pipe", "pipe.gguf", "pipe.pt"])
def test_a_pipe_is_refused_where_it_cannot_be_read(name: str, tmp_path: Path) -> None:
    """Nothing waits for a program that writes into it. (Prompts can come from a pipe: test_prompts.py.)"""
    os.mkfifo(tmp_path / name)
    for format in ("hf", "minillm", "gguf"):
        with pytest.raises(InputError, match="no such file or folder"):
            import_checkpoint(format, tmp_path / name, tmp_path / "run", BACKENDS["torch"])
        with pytest.raises(InputError, match="no such file or folder"):
            open_foreign(format, tmp_path / name)
    with pytest.raises(InputError, match="no torch checkpoint"):
        find_checkpoint(tmp_path / name, "torch")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        list_documents(DataConfig(str(tmp_path / name), "unused"))


@pytest.mark.parametrize("n", [240, 250, 255])
def test_a_name_as_long_as_the_system_allows(n: int, tmp_path: Path) -> None:
    folder = tmp_path / ("n" * n)
    with written_aside(folder) as partial:
        partial.mkdir()
        replace_file(partial / ("f" * n), "text")
    assert (folder / ("f" * n)).read_text(encoding="utf-8") == "text"
    assert beside(folder, "lock") != beside(tmp_path / ("m" * n), "lock")


def test_a_linked_file_is_replaced_where_it_is(root: Path) -> None:
    (root / "deep" / "file").write_text("old", encoding="utf-8")
    (root / "name").symlink_to(root / "deep" / "file")
    replace_file(root / "name", "new")
    assert (root / "name").is_symlink()
    assert (root / "deep" / "file").read_text(encoding="utf-8") == "new"
    assert user_path("~/x") == Path.home() / "x"
    assert user_path("./~x") == user_path(Path("~x")) == Path("~x")
    (root / "loop").symlink_to("loop")
    replace_file(root / "loop", "new")
    assert (root / "loop").read_text(encoding="utf-8") == "new"


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
"""A locale in which Python's default encoding cannot express the text."""


@pytest.mark.extended
def test_the_same_files_in_every_locale(corpus: Path, tmp_path: Path) -> None:
    """Prepared data, runs, exports, printed text: the same bytes in UTF-8 and in ASCII."""
    speeches = "".join(path.read_text(encoding="utf-8") for path in sorted(corpus.glob("*.txt")))
    text = speeches.replace(" the ", " th\u00e9 \u65e5\u672c \u20ac ")
    data, run = DataConfig("caf\u00e9.txt", "d\u00e4ta"), "r\u00fcn"
    config = text_run(data, Path(run), steps=5, eval_every=5, checkpoint_every=5)
    hashes, printed = {}, {}
    for name, environment in (("utf-8", {"PYTHONUTF8": "1"}), ("ascii", {})):
        home = tmp_path / name
        home.mkdir()
        (home / "caf\u00e9.txt").write_text(text, encoding="utf-8")
        (home / "run.yaml").write_text(yaml.safe_dump(to_dict(config), allow_unicode=True), encoding="utf-8")

        def command(*arguments: str, home: Path = home, environment: Any = environment) -> bytes:
            full, variables = [sys.executable, "-m", "minillm_cli", *arguments], os.environ | ASCII | environment
            done = subprocess.run(full, cwd=home, env=variables, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout

        command("train", "run.yaml", "--backend", "torch")
        assert command("convert", "torch->jax", run) == f"{run}/jax/checkpoints/5\n".encode()
        command("convert", "torch->hf", run, "hf")
        command("convert", "torch->gguf", run, "x.gguf")
        command("convert", "hf->torch", "hf", "again")
        (home / "prompts.txt").write_text("caf\u00e9\n", encoding="utf-8")
        options = ("again", "--backend", "torch", "--max-new-tokens", "5")
        command("generate", *options, "--prompts", "prompts.txt", "--output", "out.jsonl")
        printed[name] = command("generate", *options, "--prompt", os.fsdecode("caf\u00e9".encode()), "--seed", "3")
        meta = home / data.dir / "index.json"
        meta.write_text(re.sub(r'"corpus_places": "\w+"', "", meta.read_text(encoding="utf-8")), encoding="utf-8")
        hashes[name] = {
            str(path.relative_to(home)): hash_file(path)
            for path in home.rglob("*")
            if path.is_file()
            and path.suffix != ".lock"
            and path.name not in ("metrics.jsonl", "loss.png", ".lock")
            and "jax" not in path.relative_to(home).parts  # Orbax numbers its files at random; torch has the weights
        }
    assert hashes["ascii"] == hashes["utf-8"]
    assert len(hashes["ascii"]) > 20
    assert printed["ascii"] == printed["utf-8"]
    assert printed["ascii"].startswith("caf\u00e9".encode())


def test_paths_of_a_process_with_a_different_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax takes every path as UTF-8: where the system does not, a link stands for it."""
    assert not payload._is_odd("/caf\u00e9")
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("latin-1"))
    assert payload._is_odd("/caf\u00e9")
    assert not payload._is_odd("/cafe")


def test_what_a_stream_cannot_show() -> None:
    """Bytes of a name stay as they are; a question mark stands for other characters."""
    codecs.register_error("minillm", console._what_cannot_be_encoded)
    assert "a\udce9\u65e5\ud800".encode("ascii", "minillm") == b"a\xe9??"
    assert "\u65e5\udce9".encode("utf-8", "minillm") == "\u65e5".encode() + b"\xe9"
