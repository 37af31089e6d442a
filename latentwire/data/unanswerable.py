"""Questions that are put to paragraphs of other documents, which cannot answer them."""

from __future__ import annotations

import random
from bisect import bisect_left

import pyarrow as pa

from latentwire.config import DataConfig
from latentwire.data.sources import DataError

DRAWS = 8
"""Paragraphs that are drawn for a question before it stays, where each is the question's own."""


class Unanswerable:
    """The paragraphs of all documents of a split, and the draw of the questions that go to a strange one.

    A draw depends on ``data.seed`` and the row's id alone.
    """

    def __init__(self, config: DataConfig) -> None:
        """Begin without paragraphs; ``config.unanswerable`` is the share of questions that move."""
        assert config.unanswerable is not None, "every question has its own text"
        self.config, self.share = config, config.unanswerable
        self._paragraphs: set[tuple[str, str]] = set()
        self._sorted: list[tuple[str, str]] = []

    def add(self, rows: pa.Table) -> None:
        """Take up the contexts of some rows, as paragraphs of their documents."""
        pairs = zip(rows["document"].to_pylist(), rows["context"].to_pylist(), strict=True)
        self._paragraphs.update(pairs)

    def check(self) -> None:
        """Order the paragraphs. Raises :class:`~latentwire.data.sources.DataError` where all are of one document."""
        self._sorted = sorted(self._paragraphs)
        documents = {document for document, _ in self._sorted}
        if len(documents) < 2:
            raise DataError(
                f"data.unanswerable {self.share} needs paragraphs of two documents or more, got {len(documents)}; name "
                f"each row's in a column title or document, or leave data.unanswerable out"
            )

    def elsewhere(self, document: str, identity: str, context: str) -> str | None:
        """Return the paragraph of another document that a question is put to; ``None``: it stays.

        A paragraph that stands in several documents is not drawn for its own questions.

        Args:
            document: the question's own.
            identity: its row's id.
            context: the question's own paragraph.
        """
        drawing = random.Random(f"{self.config.seed} unanswerable {identity}")
        if drawing.random() >= self.share:
            return None
        # Paragraphs of a document stand side by side; those before and after them are drawn from.
        # ``document + "\0"`` is the very next text in the order.
        first = bisect_left(self._sorted, (document, ""))
        past = bisect_left(self._sorted, (document + "\0", ""))
        for _ in range(DRAWS):
            place = drawing.randrange(len(self._sorted) - (past - first))
            if place >= first:
                place += past - first
            _, paragraph = self._sorted[place]
            if paragraph != context:
                return paragraph
        return None

    def replaced(self, rows: pa.Table) -> pa.Table:
        """Return rows of which some ask a paragraph that cannot answer, and say so."""
        contexts, answers = rows["context"].to_pylist(), rows["answers"].to_pylist()
        pairs = zip(rows["document"].to_pylist(), rows["id"].to_pylist(), strict=True)
        for row, pair in enumerate(pairs):
            context = self.elsewhere(*pair, contexts[row])
            if context is not None:
                contexts[row], answers[row] = context, [self.config.no_answer]
        changed = {
            "context": pa.array(contexts, pa.string()),
            "answers": pa.array(answers, pa.list_(pa.string())),
        }
        for name, column in changed.items():
            rows = rows.set_column(rows.column_names.index(name), name, column)
        return rows
