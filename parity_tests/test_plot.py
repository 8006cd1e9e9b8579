"""Plots of runs, and the diagram of the architecture."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from minillm_core.config import DataConfig, RunConfig, dump_config, load_config, preset_names
from minillm_core.model.diagram import diagram
from minillm_core.model.params import count_params, forward_flops, param_table
from minillm_core.training.curves import read_curves
from minillm_core.training.train import train
from parity_tests.commands import fails, script_here, succeeds_here
from parity_tests.conftest import BACKENDS, TINY, losses_of, run_config

TIMES = "\u00d7"

pytestmark = pytest.mark.extended


def fake_run(
    run: Path, framework: str = "jax", *, tokenizer: str = "a", batch_size: int = 4, lines: Iterable[str] = ()
) -> Path:
    """A run directory with a log of three steps at 100, 200 and 50 tokens per second; 32 tokens per row."""
    folder = run / framework
    folder.mkdir(parents=True)
    config = run_config(TINY, run, batch_size=batch_size)
    (run / "config.yaml").write_text(dump_config(config))
    (run / "run.json").write_text(json.dumps({"format_version": 1, "data_hashes": {"tokenizer": tokenizer}}))
    rows = [
        {"step": 1, "split": "train", "loss": 6.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 100.0},
        {"step": 2, "split": "train", "loss": 5.0, "learning_rate": 5e-4, "grad_norm": 2.0, "tokens_per_second": 200.0},
        {"step": 2, "split": "val", "loss": 5.5, "perplexity": 244.7},
        {"step": 4, "split": "train", "loss": None, "learning_rate": 1e-4, "grad_norm": 3.0, "tokens_per_second": 50.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in [*map(json.dumps, rows), *lines]))
    return run


def plot(*arguments: str, cwd: Path) -> str:
    done = succeeds_here("plot", *arguments, cwd=cwd)
    assert done.stdout == f"{arguments[-1]}\n"
    return done.stderr


def words(svg: Path) -> list[str]:
    """The words of a picture: labels of axes and legends."""
    return [
        re.sub(r"\s+", " ", text) for text in re.findall(r"<text[^>]*>([^<]+)</text>", svg.read_text(encoding="utf-8"))
    ]


def test_places_on_every_axis(tmp_path: Path) -> None:
    run = read_curves(fake_run(tmp_path / "run") / "jax")
    tokens = 4 * 32
    flops = tokens * 3 * forward_flops(TINY, 1, 32) / 32
    hours = [tokens / 100 / 3600, tokens / 100 / 3600 + tokens / 200 / 3600]
    assert run.points("loss", "train", "step") == [(1, 6.0), (2, 5.0)]  # the third loss is not finite
    assert run.points("loss", "val", "step") == [(2, 5.5)]
    assert run.points("loss", "train", "tokens") == [(tokens, 6.0), (2 * tokens, 5.0)]
    assert run.points("loss", "train", "flops") == [(flops, 6.0), (2 * flops, 5.0)]
    assert run.points("loss", "train", "time") == [(pytest.approx(hours[0]), 6.0), (pytest.approx(hours[1]), 5.0)]
    assert run.points("loss", "val", "time") == [(pytest.approx(hours[1]), 5.5)]
    last = hours[1] + 2 * tokens / 50 / 3600
    assert run.points("grad_norm", "train", "time")[-1] == (pytest.approx(last), 3.0)


def test_a_real_run_in_both_frameworks(data_config: DataConfig, tmp_path: Path) -> None:
    """The drawn points are the logged ones: their heights in the picture are a linear function of the losses."""
    config = run_config(TINY, tmp_path / "run", data=data_config, steps=6, log_every=1, eval_every=3, eval_batches=1)
    for backend in BACKENDS.values():
        train(config, backend)
    assert plot("run", "--y", "loss", "--out", "loss.svg", cwd=tmp_path) == ""
    svg = (tmp_path / "loss.svg").read_text(encoding="utf-8")
    lines = [path for path in re.findall(r'<path d="([^"]+)" clip-path', svg) if path.count("L") == 5]
    assert len(lines) == 2
    losses = {
        name: [
            x
            for x, row in zip(losses_of(tmp_path / "run", name), _rows(tmp_path / "run", name), strict=True)
            if row["split"] == "train"
        ]
        for name in BACKENDS
    }
    for path, values in zip(lines, losses.values(), strict=True):
        heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
        slope = (heights[-1] - heights[0]) / (values[-1] - values[0])
        assert slope < 0
        for height, value in zip(heights, values, strict=True):
            assert height - heights[0] == pytest.approx(slope * (value - values[0]), abs=1e-4)
    shown = words(tmp_path / "loss.svg")
    assert {"step", "loss (nats per token)", "run/jax, train", "run/jax, val", "run/torch, train"} <= {*shown}
    plot("run/torch", "--x", "time", "--out", "four.png", cwd=tmp_path)
    assert (tmp_path / "four.png").read_bytes().startswith(b"\x89PNG")


def _rows(run: Path, framework: str) -> list[dict[str, object]]:
    return read_curves(run / framework).rows


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", tokenizer="b", batch_size=8)
    said = plot("a", "b", "--out", "p.svg", cwd=tmp_path)
    assert "different tokenizers" in said
    assert "(a/jax: 128, b/jax: 256); use `--x tokens`" in said
    fake_run(tmp_path / "$x_1$ 日本", tokenizer="a")
    fake_run(tmp_path / "other" / "c", tokenizer="a")
    plot("$x_1$ 日本", "other/c", "--out", "p.png", cwd=tmp_path)
    assert plot("a", "b", "--x", "tokens", "--y", "grad_norm", "--out", "p.svg", cwd=tmp_path) == ""


def test_damaged_logs(tmp_path: Path) -> None:
    fake_run(tmp_path / "end", lines=['{"step": 5, "split": "tr'])
    assert "skipping what is after line 4" in plot("end", "--out", "p.svg", cwd=tmp_path)
    for number, step in enumerate(("1e400", "-5", '"x"')):
        line = f'{{"step": {step}, "split": "train", "loss": 1.0}}'
        fake_run(tmp_path / str(number), lines=[line])
        assert "skipping what is after line 4" in plot(str(number), "--out", "p.svg", cwd=tmp_path)
    fake_run(tmp_path / "back", lines=['{"step": 2, "split": "train", "loss": 1e308}'])
    (fake_run(tmp_path / "few") / "jax/metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}')
    assert plot("few", "--out", "p.svg", cwd=tmp_path) == ""  # the usual metrics that are there
    assert "do not ascend" in plot("back", "--out", "p.svg", cwd=tmp_path)
    good = '{"step": 6, "split": "train", "loss": 1.0}'
    fake_run(tmp_path / "middle", lines=["\x00\x00", good])
    fails(r"not a metrics row.*metrics\.jsonl:5", "plot", "middle", "--out", "q.svg", cwd=tmp_path)
    fake_run(tmp_path / "slow", lines=[good])
    fails(r"a row has no speed", "plot", "slow", "--x", "time", "--out", "q.svg", cwd=tmp_path)
    (fake_run(tmp_path / "empty") / "jax/metrics.jsonl").write_text("")
    fails(r"the log is empty", "plot", "empty", "--out", "q.svg", cwd=tmp_path)
    assert not (tmp_path / "q.svg").exists()


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"no metrics found.*no such folder", ["nowhere"]),
        (r"no metrics found.*found: none", ["."]),
        (r"a run is given twice.*a/jax and .*a/jax", ["a", "./a/jax"]),
        (r"no such metric.*grad_norm.*found: lose", ["a", "--y", "lose"]),
        (r"can be drawn.*found: bad", ["a", "--y", "bad"]),
        (r"can be drawn.*found: odd", ["a", "--y", "odd"]),
        (r"no metric to draw.*grad_norm", ["a", "--y"]),
        (r"kind of picture.*\.png or \.svg.*found: p\.jpg", ["a", "--out", "p.jpg"]),
        (r"a file of a different kind", ["a", "--out", "taken.svg"]),
        (r"tokens of a step cannot be computed.*no config\.yaml", ["moved/jax", "--x", "tokens"]),
    ],
)
def test_bad_input(message: str, arguments: list[str], tmp_path: Path) -> None:
    fake_run(tmp_path / "a", lines=['{"step": 5, "split": "train", "loss": 1.0, "bad": null, "odd": [1]}'])
    (fake_run(tmp_path / "moved") / "config.yaml").unlink()
    (tmp_path / "taken.svg").write_text("my notes")
    before = sorted(tmp_path.iterdir())
    fails(message, "plot", *arguments, cwd=tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("preset", preset_names())
def test_diagram(preset: str) -> None:
    """Every kind of parameter is drawn with its shape; every tensor has the sizes of the letters in its name."""
    check_diagram(load_config(preset))


def test_diagram_of_unequal_sizes() -> None:
    model = replace(TINY, n_heads=6, n_kv_heads=3, head_dim=10, tie_embeddings=False, sliding_window=7)
    check_diagram(run_config(model, batch_size=4, grad_accum=2, seq_len=33))


def check_diagram(config: RunConfig) -> None:
    model, c = config.model, config.train
    svg = diagram(config)
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert f"{count_params(model):,} parameters" in texts
    assert f"{model.n_layers:,} such block{'s' * (model.n_layers > 1)}" in texts
    drawn = [text for text in texts if re.search(r" = [\d,]+$", text)]
    matrices = {name.split(".")[-2]: spec.shape for name, spec in param_table(model).items() if len(spec.shape) > 1}
    assert sorted(drawn) == sorted(f"{a:,} {TIMES} {b:,} = {a * b:,}" for a, b in matrices.values())
    sizes = {"B": c.batch_size // c.grad_accum, "T": c.seq_len, "D": model.width, "F": model.hidden}
    sizes |= {"N": model.n_heads, "K": model.n_kv_heads, "H": model.resolved_head_dim, "V": model.vocab_size}
    tensors = [re.fullmatch(r"(\w+)_([BTDFNKHV]+) ([\d, \u00d7]+)", text) for text in texts]
    edges = [match for match in tensors if match]
    assert len(edges) == svg.count("marker-end")
    for edge in edges:
        assert edge[3] == f" {TIMES} ".join(f"{sizes[letter]:,}" for letter in edge[2]), edge[0]


def test_diagram_command(tmp_path: Path) -> None:
    done = succeeds_here("plan", "quickstart", "--diagram", "a.svg", cwd=tmp_path)
    assert done.stdout == "a.svg\n"
    assert (tmp_path / "a.svg").read_text() == diagram(load_config("quickstart"))
    assert script_here("plan", "quickstart", "--diagram", "a.svg", cwd=tmp_path).returncode == 0  # replaced
    fails(r"draws one configuration", "plan", "--diagram", "b.svg", cwd=tmp_path)
    fails(r"ends in \.svg", "plan", "quickstart", "--diagram", "a.png", cwd=tmp_path)
    fails(r"give one of them", "plan", "quickstart", "--diagram", "a.svg", "--json", cwd=tmp_path)
    (tmp_path / "notes.svg").write_text("<svg>mine</svg>")
    fails(r"a file of a different kind", "plan", "quickstart", "--diagram", "notes.svg", cwd=tmp_path)
