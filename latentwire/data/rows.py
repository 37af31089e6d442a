"""What a good row is: rows as people write them, brought into one schema.

Every row ends in the same columns: ``id``, ``document`` (rows of one document never straddle a split),
``context``, ``question``, ``answers``. What cannot be brought into that form is a reject with a
reason, never a silent drop.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any] | bytes
"""One raw row: columns, or the bytes of a line of JSON."""
SHOWN = 80
"""Characters of a value that a reason quotes."""


class RowError(ValueError):
    """One row that cannot be used; the message is its reason in the rejects file."""


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
        except (ValueError, RecursionError) as error:
            raise RowError(f"row must be JSON, {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"row must be a mapping, got {type(row).__name__}")
    return row


# ------------------------------------------------------------------------------------------------------------ schemas


def _squad(row: dict[str, Any]) -> dict[str, Any]:
    """SQuAD's columns, which are also those of a user's own file."""
    context = _text(row, "context")
    document = row.get("title") or row.get("document") or _digest(context)
    return _row(row, context, _text(row, "question"), str(document))


def _hotpotqa(row: dict[str, Any]) -> dict[str, Any]:
    """Joins the titled paragraphs, one a line. Accepts the Hub's columns and the official JSON's lists of pairs."""
    document = _supporting_titles(row.get("supporting_facts"))
    text = _paragraphs(row.get("context"))
    return _row(row, text, _text(row, "question"), document or _digest(text))


def _supporting_titles(facts: Any) -> str:
    """Return the titles of the paragraphs that an answer hangs on, which name its document; empty where the row has none."""
    if isinstance(facts, list):
        titles = [pair[0] if isinstance(pair, list) and pair else None for pair in facts]
    else:
        titles = (facts.get("title") if isinstance(facts, dict) else facts) or []
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        raise RowError("supporting_facts must be titles, each with a sentence's number")
    return " | ".join(sorted(set(titles)))


def _unlabelled(row: dict[str, Any]) -> dict[str, Any]:
    """Text alone, from ``text`` or from the ``context`` of a question-answering file; the text itself is its identity."""
    name = "text" if "text" in row else "context"
    value = row.get(name)
    text = _text(row, name) if value is None or isinstance(value, str) else _paragraphs(value)
    # As with questions, or a stage that asks them would be scored on what a stage of texts has trained on.
    supporting = _supporting_titles(row.get("supporting_facts"))
    document = row.get("title") or row.get("document") or supporting or _digest(text)
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


def _row(row: dict[str, Any], context: str, question: str, document: str) -> dict[str, Any]:
    answers = [answer.strip() for answer in answers_of(row) if answer.strip()]
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


def answers_of(row: dict[str, Any]) -> list[str]:
    """A row's answers as they are written: text or ``{"text": …}``, or a list of either.

    Raises :class:`RowError` with the reason.
    """
    answers = row.get("answers")
    if answers is None:
        answers = row.get("answer")
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, str):
        if _WRITTEN.match(answers):
            raise RowError(
                f"answers must not be a list or mapping written as text: {answers[:SHOWN]}; write it as JSON, "
                f"or in a list of one text where it is the answer itself"
            )
        return [answers]
    if not isinstance(answers, list):
        raise RowError(f"answers must be text or a list of text, got {type(answers).__name__}")
    texts: list[str] = []
    for answer in answers:
        text = answer.get("text") if isinstance(answer, dict) else answer
        if not isinstance(text, str):
            raise RowError(f"answers must be text or a list of text, got a list of {type(text).__name__}")
        texts.append(text)
    return texts


_WRITTEN = re.compile(
    r"""\s*( \{ \s* ['"]text['"] \s* :      # {'text': ['Oslo'], 'answer_start': [18]}
          | \[ \s* ['"{] .* ['"}] \s* \] \s*$  # ['Oslo'] or [{'text': 'Oslo'}]
        )""",
    re.VERBOSE | re.DOTALL,
)
"""What Python or JSON writes of answers that are no text, as a table saved as CSV has them."""


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
    configurations: tuple[str, ...] = ()
    """Words by which files name their configuration, where the dataset comes in several."""


_ASKING = (frozenset({"context"}), frozenset({"question"}), frozenset({"answers", "answer"}))
SCHEMAS = {
    "squad": Schema(_squad, _ASKING, ("v1.1", "v2.0", "squad_v2")),
    "hotpotqa": Schema(_hotpotqa, _ASKING, ("distractor", "fullwiki")),
    "text": Schema(_unlabelled, (frozenset({"text", "context"}),)),
}
"""Datasets that are not written as your own files are."""
_OWN = Schema(_squad, _ASKING)


def schema_of(dataset: str) -> Schema:
    """How a dataset's rows are written; your own files' rows are written as SQuAD's are."""
    return SCHEMAS.get(dataset, _OWN)
