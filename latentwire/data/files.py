"""Files as people have them: which of a directory are a split's, and how each is opened.

A data directory is a local path or a URI that pyarrow knows (``s3://…``, ``gs://…``); files are
read through its file systems, in pieces of a few thousand rows that tasks can share out.
"""

from __future__ import annotations

import codecs
import io
import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from latentwire.config import DataConfig
from latentwire.dataset import DATASETS, Row
from latentwire.errors import UserError
from latentwire.storage import at, explained, place

Split = Literal["train", "validation"]
Form = Literal["parquet", "lines", "document"]
"""The form in which a file holds rows: Parquet, one JSON value a line, or one JSON document."""
SPLIT_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
}
"""Words, in any case, by which a file's name or its folder's says which split it is of."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
PIECE_ROWS = 4_096
PIECE_BYTES = 1 << 24
ALL = 2**62
"""The end of a piece that reaches to its file's end."""
LISTED = 20
"""Names of files that a message quotes."""


class DataError(UserError):
    """Data that cannot be read at all; the message quotes what was expected, what is there, and where."""


@dataclass(frozen=True)
class Piece:
    """A part of a source that one task reads: row groups of a Parquet file, bytes of a file of lines, or all."""

    name: str
    """The file's path in its file system; the dataset's name where there is no file."""
    start: int = 0
    """First row, or byte."""
    stop: int = ALL
    """Row, or byte, after the last."""
    key: str = ""
    """The name that tells the file from the split's others, wherever the directory is; empty without a file."""
    form: Form = "lines"


@dataclass(frozen=True)
class File:
    """A file that may hold rows."""

    info: fs.FileInfo
    parts: tuple[str, ...]
    """Its path below the data directory, or below the dataset's own directory there."""

    @property
    def path(self) -> str:
        """Its path in its file system."""
        return str(self.info.path)

    @property
    def extension(self) -> str:
        """The extension in lower case, without that of a compression."""
        return PurePosixPath(_plain_name(self.parts[-1])).suffix

    @property
    def splits(self) -> set[Split]:
        """The splits that its name, or else the nearest folder with such a word, names."""
        for part in reversed(self.parts):
            splits: set[Split] = set()
            for split, words in SPLIT_WORDS.items():
                if any(_has(part, word) for word in words):
                    splits.add(split)
            if splits:
                return splits
        return set()


def find(config: DataConfig, split: Split) -> tuple[fs.FileSystem, dict[str, File]]:
    """Return the file system of a data directory, and a split's files there by their keys.

    A key is the file's path below the folder that the split's files have in common. Hidden files, and
    those whose names begin with ``_``, are passed over, and so are folders of such names. Raises
    :class:`DataError` where there is no file of the split, or where there are several configurations.
    """
    system, root = system_of(config)
    with explained(config.data_dir):
        is_directory = system.get_file_info(root).type == fs.FileType.Directory
    if not is_directory:
        raise DataError(
            f"data_dir must be an existing directory, got {config.data_dir}; name the one that holds "
            f"the files, as seen from here"
        )
    with explained(config.data_dir):
        listing = system.get_file_info(fs.FileSelector(root, recursive=True))
    try:
        files = sorted(_seen(listing, root), key=lambda file: file.path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"names of files in {config.data_dir} must be UTF-8, got {error.object!r}; rename it"
        ) from error
    readable = [file for file in files if file.extension in (".parquet", ".jsonl", ".json")]
    # A directory may hold several datasets, each in a folder of its name.
    below = [file for file in readable if len(file.parts) > 1 and file.parts[0] == config.dataset]
    if any(split in file.splits for file in below):
        readable = [File(file.info, file.parts[1:]) for file in below]
    chosen = _of_one_configuration(config, split, readable)
    for file in chosen:
        if len(file.splits) > 1:
            raise DataError(
                f"{file.path} must be named after one split, it has words of two; rename it"
            )
    if not chosen:
        words = SPLIT_WORDS[split]
        # "train", or "validation, valid, val or dev".
        named = " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
        held = ", ".join("/".join(file.parts) for file in files[:LISTED]) or "nothing"
        raise DataError(
            f"{config.data_dir} must hold {named} files as parquet, jsonl or json, it holds {held}"
            f"{', …' if len(files) > LISTED else ''}; name each file, or its folder, after its split"
        )
    places = [PurePosixPath("/", *file.parts) for file in chosen]
    shared = posixpath.commonpath([place.parent for place in places])
    keys = [str(place.relative_to(shared)) for place in places]
    return system, dict(zip(keys, chosen, strict=True))


