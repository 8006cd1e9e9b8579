"""The data of a run: prepares its corpus once, with a tokenizer that is trained on it."""

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm_core.config import DataConfig
from minillm_core.data.assemble import Holdout
from minillm_core.data.chunks import CHUNK_BYTES
from minillm_core.data.conversations import messages_of
from minillm_core.data.corpus import digest_of_places, digest_of_text, is_chat, list_documents
from minillm_core.data.documents import CHAT, PLAIN, read_piece
from minillm_core.data.finish import unusable
from minillm_core.data.mixture import PERIOD, Mixture, Phase, shares_of
from minillm_core.data.pieces import pieces_of, read_texts
from minillm_core.data.plan import Plan
from minillm_core.data.prepare import carry_out
from minillm_core.data.prepared import INDEX, OLD_INDEX, SPLITS, PreparedData, redo_hint
from minillm_core.data.sources import Source
from minillm_core.data.workers import n_cpus
from minillm_core.errors import InputError
from minillm_core.files import beside, lock, make_folder, replace_file
from minillm_core.progress import progress
from minillm_core.text.chat_template import ROLE_TOKENS
from minillm_core.text.tokenizer import TOKENIZER_MODEL, hash_tokenizer
from minillm_core.text.train_tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

WORKER_BYTES = 32 << 20
"""Text that is worth the start of one more process."""


def open_or_prepare(config: DataConfig, vocab_size: int, *, tokenizer: Path | None = None) -> PreparedData | Mixture:
    """The prepared data of a configuration. Prepares its corpus if that is missing, then compares every file with its
    hash.

    Args:
        tokenizer: a folder with the tokenizer to use; None: that of existing data, or a new one.

    Raises:
        InputError: the corpus is unusable, the folder holds different data, or a file was changed; the data has a
            different tokenizer.
    """
    if config.mixture is None:
        is_new = prepare_data(config, vocab_size, tokenizer=tokenizer)
        logger.info(f"prepared {config.corpus} in {config.dir}" if is_new else f"found prepared data in {config.dir}")
    data = open_data(config, vocab_size)
    data.verify()
    if isinstance(data, Mixture):
        for phase in data.phases:
            shares = (f"{name} {share / PERIOD:.2%}" for name, share in zip(data.parts, phase.shares, strict=True))
            logger.info(f"mixture from step {phase.from_step}: {', '.join(shares)}")
    if tokenizer is not None and hash_tokenizer(tokenizer) != data.hashes()["tokenizer"]:
        raise InputError(
            "the data was prepared with a different tokenizer than that of the initial model",
            expected=f"the tokenizer in {tokenizer}",
            where=data.dir,
            hint="choose a different --data.dir, to prepare the corpus with that tokenizer",
        )
    return data


def open_data(config: DataConfig, vocab_size: int) -> PreparedData | Mixture:
    """The prepared data that a configuration names: one folder, or several as a mixture.

    Raises:
        InputError: there is none, or it is damaged, or does not fit the model or each other.
    """
    if config.mixture is None:
        return PreparedData(config.dir, vocab_size, document_mask=config.document_mask)
    folders = {name: Path(config.dir) / name for name in sorted(config.mixture)}
    parts = {n: PreparedData(f, vocab_size, document_mask=config.document_mask) for n, f in folders.items()}
    changes = {0: config.mixture, **(config.mixture_changes or {})}
    phases = [Phase(step, shares_of([changes[step][name] for name in parts])) for step in sorted(changes)]
    return Mixture(parts, phases)


