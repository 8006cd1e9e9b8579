"""Trains the tokenizer and packs a corpus into token files, as training does by itself when they are missing."""

from minillm_core.cli import parse_run_config, run, say
from minillm_core.config import RunConfig
from minillm_core.data import SPLITS, PreparedData, prepare_data


def main() -> None:
    config = parse_run_config(__doc__, RunConfig)
    is_new = prepare_data(config.data, config.model.vocab_size)
    data = PreparedData(config.data.dir, config.model.vocab_size)
    say("prepared" if is_new else "found")
    for split in SPLITS:
        print(f"{data.dir}/{split}.bin: {data.meta[split]['n_tokens']} tokens of {data.meta[split]['n_bytes']} bytes")


if __name__ == "__main__":
    run(main)
