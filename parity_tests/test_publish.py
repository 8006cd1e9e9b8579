"""Publishing a run: the folder, its model card, and its upload by the real client to a server on this machine."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

import minillm_core
from minillm_core.config import DataConfig
from minillm_core.errors import InputError
from minillm_core.interop.hub import check_repo
from minillm_core.interop.imports import import_checkpoint
from minillm_core.training.checkpoints import find_checkpoint
from minillm_core.training.metrics import read_metrics
from minillm_core.training.train import train
from parity_tests.commands import environment, fails, succeeds_here
from parity_tests.conftest import BACKENDS, TINY, run_config, state_at, text_run
from parity_tests.hub_uploads import Uploads, served_uploads
from parity_tests.test_hub import Hub, served

pytestmark = pytest.mark.extended

STEPS = 8


@pytest.fixture(scope="module")
def run(data_config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with a loss curve."""
    folder = tmp_path_factory.mktemp("published") / "my run"
    for name, backend in BACKENDS.items():
        train(text_run(data_config, folder, steps=STEPS, eval_every=4, checkpoint_every=STEPS), backend)
        (folder / name / "loss.png").write_bytes(b"\x89PNG")
    return folder


@pytest.mark.parametrize("framework", BACKENDS)
def test_the_folder(framework: str, run: Path, data_config: DataConfig, tmp_path: Path) -> None:
    """Weights, tokenizer, loss curve; a card that the Hub's parser reads, with the numbers of `evaluate`."""
    options = ("--backend", framework)
    done = succeeds_here("publish", str(run), "out", *options, cwd=tmp_path)
    assert done.stdout == "out\n"
    assert "\nnext: hf upload OWNER/NAME out .\n" in done.stderr
    assert "names no licence" in done.stderr
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors"),
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    }
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert tensor.tobytes() == state_at(run, framework, STEPS).weights[name].tobytes()
    evaluated = succeeds_here("evaluate", str(run), *options, cwd=tmp_path).stdout
    printed = {line.split()[0]: float(line.split()[1]) for line in evaluated.splitlines()}
    card = ModelCard.load(folder / "README.md")
    assert card.data.license is None
    assert card.data.model_name == "my run"
    found = {result.metric_type: result for result in card.data.eval_results}
    assert found.keys() == printed.keys()
    for name, result in found.items():
        assert result.metric_value == pytest.approx(printed[name], rel=1e-5)
        assert result.dataset_split == "val"
        assert result.dataset_args["seq_len"] == 32
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, re.MULTILINE))
    assert float(rows["bits per byte"]) == pytest.approx(printed["bits_per_byte"], rel=1e-5)
    n_tokens = minillm_core.PreparedData(data_config.dir, None).n_tokens("val")
    assert rows["predicted tokens"] == f"{n_tokens - 1:,}"
    last = read_metrics(run / framework / "metrics.jsonl")[-1]
    assert printed["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert f"Trained on {STEPS * 4 * 32:,} tokens of `{Path(data_config.corpus).name}`" in card.text
    assert "![loss curve](loss.png)" in card.text


def test_options(run: Path, tmp_path: Path) -> None:
    """16-bit weights, a different split and window, no loss curve, no evaluation; the folder's default place."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "torch" / "loss.png").unlink()
    options = {"backend": "torch", "split": "train", "seq_len": 16, "dtype": "bfloat16"}
    done = minillm_core.publish(copy, **options)
    assert done.folder == copy / "published-torch"
    assert done.commit_url is None
    card = (done.folder / "README.md").read_text()
    assert "loss.png" not in card
    assert "before they were rounded to bfloat16" in card
    assert "| tokens per window (`seq_len`) | 16 |" in card
    assert (done.folder / "model.safetensors").stat().st_size < 0.6 * 4 * 71_000
    done = minillm_core.publish(copy, tmp_path / "plain", backend="torch", evaluate=False)
    assert done.evaluation is None
    plain = ModelCard.load(tmp_path / "plain" / "README.md")
    assert plain.data.eval_results is None
    assert "## Evaluation" not in plain.text


def test_an_imported_model(run: Path, data_config: DataConfig, tmp_path: Path, caplog: Any) -> None:
    """It has no data: it is published without an evaluation and a message says so, or evaluated on a given folder."""
    source = minillm_core.publish(run, tmp_path / "hf", backend="torch", evaluate=False).folder
    for extra in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (source / extra).unlink()
    checkpoint = import_checkpoint("hf", source, tmp_path / "imported", BACKENDS["torch"])
    data = replace(data_config, dir=str(tmp_path / "data"))
    minillm_core.prepare_data(data, TINY.vocab_size, tokenizer=checkpoint)
    done = minillm_core.publish(tmp_path / "imported", tmp_path / "without", backend="torch")
    assert done.evaluation is None
    assert "imported, so it has no held-out text" in caplog.text
    options = {"backend": "torch", "data_dir": data.dir, "seq_len": 32}
    done = minillm_core.publish(tmp_path / "imported", tmp_path / "with", **options)
    last = read_metrics(run / "torch" / "metrics.jsonl")[-1]
    assert done.evaluation is not None
    assert done.evaluation.loss.mean == pytest.approx(last["loss"], rel=1e-5)


def test_a_mixture(data_config: DataConfig, tmp_path: Path) -> None:
    """It is evaluated, and the card names its folders; no path of this machine is in the card."""
    for name in "ab":
        shutil.copytree(data_config.dir, tmp_path / "data" / name)
    corpus = "/home/somebody/secret/mails"
    data = DataConfig(corpus, str(tmp_path / "data"), mixture={"a": 0.5, "b": 0.5}, document_mask=True)
    train(run_config(TINY, tmp_path / "run", data=data, steps=2, eval_every=2), BACKENDS["torch"])
    done = minillm_core.publish(tmp_path / "run", tmp_path / "out", backend="torch")
    assert done.evaluation is not None
    assert done.evaluation.loss.parts.keys() == {"a", "b"}
    plain = minillm_core.publish(tmp_path / "run", tmp_path / "plain", backend="torch", evaluate=False)
    for folder in (done.folder, plain.folder):
        card = (folder / "README.md").read_text()
        assert "tokens of `a, b`" in card
        assert "secret" not in card
        assert str(tmp_path) not in card
    assert "except the first of each document is predicted once" in (done.folder / "README.md").read_text()


@pytest.mark.parametrize(
    "repo", ["name", "a/b/c", "/b", "a/", "a/b.git", "a/b c", "a/b--c", "https://x.co/a/b", "a/-b"]
)
def test_names_of_repositories(repo: str) -> None:
    for good in ("owner/name", "O-w_1/n.a-m_e2"):
        check_repo(good)
    with pytest.raises(InputError, match="expected: OWNER/NAME"):
        check_repo(repo)


def test_bad_input(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written, and nothing is lost."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("minillm_core.interop.publish.export_hf", lambda *_, **__: pytest.fail("written"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("mine")
    mine = (str(run), "out", "--backend", "torch")
    fails("the destination exists.*hf upload a/b full \\.", "publish", str(run), "full", "--repo", "a/b", cwd=tmp_path)
    fails("the destination exists.*give a different name", "publish", str(run), "full", cwd=tmp_path)
    fails("no jax checkpoint.*no complete checkpoint", "publish", "none", "out", cwd=tmp_path)
    fails("not the name of a repository.*OWNER/NAME", "publish", *mine, "--repo", "name", cwd=tmp_path)
    fails("private repository without a name", "publish", *mine, "--private", cwd=tmp_path)
    fails("no token.*hf auth login.*HF_TOKEN", "publish", *mine, "--repo", "a/b", cwd=tmp_path)
    said = fails("cannot be written.*found: a file", "publish", str(run), "full/config.json/x", cwd=tmp_path)
    assert "evaluating" not in said
    message = "cannot be evaluated: not a folder of prepared data.*--no-evaluate"
    fails(message, "publish", *mine, "--data-dir", "none", cwd=tmp_path)
    fails("cannot be evaluated: seq_len is out of range", "publish", *mine, "--seq-len", "9999", cwd=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("switched off.*HF_HUB_OFFLINE=1", "publish", *mine, "--repo", "a/b", cwd=tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails("`huggingface_hub` is not installed.*\\[hf\\]", "publish", *mine, "--repo", "a/b", cwd=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "config.json"]
    assert (tmp_path / "full" / "config.json").read_text() == "mine"
    with pytest.raises(InputError, match="unknown dtype"):
        minillm_core.publish(run, tmp_path / "out", backend="torch", dtype="q8_0")


def test_a_damaged_checkpoint_is_not_evaluated(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = find_checkpoint(copy, "torch") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match=r"content changed: model\.safetensors"):
        minillm_core.publish(copy, tmp_path / "out", backend="torch")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def uploads() -> Iterator[str]:
    with served_uploads() as address:
        yield address


def variables(address: str, home: Path, token: str = "good") -> dict[str, str]:
    hub = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {name: value for name, value in environment().items() if name != "HF_HUB_OFFLINE"} | hub


def publishes(
    run: Path, address: str, cwd: Path, *options: str, token: str = "good"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minillm_cli", "publish", str(run), "out", "--backend", "torch", "--repo", "o/n"]
    return subprocess.run(
        [*command, *options],
        cwd=cwd,
        env=variables(address, cwd / "home", token),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_upload(uploads: str, run: Path, tmp_path: Path) -> None:
    """One commit brings the folder, byte for byte. A second upload replaces it, and deletes weights and tokenizer files
    of an earlier model; other files stay."""
    done = publishes(run, uploads, tmp_path, "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{uploads}/o/n/commit/{1:040}\n"
    assert Uploads.files == content_of(tmp_path / "out")
    assert Uploads.private
    assert "from_pretrained('o/n')" in Uploads.files["README.md"].decode()
    assert len(Uploads.commits) == 1
    shutil.rmtree(tmp_path / "out")
    kept = {"notes.md": b"mine", "images/model.safetensors": b"mine"}
    stale = {"model-00001-of-00002.safetensors": b"old", "special_tokens_map.json": b"old"}
    stale |= {"adapter_config.json": b"{}", "adapter_model.safetensors": b"old"}  # would load a different model
    Uploads.files |= kept | stale | {"README.md": b"old", ".gitattributes": b"x"}
    done = publishes(run, uploads, tmp_path, "--private")
    assert done.returncode == 0, done.stderr
    assert Uploads.files == content_of(tmp_path / "out") | kept | {".gitattributes": b"x"}
    assert len(Uploads.commits) == 2
    assert (
        "adapter_model.safetensors, model-00001-of-00002.safetensors, special_tokens_map.json; kept: images/"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ({"/api/repos/create": 403, "/api/models/o/n": 404}, "the Hub refuses the upload.*found: .*403 Forbidden"),
        ({"/api/validate-yaml": 400}, "the upload failed"),
        ({"/blobs/": 403}, "the Hub refuses the upload"),
        ({"/api/models/o/n/commit": 400}, "the upload failed.*BadRequestError"),
    ],
)
def test_a_refused_upload(refused: dict[str, int], message: str, uploads: str, run: Path, tmp_path: Path) -> None:
    """Nothing is committed. The folder is complete, and the command in the message uploads it."""
    Uploads.refused = refused
    done = publishes(run, uploads, tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    message = f"{message}.*where: out\n.*(hf upload o/n out \\.)\n"
    found = re.search(message, done.stderr, re.DOTALL)
    assert found, done.stderr
    assert Uploads.files == {}
    Uploads.refused = {}
    if "/blobs/" in refused:
        command = [os.path.join(os.path.dirname(sys.executable), "hf"), *shlex.split(found[1])[1:]]
        subprocess.run(
            command, cwd=tmp_path, env=variables(uploads, tmp_path / "home"), check=True, capture_output=True
        )
        assert Uploads.files == content_of(tmp_path / "out")


def test_a_refused_token(uploads: str, run: Path, tmp_path: Path) -> None:
    done = publishes(run, uploads, tmp_path, token="bad")
    assert done.returncode == 2
    message = "the Hub refuses the token.*HF_TOKEN .*is invalid.*hf auth login"
    assert re.search(message, done.stderr, re.DOTALL), done.stderr
    assert "evaluating" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not Uploads.exists


def test_a_public_repository_is_not_used_as_a_private_one(uploads: str, run: Path, tmp_path: Path) -> None:
    Uploads.exists = True
    done = publishes(run, uploads, tmp_path, "--private")
    assert done.returncode == 2
    assert re.search("exists and is public.*expected: a private repository", done.stderr, re.DOTALL), done.stderr
    assert Uploads.blobs == {}
    assert (tmp_path / "out" / "README.md").is_file()


def test_no_network(uploads: str, run: Path, tmp_path: Path) -> None:
    with served(Hub) as address:
        pass  # nobody listens there any more
    done = publishes(run, address, tmp_path)
    assert done.returncode == 2
    assert "the Hub cannot be asked about the token now: ConnectError" in done.stderr
    assert re.search("the upload failed; the folder is complete.*hf upload o/n out \\.", done.stderr, re.DOTALL)
    assert content_of(tmp_path / "out").keys() >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


def test_killed_during_the_upload(uploads: str, run: Path, tmp_path: Path) -> None:
    """Nothing is committed, and the folder is complete."""
    Uploads.goes_on.clear()
    command = [sys.executable, "-m", "minillm_cli", "publish", str(run), "out", "--backend", "torch", "--repo", "o/n"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=variables(uploads, tmp_path / "home"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            assert Uploads.reached.wait(60)
        finally:
            process.send_signal(signal.SIGKILL)
            Uploads.goes_on.set()
    assert Uploads.commits == []
    assert Uploads.files == {}
    minillm_core.publish(run, tmp_path / "again", backend="torch", repo=None)
    ours, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(np.array_equal(ours[name], again[name]) for name in again)
    assert content_of(tmp_path / "out").keys() == content_of(tmp_path / "again").keys()