def _seen(listing: Iterable[fs.FileInfo], root: str) -> Iterator[File]:
    for info in listing:
        parts = PurePosixPath(info.path).relative_to(PurePosixPath(root)).parts
        if info.type == fs.FileType.File and not any(part.startswith((".", "_")) for part in parts):
            yield File(info, parts)


def _of_one_configuration(config: DataConfig, split: Split, files: list[File]) -> list[File]:
    """Return the split's files; of several configurations, those of the one that ``data.config`` names."""
    of_split = [file for file in files if split in file.splits]
    known = config.source.configurations
    if config.config is not None:
        if not any(_names(file, config.config) for file in files):
            held = ", ".join(sorted({"/".join(file.parts) for file in files})[:LISTED]) or "nothing"
            raise DataError(
                f"data.config must be a word of a file's name or folder in {config.data_dir}, "
                f"got {config.config} for {held}"
            )
        named = [file for file in of_split if _names(file, config.config)]
        # A split that configurations share, as HotpotQA's training rows are, names none of them.
        return named or [file for file in of_split if not _names_any(file, known)]
    labels: set[str] = set()
    for file in of_split:
        labels |= {word for word in known if _names(file, word)}
    if known:
        splits: defaultdict[str, set[Split]] = defaultdict(set)
        for file in files:
            if len(file.parts) > 1 and not _names_any(file, known):
                splits[file.parts[0]] |= file.splits
        # A folder with both splits, and of no known name, is a configuration too.
        for folder, splits_there in splits.items():
            if splits_there == SPLIT_WORDS.keys():
                labels.add(folder)
    if len(labels) > 1:
        listed = sorted(labels)
        raise DataError(
            f"{config.data_dir} must hold one configuration of {config.dataset}, its {split} files are of "
            f"{' and '.join(listed)}; choose one by --set data.config={listed[0]}, or name its directory by --data_dir"
        )
    return of_split


def _names(file: File, word: str) -> bool:
    return any(_has(part, word) for part in file.parts)


def _names_any(file: File, words: Iterable[str]) -> bool:
    return any(_names(file, word) for word in words)


def _has(name: str, word: str) -> bool:
    """Return whether a name has a word, in any case; with letters beside it, it is part of another one."""
    return re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", name, re.IGNORECASE) is not None


def system_of(config: DataConfig) -> tuple[fs.FileSystem, str]:
    """Return the file system of the data directory, and its path there."""
    with explained(f"data_dir {config.data_dir}"):
        return at(place(config.data_dir or ""))


def _plain_name(name: str) -> str:
    """Return a file's name in lower case, without the extension of a compression."""
    name = name.lower()
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix in COMPRESSIONS else name


def _compression(path: str) -> str | None:
    return COMPRESSIONS.get(PurePosixPath(path.lower()).suffix)


def _open(system: fs.FileSystem, path: str) -> io.BufferedReader:
    """Open a file's bytes, decompressed."""
    compression = _compression(path)
    if compression is None:
        return io.BufferedReader(system.open_input_file(path))
    return io.BufferedReader(system.open_input_stream(path, compression=compression))


# ------------------------------------------------------------------------------------------------------------- pieces


def pieces(config: DataConfig, split: Split) -> list[Piece]:
    """Return what tasks can read side by side. Raises :class:`DataError` for files without such data."""
    system, files = find(config, split)
    result: list[Piece] = []
    for key, file in files.items():
        result += _pieces(system, file, key, config.dataset)
    return result


def _pieces(system: fs.FileSystem, file: File, key: str, dataset: str) -> Iterator[Piece]:
    if file.extension == ".parquet":
        metadata = open_parquet(system, file.path, dataset).metadata
        start = stop = 0
        for group in range(metadata.num_row_groups):  # decoded as a whole: one task reads it, once
            stop += metadata.row_group(group).num_rows
            is_last = group == metadata.num_row_groups - 1
            if stop - start >= PIECE_ROWS or (is_last and stop > start):
                yield Piece(file.path, start, stop, key, "parquet")
                start = stop
    elif file.info.size:
        form = _form(system, file)
        if form == "document" or _compression(file.path):
            yield Piece(file.path, key=key, form=form)
        else:
            size = file.info.size
            for start in range(0, size, PIECE_BYTES):
                yield Piece(file.path, start, min(start + PIECE_BYTES, size), key, form)


def _form(system: fs.FileSystem, file: File) -> Form:
    """Return the form of a file of JSON, whatever its name: people save either form under the other's name."""
    first = second = b""
    with explained(file.path), _open(system, file.path) as stream:
        for line in _lines_of(stream):
            if first:
                second = line
                break
            first = line
    if file.extension == ".json":
        # One object a line: JSON Lines under a document's name.
        is_lines = not first or (first[:1] == b"{" == second[:1] and first[-1:] == b"}")
        return "lines" if is_lines else "document"
    # A list, unless lists stand one a line; an object over many lines, or with all rows on one.
    is_array = first[:1] == b"[" and not (first[-1:] == b"]" and second)
    is_object = first == b"{" if second else _has_rows(first)
    return "document" if is_array or is_object else "lines"


