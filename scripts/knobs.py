"""Write docs/knobs.md: every knob of a space file, with its default, its bounds and what it does.

python scripts/knobs.py
"""

from __future__ import annotations

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
from latentwire.config.space import CategoricalDimension, FloatDimension, IntDimension

PAGE = Path(__file__).parent.parent / "docs" / "knobs.md"
HEAD = """# Every knob

What a space file may hold, made from the configuration itself by `python scripts/knobs.py`; CI checks that it is current.
`--set <path>=<value>` reaches every path below `run` without that prefix, and those below `tune` with it; `search` takes
numbers, choices and switches below `run`, but none of `receivers`, and no lists or schedules.
"""
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "at least", "max_length": "at most"}


def page() -> str:
    """The whole page."""
    dimensions = (FloatDimension, IntDimension, CategoricalDimension)
    searched = (line for one in dimensions for line in sections(one, f"search.<path>: {one.__name__}"))
    return "\n".join([HEAD, *sections(SweepConfig, ""), *searched]) + "\n"


def sections(model: type[BaseModel], path: str) -> Iterator[str]:
    """A table of a section's own knobs, then those of the sections in it."""
    nested = {name: found for name, field in model.model_fields.items() if (found := section_in(field)) is not None}
    own = {name: field for name, field in model.model_fields.items() if name not in nested}
    if own:
        yield f"\n## {f'`{path}`' if path else 'A space file'}\n\n{_prose(model.__doc__ or '')}\n"
        yield "| knob | type | default | bounds | what |\n|---|---|---|---|---|"
        yield from (f"| `{name}` | {kind(field)} | {default(field)} | {bounds(field)} | {_prose(field.description or '')} |"
                    for name, field in own.items())  # fmt: skip
    for name, (inner, many) in nested.items():
        yield from sections(inner, f"{path}.{name}".lstrip(".") + ("[]" if many else ""))


def section_in(field: FieldInfo) -> tuple[type[BaseModel], bool] | None:
    """The one section that a field holds, and whether it holds several."""
    found = [one for one in _parts(field.annotation) if isinstance(one, type) and issubclass(one, BaseModel)]
    return (found[0], typing.get_origin(field.annotation) in (tuple, dict)) if len(found) == 1 else None


def _parts(annotation: Any) -> list[Any]:
    inner = [part for part in typing.get_args(annotation) if part is not type(None)]
    return [leaf for part in inner for leaf in _parts(part)] if inner else [annotation]


def kind(field: FieldInfo) -> str:
    """Its type as a user would say it."""
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
    """What it is where nothing is said."""
    if field.is_required():
        return "must be given"
    found = field.get_default(call_default_factory=True)
    if found is None:
        return "none"
    if isinstance(found, bool):
        return "yes" if found else "no"
    return (
        f"`{found if not isinstance(found, tuple | dict | str) else repr(found)}`" if found not in ((), {}) else "empty"
    )


def bounds(field: FieldInfo) -> str:
    """What its value must be within."""
    told = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata if isinstance(rule, BaseMetadata)
        for name, sign in SIGNS.items() if hasattr(rule, name)
    ]  # fmt: skip
    return ", ".join(told)


def _prose(docstring: str) -> str:
    """Docstring markup as Markdown, in one line."""
    text = re.sub(r":\w+:`~?[\w.]*?(\w+)`", r"`\1`", " ".join(docstring.split()))
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
