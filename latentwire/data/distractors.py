"""Other paragraphs of a document around each context: a text in which the answer must be found."""

from __future__ import annotations

import random
from collections import defaultdict

import pyarrow as pa

from latentwire.config import DataConfig
from latentwire.data.sources import DataError


class Distractors:
    """The paragraphs of all documents of a split, and the draw of those that stand around one.

    A draw depends on ``data.seed``, the paragraph and its document alone, so that all questions to a
    paragraph share a text.
    """

    def __init__(self, config: DataConfig) -> None:
        """Begin without documents; ``config.distractors`` says how many are drawn."""
        assert config.distractors is not None, "contexts stand alone"
        self.config = config
        self.fewest, self.most = config.distractors
        self._paragraphs: defaultdict[str, set[str]] = defaultdict(set)

    def add(self, rows: pa.Table) -> None:
        """Take up the contexts of some rows, as paragraphs of their documents."""
        pairs = zip(rows["document"].to_pylist(), rows["context"].to_pylist(), strict=True)
        for document, context in pairs:
            self._paragraphs[document].add(context)

    def check(self) -> None:
        """Raise :class:`~latentwire.data.sources.DataError` where no document has two paragraphs."""
        if all(len(paragraphs) < 2 for paragraphs in self._paragraphs.values()):
            raise DataError(
                f"data.distractors {self.fewest} to {self.most} needs documents of several paragraphs, got "
                f"{len(self._paragraphs):,} of one each; name each row's in a column title or document, or "
                f"leave data.distractors out"
            )

    def around(self, document: str, context: str) -> str:
        """Return a text of a context and others of its document, one a line, in a drawn order.

        No longer than ``data.max_context_bytes``: what is drawn and does not fit is left out.
        """
        drawing = random.Random(f"{self.config.seed} distractors {context}")
        count = drawing.randint(self.fewest, self.most)
        # A set has another order in every process: sorted, the draw is the same in all of them.
        others = sorted(self._paragraphs[document] - {context})
        drawing.shuffle(others)
        lines = [_line(context)]
        room = self.config.max_context_bytes - len(lines[0].encode())
        for other in map(_line, others):
            size = len(other.encode()) + 1  # and the end of a line
            # ``lines`` counts the context itself: up to ``count`` others join it.
            if len(lines) <= count and size <= room:
                lines.append(other)
                room -= size
        drawing.shuffle(lines)
        return "\n".join(lines)

    def replaced(self, rows: pa.Table) -> pa.Table:
        """Return rows whose contexts stand among others of their documents."""
        pairs = zip(rows["document"].to_pylist(), rows["context"].to_pylist(), strict=True)
        texts = pa.array([self.around(*pair) for pair in pairs], pa.string())
        return rows.set_column(rows.column_names.index("context"), "context", texts)


def _line(paragraph: str) -> str:
    return " ".join(paragraph.split("\n"))
