"""Configuration files: strict reading, lossless writing, and errors that name every problem."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from minillm_core.config import (
    DataConfig,
    ModelConfig,
    RopeScaling,
    config_differences,
    dump_config,
    load_config,
    preset_names,
    to_dict,
)
from minillm_core.errors import InputError
from minillm_core.yaml_text import dump_yaml, load_yaml


@pytest.mark.parametrize("preset", preset_names())
def test_presets_survive_a_round_trip(preset: str, tmp_path: Path) -> None:
    config = load_config(preset)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config


def test_original_settings() -> None:
    config = load_config("mini-llm-50m")
    assert config.model == ModelConfig(
        vocab_size=32_000,
        context_length=2048,
        width=384,
        n_layers=16,
        n_heads=6,
        n_kv_heads=6,
        hidden=1536,
        head_dim=64,
        tie_embeddings=True,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-6,
    )
    assert config.optim.eps == 1e-8
    assert config.train.batch_size * config.train.seq_len == 524_288  # in more micro-batches than the original's 4
    assert (config.train.steps, config.optim.warmup_steps) == (10_000, 1000)
    assert (config.optim.learning_rate, config.optim.min_learning_rate) == (6e-4, 6e-5)
    assert (config.optim.weight_decay, config.optim.beta1, config.optim.beta2, config.optim.grad_clip) == (
        0.1,
        0.9,
        0.95,
        1,
    )


LLAMA = {"vocab_size": 128_256, "context_length": 131_072, "rope_theta": 500_000.0, "norm_eps": 1e-5}
LLAMA_31 = {**LLAMA, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192), "tie_embeddings": False, "head_dim": 128}
PUBLISHED_SHAPES = {  # as in the config.json of meta-llama/Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B
    "llama-1b": ModelConfig(
        **LLAMA,
        width=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        hidden=8192,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        tie_embeddings=True,
    ),
    "llama-8b": ModelConfig(**LLAMA_31, width=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden=14_336),
    "llama-70b": ModelConfig(**LLAMA_31, width=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden=28_672),
}


@pytest.mark.parametrize("preset", PUBLISHED_SHAPES)
def test_published_shapes(preset: str) -> None:
    assert load_config(preset).model == PUBLISHED_SHAPES[preset]


BAD_FIELDS = {
    "optim.learning_rate='6e-4'": r"learning_rate: expected float, found '6e-4' \(str\); write 6e-4, without quotes",
    "model.n_kv_head=2": r"model\.n_kv_head: unknown field; did you mean model\.n_kv_heads\?",
    "train.steps='100'": r"train\.steps: expected int, found '100' \(str\); write 100, without quotes",
    "train.steps=1.5": r"train\.steps: expected int, found 1\.5 \(float\)",
    "train.steps=1e4": r"train\.steps: expected int, found 10000\.0 \(float\); write 10000",
    "train.deterministic='true'": "write true, without quotes",
    "optim.learning_rate=nan": r"found 'nan' \(str\); write \.nan",
    "train.steps=1e300": r"expected int, found 1e\+300 \(float\)$",
    "train.deterministic=yes": r"train\.deterministic: expected bool, found 'yes' \(str\); write true",
    "train.steps=true": r"train\.steps: expected int, found True \(bool\)",
    "model.width=null": r"model\.width: expected int, found None",
    "model.tie_embeddings=1": r"model\.tie_embeddings: expected bool, found 1",
    "model=7": r"model: expected a mapping of fields, found 7",
    "model.rope_scaling={factor: 8.0}": r"model\.rope_scaling\.low_freq_factor: missing",
    "train.compute_dtype=float16": r"compute_dtype is unknown.*'float16'",
    "model.head_dim=7": r"head_dim is not a positive even number",
    "model.n_kv_heads=3": r"n_heads is not divisible by model\.n_kv_heads",
    "train.batch_size=0": r"train\.batch_size is out of range",
    "train.grad_accum=7": r"not divisible by train\.grad_accum",
    "train.seq_len=100000": r"seq_len is longer than model\.context_length",
    "optim.beta2=1.0": r"optim\.beta2 is out of range",
    "optim.warmup_steps=100000": r"warmup_steps is more than train\.steps",
    "model.norm_eps=0.0": r"model\.norm_eps is out of range",
    "model.context_length=10000000": r"(?s)model\.context_length is out of range.*shorter context",
}


@pytest.mark.parametrize("change", BAD_FIELDS)
def test_bad_fields(change: str, tmp_path: Path) -> None:
    data = to_dict(load_config("quickstart"))
    key, value = change.split("=", 1)
    *sections, field = key.split(".")
    target = data
    for section in sections:
        target = target[section]
    target[field] = load_yaml(value)
    path = tmp_path / "bad.yaml"
    path.write_text(dump_yaml(data))
    with pytest.raises(InputError, match=f"(?s){BAD_FIELDS[change]}") as error:
        load_config(str(path))
    assert str(path) in str(error.value)


def test_all_problems_in_one_message(tmp_path: Path) -> None:
    data = to_dict(load_config("quickstart"))
    data["model"]["widht"] = data["model"].pop("width")
    data["optim"]["learning_rate"] = "fast"
    del data["train"]["steps"]
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match="has 4 problem") as error:
        load_config(str(path))
    for name in ("model.widht", "model.width: missing", "optim.learning_rate", "train.steps: missing"):
        assert name in str(error.value)


def test_width_not_divisible_by_heads(tmp_path: Path) -> None:
    data = to_dict(load_config("quickstart"))
    data["model"] |= {"head_dim": None, "width": 250}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match=r"(?s)width is not divisible.*a multiple of 4.*250"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("name", "message"), [("quickstrat", "no such configuration"), ("nowhere/x.yaml", "no such configuration")]
)
def test_missing_file(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(name)


def test_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: [unclosed")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(str(path))
    path.write_text("")
    with pytest.raises(InputError, match="expected a mapping"):
        load_config(str(path))


READ = {
    "010": 10,
    "08": 8,
    "1_000": 1000,
    "0x10": 16,
    "0o10": 8,
    "-5": -5,
    "1e-3": 0.001,
    ".5": 0.5,
    "true": True,
    "~": None,
    "": None,
    "yes": "yes",
    "off": "off",
    "1:30": "1:30",
    "2024-01-01": "2024-01-01",
    "~/x": "~/x",
}


@pytest.mark.parametrize("written", READ)
def test_numbers_are_read_as_a_person_reads_them(written: str) -> None:
    """And what is written is read back as the same value, also by PyYAML if it is a text."""
    found = load_yaml(f"x: {written}")["x"]
    assert (type(found), found) == (type(READ[written]), READ[written])
    assert load_yaml(dump_yaml({"x": written, "y": found})) == {"x": written, "y": found}
    assert yaml.safe_load(dump_yaml({"x": written}))["x"] == written


@pytest.mark.parametrize(
    ("text", "key"),
    [("a: {b: 1, b: 1}", "b"), ("a: 1\nc: 2\na: 3", "a"), ("x: &x {b: 1}\ny: {<<: *x, c: 1, c: 2}", "c")],
)
def test_a_key_given_twice_is_refused(text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"the key `{key}` is given twice"):
        load_config(str(path))


def test_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`~` is the home folder; what can be no path is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataConfig("~/text", "~/data").corpus == str(tmp_path / "text")
    assert DataConfig("~/text", "x/~").dir == "x/~"
    for bad in ("", "a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(InputError, match=r"not a path|no such home folder"):
            DataConfig("sotu", bad)


# fmt: off
ODD = [
    "\n", "\t", ":", "- ", "{", "}", "[", "]", "&a", "*a", "!!python/object:os.system", "!!int x", "<<", "'", '"', "|",
    ">", "#", "%", "@", "`", "1e999", ".nan", ".inf", "-1", "0", "1e400", "9" * 400, "9" * 5000, "\0", "\ud800",
    "\u2028", "\u00e9", "~", "null", "true", "yes", "0x", "0o9", "? ", ", ", "---\n", "...\n", "!!binary aGk=",
    "!!set {a}", "1_0", "2024-01-01", "_", "~nobody/x", "!!timestamp x", "!!float x",
    "!!float", "!!bool maybe", "[" * 2000,
]
# fmt: on


@pytest.mark.extended
def test_damaged_configurations_never_crash(tmp_path: Path) -> None:
    """Each of 1,000 mutations is read, and then survives a round trip, or is refused with an InputError."""
    rng, original = np.random.default_rng(0), dump_config(load_config("quickstart"))
    path, again, outcomes = tmp_path / "x.yaml", tmp_path / "again.yaml", {"read": 0, "refused": 0}
    for _ in range(1000):
        text = original
        for _ in range(rng.integers(1, 4)):
            at, lines, odd = int(rng.integers(len(text) + 1)), text.split("\n"), ODD[rng.integers(len(ODD))]
            a, b = rng.integers(len(lines), size=2)
            changed = [*lines]
            changed[a] = lines[b] if rng.integers(2) else lines[a].split(":")[0] + ": " + odd
            text = [text[:at] + odd + text[at:], text[:at] + text[at + 9 :], "\n".join(changed)][rng.integers(3)]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            config = load_config(str(path))
        except InputError:
            outcomes["refused"] += 1
            continue
        again.write_text(dump_config(config), encoding="utf-8")
        assert load_config(str(again)) == config
        outcomes["read"] += 1
    assert outcomes["refused"] > 500
    assert outcomes["read"] > 5


def test_config_differences() -> None:
    ours, theirs = load_config("quickstart"), load_config("mini-llm-50m")
    assert config_differences(ours, ours) == []
    assert "model.width: 256, was 384" in config_differences(ours, theirs)
    assert not any("out_dir" in difference for difference in config_differences(ours, theirs))
