"""Names of searched paths at the head of a table's columns."""

from __future__ import annotations

from collections.abc import Iterable

from latentwire.config.knobs import parted


def column_names(paths: Iterable[str]) -> dict[str, str]:
    """Name a column for each dotted path: its last part, and as many before as tell it from others.

    Of ``encoder.heads`` and ``features.deep_prefix.heads`` both keep a section: ``encoder.heads``
    and ``deep_prefix.heads``. A stage's knob has the stage's name before it: ``answers: heads``.
    """
    parts_of = {path: parted(path) for path in paths}
    names = {}
    for path, (stage, knob) in parts_of.items():
        words = knob.split(".")
        others = []
        for other_path, (of_other, other) in parts_of.items():
            if of_other == stage and other_path != path:
                others.append(other.split("."))
        # One more word from the end until no other path ends alike.
        count = 1
        while any(other[-count:] == words[-count:] for other in others):
            count += 1
        name = ".".join(words[-count:])
        names[path] = name if stage is None else f"{stage}: {name}"
    return names
