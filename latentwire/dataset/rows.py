"""Rows as people write them, brought into the columns that all datasets share.

They are ``id``, ``document`` (rows of one document never straddle a split), ``context``, ``question``
and ``answers``. A row that cannot be brought into that form is a reject with a reason, never a silent
drop.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

Row = dict[str, Any] | bytes
"""One raw row: columns, or the bytes of a line of JSON."""
SHOWN = 80
"""Characters of a value that a reason quotes."""


class RowError(ValueError):
    """One row that cannot be used; the message is its reason in the rejects file."""


class NoAnswerError(RowError):
    """A row without an answer, as SQuAD 2.0 has them, in the common columns but for that."""

    def __init__(self, row: dict[str, Any]) -> None:
        """Take the row, whose ``answers`` are empty."""
        super().__init__("answers must not be empty")
        self.row = row


def parsed(raw: Row) -> dict[str, Any]:
    """Return a raw row as a mapping; a line of a file is read as JSON. Raises :class:`RowError` with the reason."""
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


def question_row(row: dict[str, Any], context: str, question: str, document: str) -> dict[str, Any]:
    """Return the common columns of a row with a question; answers and id are read from the row.

    Raises :class:`NoAnswerError` for one without answers.
    """
    answers = [answer.strip() for answer in answers_of(row) if answer.strip()]
    identity = row.get("id", row.get("_id"))
    common = {
        "id": str(identity) if identity is not None else digest(f"{context}\0{question}"),
        "document": document,
        "context": context,
        "question": question,
        "answers": answers,
    }
    if not answers:
        raise NoAnswerError(common)
    return common


def answers_of(row: dict[str, Any]) -> list[str]:
    """Return a row's answers as they are written: text or ``{"text": …}``, or a list of either.

    A column that holds null has none.

    Raises :class:`RowError` with the reason.
    """
    answers = row.get("answers")
    if answers is None:
        answers = row.get("answer")
    # A column that holds null says that there are none; a row without the column breaks the form.
    if answers is None and ("answers" in row or "answer" in row):
        return []
    # SQuAD's form on the Hub: {"text": […], "answer_start": […]}.
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
            raise RowError(
                f"answers must be text or a list of text, got a list of {type(text).__name__}"
            )
        texts.append(text)
    return texts


_WRITTEN = re.compile(
    r"""\s*( \{ \s* ['"]text['"] \s* :      # {'text': ['Oslo'], 'answer_start': [18]}
          | \[ \s* ['"{] .* ['"}] \s* \] \s*$  # ['Oslo'] or [{'text': 'Oslo'}]
        )""",
    re.VERBOSE | re.DOTALL,
)
"""Answers that are no text, as Python or JSON writes them into a table that is saved as CSV."""


def document_of(row: dict[str, Any]) -> str:
    """Return the title or document that a row names, a number too; empty where it names none."""
    named = (row.get("title"), row.get("document"))
    return next((str(name) for name in named if name is not None and name != ""), "")


def text_of(row: dict[str, Any], key: str) -> str:
    """Return a column's text without white space around it. Raises :class:`RowError` with the reason."""
    value = row.get(key)
    if value is None:
        names = ", ".join(str(name) for name, held in row.items() if held is not None)
        # Names may hold lone surrogates too, and a reason is written as UTF-8.
        shown = names[:SHOWN].encode("utf-8", "replace").decode() or "nothing"
        raise RowError(f"{key} is missing: the row has {shown}")
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


def digest(text: str) -> str:
    """Return a short hash of a text, which names it where nothing else does."""
    # surrogatepass: a lone half of a surrogate pair, as JSON can hold, is no error here.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
