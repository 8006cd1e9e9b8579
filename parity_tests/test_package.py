"""The built wheel, installed outside the checkout: the commands work from any directory."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from minillm_core.config import preset_names
from minillm_core.serving.page import FOLDER
from minillm_core.version import __version__
from minillm_jax.compiled import CARDS
from parity_tests.commands import sampled
from parity_tests.conftest import ROOT
from parity_tests.test_docs import TINY_MODEL

pytestmark = pytest.mark.extended


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as a package index would get it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def minillm(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `minillm` of a virtual environment with the wheel installed.

    A path file adds the dependencies of the current environment, but not the checkout.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel]
    subprocess.run(install, check=True)
    return folder / "bin" / "minillm"


def run(minillm: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"COLUMNS": "200"}
    command = [str(minillm), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def succeeds(minillm: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = run(minillm, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def test_wheel_contents(wheel: Path) -> None:
    """The wheel has the four packages with their type markers, the presets, the cards, the page, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    packages = {"minillm_core", "minillm_jax", "minillm_torch", "minillm_cli"}
    (metadata,) = {name.split("/")[0] for name in names} - packages
    assert metadata == f"minillm_jax_torch-{__version__}.dist-info"
    assert {name for name in names if name.endswith("py.typed")} == {f"{package}/py.typed" for package in packages}
    presets = {Path(name).stem for name in names if re.match(r"minillm_core/configs/.*\.yaml", name)}
    assert presets == {*preset_names()}
    cards = {Path(name).stem for name in names if name.startswith("minillm_jax/compiled/cards/")}
    assert cards == {*CARDS}
    page = {name.rpartition("/")[2] for name in names if name.startswith("minillm_core/serving/playground/")}
    assert page == {file.name for file in FOLDER.iterdir()}
    in_checkout = {str(path.relative_to(ROOT)) for package in packages for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == in_checkout


def test_commands_outside_the_checkout(minillm: Path, corpus: Path, tmp_path: Path) -> None:
    """Train, convert, generate in both frameworks and compare, with presets and code from the wheel."""
    where = "import minillm_core.config as c; print(c.__file__, c.PRESETS_DIR)"
    found = subprocess.check_output([minillm.with_name("python"), "-c", where], cwd=tmp_path, text=True)
    assert str(ROOT) not in found
    assert succeeds(minillm, "--version", cwd=tmp_path).stdout == f"minillm {__version__}\n"
    assert "50,049,408" in succeeds(minillm, "plan", "mini-llm-50m", cwd=tmp_path).stdout
    sizes = ["--data.corpus", str(corpus), "--data.dir", "data", "--data.holdout-every", "5", "--train.steps", "4"]
    sizes += ["--train.batch-size", "4", "--train.seq-len", "16", "--train.out-dir", "run"]
    done = succeeds(minillm, "train", "quickstart", *TINY_MODEL, *sizes, cwd=tmp_path)
    sampled(done)
    assert "minillm convert 'jax->torch' run" in done.stderr, "advice must name this command, not the scripts"
    assert "scripts/" not in done.stderr
    assert succeeds(minillm, "convert", "jax->torch", "run", cwd=tmp_path).stdout == "run/torch/checkpoints/4\n"
    options = ("--prompt", "We the people", "--max-new-tokens", "20", "--seed", "5")
    texts = {
        succeeds(minillm, "generate", "run", "--backend", b, *options, cwd=tmp_path).stdout for b in ("jax", "torch")
    }
    assert len(texts) == 1
    done = succeeds(minillm, "parity", "run/jax", "run/torch", "--tokens", "64", cwd=tmp_path)
    assert "\nEQUAL within" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conver"], "did you mean `minillm convert`?"),
        (["generate", "nothing"], "command: minillm train --backend jax --train.out_dir nothing"),
        (["train", "quickstrat"], "no such configuration: quickstrat"),
    ],
)
def test_bad_input(minillm: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(minillm, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [*tmp_path.iterdir()] == []


def test_help_lists_every_command(minillm: Path, tmp_path: Path) -> None:
    shown = succeeds(minillm, "--help", cwd=tmp_path).stdout
    for command in ("train", "prepare", "generate", "evaluate", "convert", "publish", "parity", "compare-runs", "plan"):
        assert f"\n  {command} " in shown
