"""SQuAD v1.1: questions about paragraphs of Wikipedia, each answered by a stretch of its paragraph."""

from __future__ import annotations

from typing import Any

from latentwire.dataset.base import Dataset
from latentwire.dataset.rows import digest, document_of, question_row, text_of


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """Read SQuAD's columns, which are also those of a user's own file; an article is a document."""
    context = text_of(row, "context")
    document = document_of(row) or digest(context)
    return question_row(row, context, text_of(row, "question"), document)


DATASET = Dataset(
    name="squad",
    description="SQuAD v1.1 (Rajpurkar et al., 2016), CC BY-SA 4.0",
    clean=clean,
    configurations=("v1.1", "v2.0", "squad_v2"),
    hub_id="rajpurkar/squad",
    has_articles=True,
    official_scores="squad",
)