def prepare_data(config: DataConfig, vocab_size: int, *, tokenizer: Path | None = None) -> bool:
    """Trains the tokenizer and packs the corpus into `config.dir`, unless this has been done before.

    Args:
        tokenizer: a folder with the tokenizer to use; None: one is trained on the training text.

    Every document becomes BOS, its tokens, EOS; a conversation becomes what the chat template gives. The folder appears
    only when it is complete.

    Returns:
        True if the data was prepared now, False if it existed.

    Raises:
        InputError: the corpus is unusable, or the folder holds different data.
    """
    target = Path(config.dir)
    if _is_prepared(target, config, vocab_size):
        return False
    sources, chat = tuple(list_documents(config)), is_chat(config)
    make_folder(beside(target, "partial").parent)
    with lock(beside(target, "lock"), wait=True), tempfile.TemporaryDirectory() as trained:
        if _is_prepared(target, config, vocab_size):
            return False
        places = digest_of_places(sources)
        if tokenizer is None:
            texts = read_texts([source for source in sources if source.split == "train"])
            if chat:
                texts = _training_messages(sources[0], config.holdout_every)
            train_tokenizer(texts, vocab_size, Path(trained) / TOKENIZER_MODEL, symbols=ROLE_TOKENS if chat else ())
        about = {
            "corpus": config.corpus,
            "corpus_places": places,
            "corpus_sha256": digest_of_text(sources),
            "holdout_every": config.holdout_every,
        }
        if digest_of_places(sources) != places:
            hint = "give the command again when nothing writes to the corpus"
            raise InputError("the corpus changed while it was read", where=config.corpus, hint=hint)
        plan = Plan(
            sources,
            tokenizer or Path(trained),
            vocab_size,
            how=CHAT if chat else PLAIN,
            holdout=Holdout(every=config.holdout_every) if chat else Holdout(),
            about=tuple(about.items()),
        )
        n_workers = max(1, min(n_cpus(), sum(source.n_bytes for source in sources) // WORKER_BYTES))
        carry_out(plan, target, restart=True, n_workers=n_workers)
    return True


def _training_messages(source: Source, holdout_every: int) -> Iterator[str]:
    """The messages of a file of conversations that are not held out.

    Raises:
        InputError: a conversation cannot be used.
    """
    n_before = 0
    with progress("reading the conversations", source.n_bytes, "B") as work:
        for piece in pieces_of(0, source, CHAT, CHUNK_BYTES):
            for chunk in read_piece(piece, [source], CHAT):
                if chunk.problem:
                    raise unusable(source, chunk.offset, chunk.problem)
                n_before += 1
                if n_before % holdout_every:
                    yield from (f"{message['content']}\n" for message in messages_of(chunk.data))
            work.advance(piece.n_bytes)


def _is_prepared(target: Path, config: DataConfig, vocab_size: int) -> bool:
    """Whether the folder holds the prepared data of this corpus.

    Raises:
        InputError: the folder holds different data.
    """
    if not target.exists():
        return False
    existing = PreparedData(target, vocab_size).index
    if existing["format_version"] != 1 and "corpus_sha256" not in existing:
        logger.info(f"{target} was not prepared from a corpus: data.corpus and data.holdout_every are not used")
        return True  # prepared from inputs, with `prepare`, or by another project
    if existing.get("holdout_every") != config.holdout_every:
        raise InputError(
            "the folder was prepared with a different holdout_every",
            expected=config.holdout_every,
            found=existing.get("holdout_every"),
            where=target,
            hint=redo_hint(target),
        )
    if not _has_text_of(target, existing, config):
        raise InputError(
            "the folder was prepared from a different corpus, or the corpus has changed since",
            expected=f"the present text of {config.corpus}",
            found=f"{sum(existing[split]['n_bytes'] for split in SPLITS):,} bytes, from {existing.get('corpus')}",
            where=target,
            hint="to go on with runs that use this data, restore the text; for the present text, choose a different "
            "--data.dir (and, to train, a different --train.out_dir)",
        )
    return True


def _has_text_of(target: Path, meta: dict[str, Any], config: DataConfig) -> bool:
    """Whether data was prepared from the text that the corpus has now, whatever the spelling of its path."""
    if config.corpus != "sotu" and not Path(config.corpus).exists() and config.corpus == meta.get("corpus"):
        logger.info(f"the corpus {config.corpus} is not there any more; its prepared data is used")
        return True
    documents = list_documents(config)
    if "corpus_sha256" not in meta:  # prepared by version 0.1
        n_bytes = {split: sum(d.n_bytes for d in documents if d.split == split) for split in SPLITS}
        return n_bytes == {split: meta[split]["n_bytes"] for split in SPLITS}
    if (places := digest_of_places(documents)) == meta.get("corpus_places"):
        return True
    if digest_of_text(documents) != meta["corpus_sha256"]:
        return False
    with contextlib.suppress(OSError):  # a folder that is only read
        name = INDEX if (target / INDEX).is_file() else OLD_INDEX
        replace_file(target / name, json.dumps(meta | {"corpus_places": places}, indent=1, ensure_ascii=False) + "\n")
    return True
