"""Where question-answering rows come from, and what a good row is.

A data directory is a local path or a URI that pyarrow knows (``s3://…``, ``gs://…``); files are read through its file
systems, in pieces of a few thousand rows that tasks can share out.

Every source ends in the same columns: ``id``, ``document`` (rows of one document never straddle a split), ``context``,
``question``, ``answers``. What cannot be brought into that form is a reject with a reason, never a silent drop.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from latentwire.config import DataConfig
from latentwire.data.toy import toy_rows
from latentwire.errors import UserError
from latentwire.storage import at, explained, place

Split = Literal["train", "validation"]
HUB_IDS = {"squad": ("rajpurkar/squad", None), "hotpotqa": ("hotpotqa/hotpot_qa", "distractor")}
PIECE_ROWS = 4_096
PIECE_BYTES = 1 << 24
Row = dict[str, Any] | bytes
"""One raw row: columns, or the bytes of a line of JSON."""


class DataError(UserError):
    """Data that cannot be read at all; the message says what was expected, what was found and where."""


class RowError(ValueError):
    """One row that cannot be used; the message is its reason in the rejects file."""


@dataclass(frozen=True)
class Piece:
    """What one task reads: rows ``start`` to ``stop`` of a Parquet file, bytes of a file of lines, or all there is."""

    name: str
    """The file's path in its file system; the dataset's name where there is no file."""
    start: int = 0
    stop: int | None = None


def pieces(config: DataConfig, split: Split) -> list[Piece]:
    """What tasks can read side by side. Raises :class:`DataError` for files that hold no such data."""
    if config.data_dir is None:
        if config.dataset in ("custom", "text"):
            raise DataError(
                f"dataset {config.dataset} needs the directory of its files, got none; name it by --data_dir"
            )
        return [Piece(config.dataset)]
    system, files = _files(config, split)
    found = []
    for file in files:
        size, step = {
            ".parquet": lambda file: (_parquet(system, file.path, config.dataset).metadata.num_rows, PIECE_ROWS),
            ".jsonl": lambda file: (file.size, PIECE_BYTES),
            ".json": lambda file: (file.size, file.size),  # one document: it is parsed as a whole
        }[f".{file.extension}"](file)
        found += [Piece(file.path, start, min(start + step, size)) for start in range(0, size, max(1, step))]
    return found


def read(config: DataConfig, split: Split, piece: Piece) -> Iterator[Row]:
    """The raw rows of one piece, streamed."""
    if config.data_dir is not None:
        yield from _read(config, piece)
    elif config.dataset == "toy":
        yield from _toy(config, split)
    else:
        yield from _hub_rows(config.dataset, split)


def fingerprint(config: DataConfig, split: Split) -> str:
    """Hash of a source: names and bytes of local files, names, sizes and times of remote ones, ids and seeds of the others."""
    digest = hashlib.sha256(f"{config.dataset} {split}".encode())
    if config.data_dir is None:
        digest.update(json.dumps([config.toy_people, config.toy_kinds, config.seed]).encode())
        return digest.hexdigest()
    system, files = _files(config, split)
    for file in files:
        digest.update(file.base_name.encode())
        if not isinstance(system, fs.LocalFileSystem):  # reading it all would cost as much as the work that it saves
            digest.update(f"{file.size} {file.mtime_ns}".encode())
            continue
        with open(file.path, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def clean(raw: Row, dataset: str) -> dict[str, Any]:
    """One raw row in the common columns. Raises :class:`RowError` with the reason."""
    cleaned = schema_of(dataset).clean(parsed(raw))
    for name, value in cleaned.items():
        for text in value if isinstance(value, list) else [value]:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RowError(f"{name} must be UTF-8, {error.reason}") from None
    return cleaned


def parsed(raw: Row) -> dict[str, Any]:
    """A raw row as a mapping: a line of a file is read as JSON. Raises :class:`RowError` with the reason."""
    row: Any = raw
    if isinstance(raw, bytes):
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError(f"row must be UTF-8, {error.reason} at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise RowError(f"row must be JSON, {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"row must be a mapping, got {type(row).__name__}")
    return row


# ------------------------------------------------------------------------------------------------------------ schemas


def _squad(row: dict[str, Any]) -> dict[str, Any]:
    """SQuAD's columns, which are also those of a user's own file: ``answers`` is text, a list, or ``{"text": [...]}``."""
    context = _text(row, "context")
    answers = row.get("answers", row.get("answer"))
    if isinstance(answers, dict):
        answers = answers.get("text")
    document = row.get("title") or row.get("document") or _digest(context)
    return _row(row, context, _text(row, "question"), answers, str(document))


def _hotpotqa(row: dict[str, Any]) -> dict[str, Any]:
    """Joins the titled paragraphs, one a line. Accepts the Hub's columns and the official JSON's lists of pairs."""
    titles = _supporting_titles(row.get("supporting_facts"))
    text = _paragraphs(row.get("context"))
    document = " | ".join(sorted(set(titles))) if titles else _digest(text)
    return _row(row, text, _text(row, "question"), row.get("answer"), document)


def _supporting_titles(facts: Any) -> list[str]:
    """Titles of the paragraphs that an answer hangs on; none where the row does not say."""
    if isinstance(facts, list):
        titles = [pair[0] if isinstance(pair, list) and pair else None for pair in facts]
    else:
        titles = (facts.get("title") if isinstance(facts, dict) else facts) or []
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        raise RowError("supporting_facts must be titles, each with a sentence's number")
    return titles


def _unlabelled(row: dict[str, Any]) -> dict[str, Any]:
    """Text alone, from ``text`` or from the ``context`` of a question-answering file; the text itself is its identity."""
    name = "text" if "text" in row else "context"
    value = row.get(name)
    text = _text(row, name) if value is None or isinstance(value, str) else _paragraphs(value)
    document = row.get("title") or row.get("document") or _digest(text)
    return {"id": _digest(text), "document": str(document), "context": text, "question": "", "answers": []}


def _paragraphs(context: Any) -> str:
    """HotpotQA's titled paragraphs, one a line."""
    if isinstance(context, dict) and isinstance(context.get("sentences"), list):
        sentences = context["sentences"]
        paragraphs = list(zip(context.get("title") or [""] * len(sentences), sentences, strict=False))
    elif isinstance(context, list):
        paragraphs = [tuple(pair) for pair in context if isinstance(pair, list) and len(pair) == 2]
    else:
        raise RowError(f"context must hold titles and sentences, got {type(context).__name__}")
    lines = []
    for title, sentences in paragraphs:
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise RowError("sentences must be lists of text")
        body = "".join(sentences).strip()
        if body:
            lines.append(f"{title}: {body}" if title else body)
    if not lines:
        raise RowError("context must not be empty")
    return "\n".join(lines)


