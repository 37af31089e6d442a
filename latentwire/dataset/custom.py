"""A user's own files of questions, with SQuAD's columns."""

from __future__ import annotations

from latentwire.dataset.base import Dataset
from latentwire.dataset.squad import clean

DATASET = Dataset(
    name="custom",
    description="files of its trainer's own, with questions",
    clean=clean,
    has_articles=True,
    version=4,
)