def _has_rows(line: bytes) -> bool:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(document, dict)
        and isinstance(document.get("data"), list)
        and "question" not in document
    )


def open_parquet(system: fs.FileSystem, path: str, dataset: str) -> pq.ParquetFile:
    """Open a Parquet file with the dataset's columns. Raises :class:`DataError`."""
    try:
        with explained(path):
            parquet = pq.ParquetFile(system.open_input_file(path))
    except UserError as error:
        if isinstance(error.__cause__, pa.ArrowInvalid):
            raise DataError(f"{path} must be Parquet: {error.__cause__}") from error
        raise
    columns = set(parquet.schema_arrow.names)
    required = DATASETS[dataset].columns
    if not all(columns & names for names in required):
        listed = ", ".join(" or ".join(sorted(names)) for names in required)
        raise DataError(f"{path} must have columns {listed}, it has {', '.join(sorted(columns))}")
    return parquet


# ------------------------------------------------------------------------------------------------------------ reading


def read(config: DataConfig, piece: Piece) -> Iterator[Row]:
    """Yield the raw rows of one piece."""
    system, _ = system_of(config)
    if piece.form == "parquet":
        yield from _parquet_rows(open_parquet(system, piece.name, config.dataset), piece)
    elif piece.form == "lines":
        yield from _lines(system, piece)
    else:
        with explained(piece.name), _open(system, piece.name) as stream:
            text = stream.read()
        try:
            document = json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{piece.name} must be JSON in UTF-8: {error}") from error
        yield from _official(document, piece.name)


def _parquet_rows(parquet: pq.ParquetFile, piece: Piece) -> Iterator[Row]:
    """Yield the rows of the piece's row groups, each decoded once."""
    start, groups = 0, []
    for group in range(parquet.num_row_groups):
        if piece.start <= start < piece.stop:
            groups.append(group)
        start += parquet.metadata.row_group(group).num_rows
    with explained(piece.name):
        for batch in parquet.iter_batches(batch_size=PIECE_ROWS, row_groups=groups):
            yield from _table_rows(pa.Table.from_batches([batch]))


def _table_rows(table: pa.Table) -> Iterator[Row]:
    """Yield a table's rows. One whose text is no UTF-8 is passed on raw, to be rejected.

    Dates that Python does not have, of the year 10000, are left out: no dataset reads dates.
    """
    try:
        yield from table.to_pylist()
    except UnicodeDecodeError as error:
        if table.num_rows == 1:
            yield bytes(error.object)
        else:
            # The error does not say which row: halves are tried until it stands alone.
            half = table.num_rows // 2
            yield from _table_rows(table.slice(0, half))
            yield from _table_rows(table.slice(half))
    except OverflowError:
        dates = [field.name for field in table.schema if pa.types.is_temporal(field.type)]
        if not dates:
            raise
        yield from _table_rows(table.drop_columns(dates))


def _lines(system: fs.FileSystem, piece: Piece) -> Iterator[bytes]:
    """Yield the lines that begin in the piece's bytes."""
    with explained(piece.name), _open(system, piece.name) as stream:
        place = piece.start
        if place:
            # From the byte before: where it ends a line, the first one begins right here.
            stream.seek(place - 1)
            place += len(stream.readline()) - 1
        for line in stream:
            if place >= piece.stop:
                break
            place += len(line)
            yield from _lines_of([line])


def _lines_of(stream: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines that are not blank, without a byte order mark and white space around them."""
    for line in stream:
        if text := line.removeprefix(codecs.BOM_UTF8).strip():
            yield text


def _official(document: Any, file: str) -> Iterator[Any]:
    """Yield the rows of SQuAD's nested articles, HotpotQA's list, or a plain list, alone or under ``data``."""
    entries = document.get("data") if isinstance(document, dict) else document
    if not isinstance(entries, list):
        raise DataError(
            f"{file} must be SQuAD's or HotpotQA's official JSON, or a list of rows; move it elsewhere where it holds none"
        )
    for entry in entries:
        paragraphs = entry.get("paragraphs") if isinstance(entry, dict) else None
        if not isinstance(paragraphs, list):
            yield entry
            continue
        for paragraph in paragraphs:
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list):
                yield paragraph
                continue
            for question in questions:
                place = {"title": entry.get("title"), "context": paragraph.get("context")}
                yield place | question if isinstance(question, dict) else question