def _row(row: dict[str, Any], context: str, question: str, answers: Any, document: str) -> dict[str, Any]:
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise RowError(f"answers must be text or a list of text, got {type(answers).__name__}")
    answers = [answer.strip() for answer in answers if answer.strip()]
    if not answers:
        raise RowError("answers must not be empty")
    identity = row.get("id", row.get("_id"))
    return {
        "id": str(identity) if identity is not None else _digest(f"{context}\0{question}"),
        "document": document,
        "context": context,
        "question": question,
        "answers": answers,
    }


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        raise RowError(f"{key} is missing")
    if isinstance(value, bytes):  # a column of bytes is text if it is UTF-8
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(f"{key} must be UTF-8, {error.reason} at byte {error.start}") from None
    if not isinstance(value, str):
        raise RowError(f"{key} must be text, got {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{key} must not be empty")
    return value.strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Schema:
    """How rows of one dataset are written."""

    clean: Callable[[dict[str, Any]], dict[str, Any]]
    """A row as it was written → the common columns. Raises :class:`RowError`."""
    columns: tuple[frozenset[str], ...]
    """What a Parquet file must have: a column of each of these sets."""


_ASKING = (frozenset({"context"}), frozenset({"question"}), frozenset({"answers", "answer"}))
SCHEMAS = {
    "squad": Schema(_squad, _ASKING),
    "hotpotqa": Schema(_hotpotqa, _ASKING),
    "text": Schema(_unlabelled, (frozenset({"text", "context"}),)),
}
"""Datasets that are not written as SQuAD is, and SQuAD."""


def schema_of(dataset: str) -> Schema:
    """How a dataset's rows are written; your own files are written as SQuAD's are."""
    return SCHEMAS.get(dataset, SCHEMAS["squad"])


# ------------------------------------------------------------------------------------------------------------ reading


def _toy(config: DataConfig, split: Split) -> Iterator[dict[str, Any]]:
    """Enough rows for the samples asked for after the development documents are taken out, with a margin."""
    if split == "train":
        count = round((config.samples or 20_000) / (1 - config.dev_fraction) * 1.1) + 4 * config.dev_samples
    else:
        count = config.validation_samples or 512
    seed = 2 * config.seed + (split == "validation")  # the two streams never share a seed
    questions = config.toy_questions if split == "train" else 1
    return toy_rows(count, seed=seed, people=config.toy_people, kinds=config.toy_kinds, questions=questions)


