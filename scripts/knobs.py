"""Write docs/reference/knobs.md: every knob of a configuration file, its default, its bounds, what hangs on it, what it does.

python scripts/knobs.py
"""

from __future__ import annotations

import itertools
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from annotated_types import BaseMetadata
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from latentwire.config import SweepConfig
from latentwire.config.knobs import properties
from latentwire.config.space import CategoricalDimension, FloatDimension, IntDimension

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "knobs.md"
HEAD = """# Every knob

The knobs of a configuration file, written from the configuration itself by `python scripts/knobs.py`; CI checks that the
page is current. `--set <path>=<value>` reaches every path below `run` without that prefix, and those below `tune` with it.
`search` takes numbers, choices and switches below `run`, but none of `receivers`, and no lists or schedules. A stage's own
value of a knob is `stages.<name>.<knob>` ([Stages](../guides/stages.md)).

A file may begin with `extends:`, the name or path of one or several other configurations that it is laid over
(`extends: toy`, `extends: [receivers/smollm2, my_recipe.yaml]`). The file wins over what it extends, and of these the
later over the earlier. Sections merge knob by knob; lists and search dimensions are replaced whole, and a dimension that
is `null` is taken out. Receivers given by name (`receivers: {smollm2: {model: …}}`) merge too, and all of them have what
stands under `each`. The shipped files are in `latentwire/spaces`.

The column *hangs on it* says what else a knob decides:

| mark | meaning |
|---|---|
| shards | It names the shards, so a search varies it by choices alone. *content*: by what it stands for. *reading*: it does not. |
| teachers | It names teachers' columns. *size*: those for the largest value serve the smaller ones. |
| protocol | Scores under different values must not be compared. |
| may change | It may be another one where a run or a sweep is resumed, or a trial repeated or cloned. |
| smaller costs more | The smallest value needs most memory; of other knobs the largest. |
| steps | A larger value makes for more, or fewer, optimiser steps. |
| own receivers | Trials that differ in it cannot share receivers. |

"""
SIGNS = {
    "ge": "≥",
    "gt": ">",
    "le": "≤",
    "lt": "<",
    "min_length": "at least",
    "max_length": "at most",
}
LABELS = {
    "may_change": "may change",
    "smaller_costs_more": "smaller costs more",
    "changes_receivers": "own receivers",
}


def page() -> str:
    """Return the whole page."""
    dimensions = (FloatDimension, IntDimension, CategoricalDimension)
    lines = [HEAD.rstrip() + "\n", *sections(SweepConfig, "")]
    # search: holds a union of these, which sections() does not go into.
    for one in dimensions:
        lines += sections(one, f"search.<path>: {one.__name__}")
    return "\n".join(lines) + "\n"


def sections(model: type[BaseModel], path: str) -> Iterator[str]:
    """Yield a table of a section's own knobs, then those of the sections in it."""
    nested = {}
    for name, field in model.model_fields.items():
        if (inner_section := section_in(field)) is not None:
            nested[name] = inner_section
    fields = {name: field for name, field in model.model_fields.items() if name not in nested}
    if fields:
        yield f"\n## {f'`{path}`' if path else 'A configuration file'}\n\n{_prose(model.__doc__ or '')}\n"
        yield "| knob | type | default | bounds | hangs on it | what |\n|---|---|---|---|---|---|"
    for name, field in fields.items():
        cells = [
            f"`{name}`",
            kind(field),
            default(field),
            bounds(field),
            marks(field),
            _prose(field.description or ""),
        ]
        yield f"| {' | '.join(cells)} |"
    for name, (inner, many) in nested.items():
        by_name = typing.get_origin(model.model_fields[name].annotation) is dict
        each = ".<name>" if by_name else "[]"
        yield from sections(inner, f"{path}.{name}".lstrip(".") + (each if many else ""))


def section_in(field: FieldInfo) -> tuple[type[BaseModel], bool] | None:
    """Return the one section that a field holds, and whether it holds several of it."""
    types_in = [part for part in _parts(field.annotation) if isinstance(part, type)]
    inner = [part for part in types_in if issubclass(part, BaseModel)]
    if len(inner) != 1:
        return None
    return inner[0], typing.get_origin(field.annotation) in (tuple, dict)


def _parts(annotation: Any) -> list[Any]:
    # tuple[X | None, ...] is parted into X and the dots, Annotated[X, …] into X and its bounds.
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    if not inner:
        return [annotation]
    return list(itertools.chain.from_iterable(map(_parts, inner)))


def kind(field: FieldInfo) -> str:
    """Return a knob's type as a user would say it."""
    # A bar would end the table's cell.
    return _kind(field.annotation).replace("|", "or")


def _kind(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if origin in (typing.Union, types.UnionType):
        return " | ".join("none" if one is type(None) else _kind(one) for one in inner)
    if origin is tuple:
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return f"{_kind(inner[0])} to {_kind(inner[1])}"
    names = {bool: "yes or no", int: "whole number", float: "number", str: "text", Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default(field: FieldInfo) -> str:
    """Return a knob's value where nothing is said."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in ((), {}):
        return "empty"
    return f"`{repr(value) if isinstance(value, tuple | dict | str) else value}`"


def bounds(field: FieldInfo) -> str:
    """Return what a knob's value must be within."""
    words = []
    # annotated_types: Ge has .ge, MinLen has .min_length, and so on.
    for rule in field.metadata:
        if isinstance(rule, BaseMetadata):
            words += [
                f"{sign} {getattr(rule, name)}"
                for name, sign in SIGNS.items()
                if hasattr(rule, name)
            ]
    return ", ".join(words)


def marks(field: FieldInfo) -> str:
    """Return a knob's properties, as the head of the page explains them."""
    words = []
    for name, value in properties(field).items():
        label = LABELS.get(name, name)
        detail = ", ".join(value) if isinstance(value, tuple) else value
        words.append(label if value in (True, "value") else f"{label}: {detail}")
    return "; ".join(words)


def _prose(docstring: str) -> str:
    """Return docstring markup as Markdown, in one line."""
    # Sphinx's roles become code, and paths of documents links from docs/reference/.
    text = re.sub(r":\w+:`~?[\w.]*?(\w+)`", r"`\1`", " ".join(docstring.split()))
    text = re.sub(r"\bdocs/([\w/]+)\.md", r"[\1](../\1.md)", text)
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
