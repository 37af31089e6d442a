"""Where question-answering rows come from: files, the Hub, or the toy's generator.

What a good row is, :mod:`latentwire.data.rows` says; which files are read and how,
:mod:`latentwire.data.files`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pyarrow import fs

from latentwire.config import DataConfig
from latentwire.data import files
from latentwire.data.files import DataError, Piece, Split
from latentwire.data.rows import Row, RowError, answers_of, clean, parsed
from latentwire.data.toy import toy_rows

__all__ = [
    "HUB_IDS", "DataError", "Piece", "Row", "RowError", "Split", "answers_of", "clean", "fingerprint", "parsed", "pieces",
    "read",
]  # fmt: skip
HUB_IDS = {"squad": ("rajpurkar/squad", None), "hotpotqa": ("hotpotqa/hotpot_qa", "distractor")}
"""Dataset → its id on the Hub, and the configuration that is read unless ``data.config`` says."""


def pieces(config: DataConfig, split: Split) -> list[Piece]:
    """What tasks can read side by side. Raises :class:`DataError` for files that hold no such data."""
    if config.data_dir is not None:
        return files.pieces(config, split)
    if config.dataset in ("custom", "text"):
        raise DataError(f"dataset {config.dataset} needs the directory of its files, got none; name it by --data_dir")
    return [Piece(config.dataset)]


def read(config: DataConfig, split: Split, piece: Piece) -> Iterator[Row]:
    """The raw rows of one piece, streamed."""
    if config.data_dir is not None:
        yield from files.read(config, piece)
    elif config.dataset == "toy":
        yield from _toy(config, split)
    else:
        yield from _hub_rows(config, split)


def fingerprint(config: DataConfig, split: Split) -> str:
    """Hash of a source: names and bytes of local files, names, sizes and times of remote ones, ids and seeds of the others."""
    digest = hashlib.sha256(f"{config.dataset} {split}".encode())
    if config.data_dir is None:
        decides = [config.toy_people, config.toy_kinds, config.seed, *filter(None, [config.config])]
        digest.update(json.dumps(decides).encode())
        return digest.hexdigest()
    system, found = files.find(config, split)
    for key, file in found.items():
        digest.update(key.encode())
        if not isinstance(system, fs.LocalFileSystem):  # reading it all would cost as much as the work that it saves
            digest.update(f"{file.info.size} {file.info.mtime_ns}".encode())
            continue
        with open(file.path, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _toy(config: DataConfig, split: Split) -> Iterator[dict[str, Any]]:
    """Enough rows for the samples asked for after the development documents are taken out, with a margin."""
    if split == "train":
        count = round((config.samples or 20_000) / (1 - config.dev_fraction) * 1.1) + 4 * config.dev_samples
    else:
        count = (config.validation_samples or 512) + config.validation_skip
    seed = 2 * config.seed + (split == "validation")  # the two streams never share a seed
    questions = config.toy_questions if split == "train" else 1
    return toy_rows(count, seed=seed, people=config.toy_people, kinds=config.toy_kinds, questions=questions)


def _hub_rows(config: DataConfig, split: Split) -> Iterator[Row]:
    import datasets

    name, subset = HUB_IDS[config.dataset]
    try:
        yield from datasets.load_dataset(name, config.config or subset, split=split, streaming=True)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name} cannot be read from the Hub ({reason}). Check the network, log in with `hf auth login`, or give "
            f"a local copy with --data_dir <directory with train and validation files>"
        ) from error
