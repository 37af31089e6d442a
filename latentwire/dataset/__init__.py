"""Datasets, one file each: what its rows look like, where they come from, how they are scored.

A module here that defines ``DATASET`` adds a dataset, and nothing else need be touched:
``data.dataset`` takes its name, and all that differs between datasets is asked of that object.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from latentwire.dataset.base import Dataset
from latentwire.dataset.rows import NoAnswerError, Row, RowError, answers_of, parsed

__all__ = [
    "DATASETS",
    "Dataset",
    "NoAnswerError",
    "Row",
    "RowError",
    "answers_of",
    "clean",
    "parsed",
]


def _registered() -> dict[str, Dataset]:
    datasets: dict[str, Dataset] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        if hasattr(module, "DATASET"):  # base and rows define none
            datasets[module.DATASET.name] = module.DATASET
    return datasets


DATASETS = _registered()
"""Every dataset by its name."""


def clean(raw: Row, dataset: str) -> dict[str, Any]:
    """Return a raw row in the common columns, all of it valid UTF-8.

    Raises:
        RowError: the row cannot be used; the message is its reason in the rejects file.
    """
    cleaned = DATASETS[dataset].clean(parsed(raw))
    for name, value in cleaned.items():
        for text in value if isinstance(value, list) else [value]:
            # JSON may escape half of a surrogate pair, which Python takes and Parquet does not.
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RowError(f"{name} must be UTF-8, {error.reason}") from None
    return cleaned
