"""Names of searched paths at the head of a table's columns."""

from __future__ import annotations

from collections.abc import Iterable


def column_names(paths: Iterable[str]) -> dict[str, str]:
    """Name a column for each dotted path: its last part, and as many before as tell it from others.

    Of ``encoder.heads`` and ``features.deep_prefix.heads`` both keep a section: ``encoder.heads``
    and ``deep_prefix.heads``.
    """
    parts_of = {path: path.split(".") for path in paths}
    names = {}
    for path, words in parts_of.items():
        count = 1
        while any(
            other[-count:] == words[-count:] for key, other in parts_of.items() if key != path
        ):
            count += 1
        names[path] = ".".join(words[-count:])
    return names
