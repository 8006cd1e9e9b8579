"""Trains the tokenizer and writes the token files of a corpus; `minillm train` does the same if they are missing."""

from minillm_cli.console import parse_run_config
from minillm_core.config import RunConfig
from minillm_core.data.batches import SPLITS
from minillm_core.data.prepare import open_or_prepare


def main() -> None:
    config = parse_run_config(__doc__, RunConfig)
    data = open_or_prepare(config.data, config.model.vocab_size)
    for split in SPLITS:
        print(f"{data.dir}/{split}.bin: {data.meta[split]['n_tokens']} tokens of {data.meta[split]['n_bytes']} bytes")
