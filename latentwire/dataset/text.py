"""Texts without questions, from files of texts or from those of the question-answering datasets."""

from __future__ import annotations

from typing import Any

from latentwire.dataset.base import Dataset
from latentwire.dataset.hotpotqa import paragraphs, supporting_titles
from latentwire.dataset.rows import digest, document_of, text_of


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """Read the column ``text`` or ``context``; the text itself is the row's identity.

    Documents are those that the questions about the same text have, or a stage that asks them would be
    scored on what a stage of texts has trained on.
    """
    name = "text" if "text" in row else "context"
    value = row.get(name)
    is_text = value is None or isinstance(value, str | bytes)
    text = text_of(row, name) if is_text else paragraphs(value)
    # HotpotQA's rows have no title: documents are named as dataset/hotpotqa.py names them.
    supporting = supporting_titles(row.get("supporting_facts"))
    document = document_of(row) or supporting or digest(text)
    return {
        "id": digest(text),
        "document": document,
        "context": text,
        "question": "",
        "answers": [],
    }


DATASET = Dataset(
    name="text",
    description="texts without questions",
    clean=clean,
    columns=(frozenset({"text", "context"}),),
    has_questions=False,
    version=5,
)
