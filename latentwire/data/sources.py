"""Raw rows of a dataset: from files, from the Hub, or generated.

:mod:`latentwire.dataset` says what a good row is, :mod:`latentwire.data.files` which files are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from pyarrow import fs

from latentwire.config import DataConfig
from latentwire.data import files
from latentwire.data.files import DataError, Piece, Split
from latentwire.dataset import Row, RowError, answers_of, clean, parsed

__all__ = [
    "DataError",
    "Piece",
    "Row",
    "RowError",
    "Split",
    "answers_of",
    "check",
    "clean",
    "fingerprint",
    "parsed",
    "pieces",
    "read",
]


def check(config: DataConfig) -> None:
    """Look for the files of both splits by their names alone; what the Hub has is not asked for.

    Raises :class:`DataError` where a split has none.
    """
    if config.data_dir is not None:
        for split in files.SPLIT_WORDS:
            files.find(config, split)
    elif config.source.generate is None and config.source.hub_id is None:
        raise DataError(
            f"dataset {config.dataset} needs the directory of its files, got none; name it by --data_dir"
        )


def pieces(config: DataConfig, split: Split) -> list[Piece]:
    """Return what tasks can read side by side. Raises :class:`DataError` for files that hold no such data."""
    if config.data_dir is not None:
        return files.pieces(config, split)
    check(config)
    return [Piece(config.dataset)]


def read(config: DataConfig, split: Split, piece: Piece) -> Iterator[Row]:
    """Yield the raw rows of one piece."""
    if config.data_dir is not None:
        yield from files.read(config, piece)
    elif config.source.generate is not None:
        yield from config.source.generate(config, split)
    else:
        yield from _hub_rows(config, split)


def fingerprint(config: DataConfig, split: Split) -> str:
    """Return a hash of a split's source.

    It covers names and bytes of local files, names, sizes and times of remote ones, and seeds where
    there are no files.
    """
    digest = hashlib.sha256(f"{config.dataset} {split}".encode())
    if config.data_dir is None:
        decides = [config.toy_people, config.toy_kinds, config.seed, *filter(None, [config.config])]
        digest.update(json.dumps(decides).encode())
        return digest.hexdigest()
    system, keyed = files.find(config, split)
    for key, file in keyed.items():
        digest.update(key.encode())
        if not isinstance(system, fs.LocalFileSystem):
            # Reading it all would cost as much as the work that it saves.
            digest.update(f"{file.info.size} {file.info.mtime_ns}".encode())
            continue
        with open(file.path, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _hub_rows(config: DataConfig, split: Split) -> Iterator[Row]:
    import datasets

    name, subset = config.source.hub_id, config.source.hub_configuration
    try:
        yield from datasets.load_dataset(name, config.config or subset, split=split, streaming=True)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name} cannot be read from the Hub ({reason}). Check the network, log in with `hf auth login`, or give "
            f"a local copy with --data_dir <directory with train and validation files>"
        ) from error
