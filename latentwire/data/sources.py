"""Where question-answering rows come from, and what a good row is.

Every source ends in the same columns: ``id``, ``document`` (rows of one document never straddle a split), ``context``,
``question``, ``answers``. What cannot be brought into that form is a reject with a reason, never a silent drop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from latentwire.config import DataConfig
from latentwire.data.toy import toy_rows

Split = Literal["train", "validation"]
HUB_IDS = {"squad": ("rajpurkar/squad", None), "hotpotqa": ("hotpotqa/hotpot_qa", "distractor")}
BLOCK_ROWS = 2_048


class DataError(RuntimeError):
    """Data that cannot be read at all; the message says what was expected, what was found and where."""


class RowError(ValueError):
    """One row that cannot be used; the message is its reason in the rejects file."""


def pieces(config: DataConfig, split: Split) -> list[str]:
    """What one task each can read: file names of a data directory, else the one generator or Hub stream."""
    return [str(file) for file in _files(config, split)] if config.data_dir is not None else [config.dataset]


def read(config: DataConfig, split: Split, piece: str) -> Iterator[bytes]:
    """The raw rows of one piece as JSON in bytes, streamed."""
    if config.data_dir is not None:
        yield from _read(Path(piece), config.dataset)
    elif config.dataset == "toy":
        for row in _toy(config, split):
            yield json.dumps(row).encode()
    elif config.dataset in HUB_IDS:
        yield from _hub_rows(config.dataset, split)
    else:
        raise DataError(
            f"dataset must be toy, squad or hotpotqa, or come with --data_dir, got {config.dataset} without one"
        )


def fingerprint(config: DataConfig, split: Split) -> str:
    """Hash of what a source holds: file names, sizes and bytes for files; ids and seeds for the Hub and the toy."""
    digest = hashlib.sha256(f"{config.dataset} {split}".encode())
    if config.data_dir is None:
        digest.update(json.dumps([config.toy_people, config.toy_kinds, config.seed]).encode())
        return digest.hexdigest()
    for file in _files(config, split):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def clean(raw: bytes, dataset: str) -> dict[str, Any]:
    """One raw row in the common columns. Raises :class:`RowError` with the reason."""
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"row must be UTF-8, {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise RowError(f"row must be JSON, {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"row must be a mapping, got {type(row).__name__}")
    return {"hotpotqa": _hotpotqa, "text": _unlabelled}.get(dataset, _squad)(row)


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
    facts = row.get("supporting_facts")
    titles = facts.get("title") if isinstance(facts, dict) else [pair[0] for pair in facts or []]
    text = _paragraphs(row.get("context"))
    document = " | ".join(sorted(set(titles))) if titles else _digest(text)
    return _row(row, text, _text(row, "question"), row.get("answer"), document)


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
    if not isinstance(value, str):
        raise RowError(f"{key} must be text, got {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{key} must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{key} must be UTF-8, {error.reason}") from None
    return value.strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------ reading


def _toy(config: DataConfig, split: Split) -> Iterator[dict[str, Any]]:
    """Enough rows for the samples asked for after the development documents are taken out, with a margin."""
    if split == "train":
        count = round((config.samples or 20_000) / (1 - config.dev_fraction) * 1.1) + 4 * config.dev_samples
    else:
        count = config.validation_samples or 512
    seed = 2 * config.seed + (split == "validation")  # the two streams never share a seed
    return toy_rows(count, seed=seed, people=config.toy_people, kinds=config.toy_kinds)


def _files(config: DataConfig, split: Split) -> list[Path]:
    """``<split>*.parquet``/``.jsonl``/``.json`` of the data directory; the official names (``train-v1.1.json``) fit."""
    root = Path(config.data_dir or "")
    if not root.is_dir():
        raise DataError(f"data_dir must be an existing directory, got {root}")
    names = {"train": ("train",), "validation": ("validation", "dev")}[split]
    files = sorted(
        file
        for file in root.rglob("*")
        if file.suffix in (".parquet", ".jsonl", ".json") and any(name in file.stem for name in names)
    )
    if not files:
        there = ", ".join(sorted(file.name for file in root.iterdir())) or "nothing"
        raise DataError(f"{root} must hold {' or '.join(names)} files as parquet, jsonl or json, it holds {there}")
    return files


def _read(file: Path, dataset: str) -> Iterator[bytes]:
    if file.suffix == ".parquet":
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DataError(f"{file} must be Parquet: {error}") from error
        columns = set(parquet.schema_arrow.names)
        if dataset == "text":
            good, wanted = bool(columns & {"text", "context"}), "a column text or context"
        else:
            good = {"context", "question"} <= columns and bool(columns & {"answers", "answer"})
            wanted = "columns context, question and answers"
        if not good:
            raise DataError(f"{file} must have {wanted}, it has {', '.join(sorted(columns))}")
        for batch in parquet.iter_batches(batch_size=BLOCK_ROWS):
            yield from _table_rows(batch)
    elif file.suffix == ".jsonl":
        with file.open("rb") as stream:
            yield from (line for line in stream if line.strip())
    else:
        try:
            document = json.loads(file.read_bytes())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{file} must be JSON in UTF-8: {error}") from error
        yield from (json.dumps(row).encode() for row in _official(document, file))


def _table_rows(batch: pa.RecordBatch) -> Iterator[bytes]:
    """Rows as JSON. A text column may hold bytes that are no UTF-8: such a row is passed on raw, to be rejected."""
    for index in range(batch.num_rows):
        one = batch.slice(index, 1)
        try:
            yield json.dumps(one.to_pylist()[0], default=_plain).encode()
        except UnicodeDecodeError as error:
            yield bytes(error.object)


def _plain(value: Any) -> Any:
    """Parquet types that JSON lacks: bytes are text if they are UTF-8; the rest keeps its type's name."""
    return value.decode("utf-8") if isinstance(value, bytes) else {type(value).__name__: str(value)}


def _official(document: Any, file: Path) -> Iterable[dict[str, Any]]:
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


def _hub_rows(dataset: str, split: Split) -> Iterator[bytes]:
    import datasets

    name, subset = HUB_IDS[dataset]
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
        yield from (json.dumps(row).encode() for row in rows)
    except (ConnectionError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name} cannot be read from the Hub ({reason}). Check the network, log in with `hf auth login`, or give "
            f"a local copy with --data_dir <directory with train and validation files>"
        ) from error