def _files(config: DataConfig, split: Split) -> tuple[fs.FileSystem, list[fs.FileInfo]]:
    """Parquet, jsonl and json files below the data directory whose name has the split for a word, as ``train-v1.1.json`` has;
    where some lie in a directory of the dataset's name, those alone."""
    system, root = _system(config)
    with explained(config.data_dir):
        found = system.get_file_info(root).type
    if found != fs.FileType.Directory:
        raise DataError(f"data_dir must be an existing directory, got {config.data_dir}")
    names = {"train": ("train",), "validation": ("validation", "dev")}[split]
    with explained(config.data_dir):
        there = system.get_file_info(fs.FileSelector(root, recursive=True))
    files = sorted(
        (
            info
            for info in there
            if info.extension in ("parquet", "jsonl", "json")
            and any(re.search(rf"(?<![a-z]){name}(?![a-z])", info.base_name) for name in names)
        ),
        key=lambda info: info.path,
    )
    if not files:
        listed = ", ".join(sorted(PurePosixPath(info.path).name for info in there)) or "nothing"
        raise DataError(
            f"{config.data_dir} must hold {' or '.join(names)} files as parquet, jsonl or json, it holds {listed}"
        )
    own = [info for info in files if PurePosixPath(info.path).is_relative_to(PurePosixPath(root) / config.dataset)]
    return system, own or files


def _system(config: DataConfig) -> tuple[fs.FileSystem, str]:
    """The file system of the data directory, and its path there."""
    with explained(f"data_dir {config.data_dir}"):
        return at(place(config.data_dir or ""))


def _parquet(system: fs.FileSystem, path: str, dataset: str) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(system.open_input_file(path))
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} must be Parquet: {error}") from error
    columns = set(parquet.schema_arrow.names)
    wanted = schema_of(dataset).columns
    if not all(columns & names for names in wanted):
        told = ", ".join(" or ".join(sorted(names)) for names in wanted)
        raise DataError(f"{path} must have columns {told}, it has {', '.join(sorted(columns))}")
    return parquet


def _read(config: DataConfig, piece: Piece) -> Iterator[Row]:
    system, _ = _system(config)
    if piece.name.endswith(".parquet"):
        yield from _table_rows(_slice(_parquet(system, piece.name, config.dataset), piece))
    elif piece.name.endswith(".jsonl"):
        yield from _lines(system, piece)
    else:
        try:
            document = json.loads(system.open_input_file(piece.name).readall())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{piece.name} must be JSON in UTF-8: {error}") from error
        yield from _official(document, piece.name)


def _slice(parquet: pq.ParquetFile, piece: Piece) -> pa.Table:
    """The piece's rows; of the row groups, only those that hold some of them are read."""
    start, groups, first = 0, [], None
    stop = parquet.metadata.num_rows if piece.stop is None else piece.stop
    for group in range(parquet.num_row_groups):
        end = start + parquet.metadata.row_group(group).num_rows
        if start < stop and end > piece.start:
            groups.append(group)
            first = start if first is None else first
        start = end
    return parquet.read_row_groups(groups).slice(piece.start - (first or 0), stop - piece.start)


def _lines(system: fs.FileSystem, piece: Piece) -> Iterator[bytes]:
    """The lines that begin in the piece's bytes."""
    with io.BufferedReader(system.open_input_file(piece.name)) as stream:
        place = piece.start
        if place:
            stream.seek(place - 1)
            place += len(stream.readline()) - 1  # to the first line that begins here
        for line in stream:
            if piece.stop is not None and place >= piece.stop:
                break
            place += len(line)
            if line.strip():
                yield line


def _table_rows(table: pa.Table) -> Iterator[Row]:
    """Rows as columns. A text column may hold bytes that are no UTF-8: such a row is passed on raw, to be rejected."""
    try:
        yield from table.to_pylist()
    except UnicodeDecodeError as error:
        if table.num_rows == 1:
            yield bytes(error.object)
        else:
            half = table.num_rows // 2
            yield from _table_rows(table.slice(0, half))
            yield from _table_rows(table.slice(half))


def _official(document: Any, file: str) -> Iterable[dict[str, Any]]:
    """SQuAD's nested articles, HotpotQA's flat list, or a plain list of rows."""
    if isinstance(document, list):
        return document
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        return (
            {"id": qa.get("id"), "title": article.get("title"), "context": paragraph.get("context")}
            | {"question": qa.get("question"), "answers": [answer.get("text") for answer in qa.get("answers", [])]}
            for article in document["data"]
            for paragraph in article.get("paragraphs", [])
            for qa in paragraph.get("qas", [])
        )
    raise DataError(f"{file} must be SQuAD's or HotpotQA's official JSON, or a list of rows")


def _hub_rows(dataset: str, split: Split) -> Iterator[Row]:
    import datasets

    name, subset = HUB_IDS[dataset]
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
        yield from rows
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name} cannot be read from the Hub ({reason}). Check the network, log in with `hf auth login`, or give "
            f"a local copy with --data_dir <directory with train and validation files>"
        ) from error
