"""The description that every dataset gives of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from latentwire.config import DataConfig

QUESTION_COLUMNS = (
    frozenset({"context"}),
    frozenset({"question"}),
    frozenset({"answers", "answer"}),
)
"""Columns of a Parquet file with questions and answers."""


@dataclass(frozen=True)
class Dataset:
    """A dataset: its rows, where they come from, and how answers to them are scored."""

    name: str
    """Its name in ``data.dataset`` and in the names of shards."""
    description: str
    """Name, source and licence, as a model card quotes them."""
    clean: Callable[[dict[str, Any]], dict[str, Any]]
    """A row as it was written → the columns ``id``, ``document``, ``context``, ``question``, ``answers``.
    Raises :class:`~latentwire.dataset.rows.RowError`."""
    columns: tuple[frozenset[str], ...] = QUESTION_COLUMNS
    """Columns that a Parquet file must have: one of each of these sets."""
    configurations: tuple[str, ...] = ()
    """Words by which files name their configuration, where the dataset comes in several."""
    hub_id: str | None = None
    """Its id on the Hub. None: it is not there."""
    hub_configuration: str | None = None
    """The configuration that is read from the Hub unless ``data.config`` names another."""
    has_questions: bool = True
    """Without questions a text is read once, however many rows hold it, and nothing is scored."""
    has_articles: bool = False
    """Contexts are paragraphs, of which a document has several."""
    generate: (
        Callable[[DataConfig, Literal["train", "validation"]], Iterator[dict[str, Any]]] | None
    ) = None
    """Makes the rows of a split by ``data.seed``, for a dataset that reads no files."""
    version: int | None = None
    """Version of its rows: one more wherever the same files, or ``generate`` by the same seed, give other rows.
    None: that of all datasets of files (:data:`latentwire.data.shards.SHARD_VERSION`), above which it must stay."""
    official_scores: Literal["squad", "hotpotqa"] | None = None
    """Whose script scores files of answers to it (:func:`latentwire.evaluation.metrics.score_file`)."""

    @property
    def exact_yes_no(self) -> bool:
        """True where a yes or no that is not exactly right has an F1 of 0, as in HotpotQA's script."""
        return self.official_scores == "hotpotqa"
