"""lm-evaluation-harness scores a published folder and a server as this project does. (Each run takes about 15 seconds.)

The harness cuts a document into windows of `max_length` tokens with one token of context: BOS for the first window, the
token before it for the others. Only its last window also sees the tokens before, up to `max_length`.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import minillm_core
from minillm_core.config import DataConfig
from minillm_core.interop.hf import write_hf_weights
from minillm_core.interop.hf_config import to_hf_config
from minillm_core.interop.imports import import_checkpoint
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.commands import environment, succeeds_here
from parity_tests.conftest import BACKENDS, TINY, random_weights
from parity_tests.server import serving

pytestmark = pytest.mark.extended

SEQ_LEN = 32
QUESTIONS = [
    {"query": "The Congress of the United", "choices": ["States", "Kingdom of Spain"], "gold": 0},
    {"query": "Gentlemen of the Senate", "choices": ["and House", "the peace"], "gold": 0},
]


class Home:
    """A model of random weights, whose scores depend on every token of the context, and documents to score."""

    def __init__(self, folder: Path, corpus: Path, tokenizer: Tokenizer):
        self.folder = folder
        source = folder / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(to_hf_config(TINY, "float32")))
        write_hf_weights(source, TINY, random_weights(TINY), "float32")
        (source / "tokenizer.model").write_bytes(tokenizer.content)
        checkpoint = import_checkpoint("hf", source, folder / "run", BACKENDS["torch"])
        self.tokenizer = minillm_core.load_tokenizer(checkpoint, TINY.vocab_size)
        self.generator = BACKENDS["torch"].Generator(BACKENDS["torch"].load(checkpoint), self.tokenizer)
        texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
        self.held_out = self.cut(texts[0], 6 * SEQ_LEN)
        self.documents = [self.cut(text, n) for text, n in zip(texts[1:], (20, SEQ_LEN, 100, 333), strict=False)]
        (folder / "text").mkdir()
        (folder / "text" / "1.txt").write_text(texts[-1], encoding="utf-8")
        (folder / "text" / "2.txt").write_text(self.held_out, encoding="utf-8")  # every second document is held out
        data = DataConfig(corpus=str(folder / "text"), dir=str(folder / "data"), holdout_every=2)
        minillm_core.prepare_data(data, TINY.vocab_size, tokenizer=checkpoint)
        minillm_core.publish(folder / "run", folder / "out", backend="torch", data_dir=data.dir, seq_len=SEQ_LEN)

    def cut(self, text: str, n_tokens: int) -> str:
        """The beginning of a text that has n_tokens tokens."""
        n = next(n for n in range(n_tokens, len(text)) if len(self.tokenizer.encode(text[:n])) == n_tokens)
        return text[:n]

    def nats(self, rows: Sequence[list[int]], n_scored: Sequence[int]) -> float:
        """The negative log-likelihood of the last n_scored tokens of each row of token ids."""
        scores = self.generator.score(rows)
        return -sum(float(row[-n:].sum()) for row, n in zip(scores, n_scored, strict=True))

    def rolling(self, text: str, length: int, prefix: int | None = None) -> float:
        """The score of a document in windows, as the harness cuts it."""
        ids = [self.tokenizer.bos_id if prefix is None else prefix, *self.tokenizer.encode(text)]
        rows, n_scored = [ids[: length + 1]], [len(ids[: length + 1]) - 1]
        for at in range(length + 1, len(ids), length):
            end = min(at + length, len(ids))
            rows.append(ids[end - length - 1 : end])
            n_scored.append(end - at)
        return self.nats(rows, n_scored)

    def harness(
        self, model_args: str, *tasks: str, url: str = ""
    ) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
        """The results of the command `lm_eval`, offline, and its samples: by task. `url`: that of a server's API, which
        then runs the model instead of transformers."""
        out = self.folder / "results" / ("-".join(tasks) + ("-served" if url else ""))
        model, args = "hf", f"pretrained={self.folder / 'out'},dtype=float32"
        if url:
            model, args = "local-completions", f"model=run,base_url={url},tokenizer={self.folder / 'out'}"
        command = [str(Path(sys.executable).with_name("lm_eval")), "--model", model, "--device", "cpu"]
        command += ["--model_args", args + model_args, *(["--batch_size", "2"] if url else [])]
        command += ["--include_path", str(self.folder / "tasks"), "--tasks", ",".join(tasks)]
        command += ["--output_path", str(out), "--log_samples"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "home"), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment() | offline,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (file,) = out.rglob("results_*.json")
        samples = {task: next(out.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines() for task in tasks}
        return json.loads(file.read_text())["results"], {
            task: sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
            for task, lines in samples.items()
        }

    def task(self, name: str, documents: list[dict[str, Any]], **fields: Any) -> None:
        (self.folder / "tasks").mkdir(exist_ok=True)
        file = self.folder / "tasks" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        (self.folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(common | {"test_split": "test"} | fields))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: Tokenizer) -> Home:
    found = Home(tmp_path_factory.mktemp("harness"), corpus, tokenizer)
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    rolling["metric_list"] = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    found.task("held_out", [{"text": found.held_out}], **rolling)
    found.task("documents", [{"text": text} for text in found.documents], **rolling)
    fields = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    found.task("questions", QUESTIONS, output_type="multiple_choice", **fields)
    return found


def check_bits_per_byte(home: Home, results: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> None:
    """The harness's bits per byte are those of `evaluate` without the end-of-document token, which only `evaluate`
    counts. For documents of any length they are those of the same windows, scored here."""
    options = ("--backend", "torch", "--data-dir", "data", "--seq-len", str(SEQ_LEN))
    printed = succeeds_here("evaluate", "run", *options, cwd=home.folder).stdout
    evaluated = {line.split()[0]: float(line.split()[1]) for line in printed.splitlines()}
    n_bytes = len(home.held_out.encode())
    last = home.tokenizer.encode(home.held_out)[-1]
    end = home.nats([[last, home.tokenizer.eos_id]], [1]) / n_bytes / math.log(2)
    assert results["held_out"]["bits_per_byte,none"] == pytest.approx(evaluated["bits_per_byte"] - end, rel=1e-6)
    n_tokens = 6 * SEQ_LEN
    nats = results["held_out"]["bits_per_byte,none"] * n_bytes * math.log(2)
    assert (nats + end * n_bytes * math.log(2)) / (n_tokens + 1) == pytest.approx(evaluated["loss"], rel=1e-6)
    expected = [home.rolling(text, SEQ_LEN) for text in home.documents]
    for sample, value in zip(samples["documents"], expected, strict=True):
        assert float(sample["resps"][0][0]) == pytest.approx(-value, rel=1e-6)
    total = sum(expected) / sum(len(text.encode()) for text in home.documents)
    assert results["documents"]["bits_per_byte,none"] == pytest.approx(total / math.log(2), rel=1e-6)
    assert results["documents"]["byte_perplexity,none"] == pytest.approx(math.exp(total), rel=1e-5)


def test_bits_per_byte(home: Home) -> None:
    check_bits_per_byte(home, *home.harness(f",add_bos_token=False,max_length={SEQ_LEN}", "held_out", "documents"))


def test_through_the_server(home: Home) -> None:
    """The same numbers through the server's API. It gets token ids; `max_length` there counts one token of context and
    one that the harness generates."""
    with serving(home.folder / "run", "--backend", "torch", "--max-batch", "4") as server:
        args = f",num_concurrent=3,add_bos_token=False,max_length={SEQ_LEN + 2}"
        url = f"{server.url}/v1/completions"
        results, samples = home.harness(args, "held_out", "documents", "questions", url=url)
    check_bits_per_byte(home, results, samples)
    check_questions(home, results, samples, bos=False)


def test_the_comparison_is_sensitive(home: Home) -> None:
    """A different window, no BOS or a second one would change the score far more than the test above allows."""
    right = home.rolling(home.held_out, SEQ_LEN)
    for length in (SEQ_LEN - 1, SEQ_LEN + 1, TINY.context_length):
        assert home.rolling(home.held_out, length) != pytest.approx(right, rel=1e-3)
    assert home.rolling(home.held_out, SEQ_LEN, prefix=home.tokenizer.eos_id) != pytest.approx(right, rel=1e-4)
    ids = home.tokenizer.encode(home.held_out, bos=True)[: SEQ_LEN + 1]
    twice = home.nats([[home.tokenizer.bos_id, *ids[:SEQ_LEN]]], [SEQ_LEN - 1])
    assert twice != pytest.approx(home.nats([ids[:SEQ_LEN]], [SEQ_LEN - 1]), rel=1e-4)


def test_multiple_choice(home: Home) -> None:
    """The folder without further settings: a context begins with BOS, and the choices have the scores of `score`."""
    check_questions(home, *home.harness("", "questions"), bos=True)


def check_questions(
    home: Home, results: dict[str, Any], samples: dict[str, list[dict[str, Any]]], *, bos: bool
) -> None:
    best = []
    for sample, question in zip(samples["questions"], QUESTIONS, strict=True):
        context = home.tokenizer.encode(question["query"], bos=bos)
        rows = [home.tokenizer.encode(f"{question['query']} {c}", bos=bos) for c in question["choices"]]
        expected = [-home.nats([row], [len(row) - len(context)]) for row in rows]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, rel=1e-6)
        best.append(expected.index(max(expected)) == question["gold"])
    assert results["questions"]["acc,none"] == sum(best) / len(best)
