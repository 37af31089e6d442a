"""``PATH=VALUE`` assignments laid over a configuration."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from latentwire.config import ReceiverConfig, RunConfig, TuneConfig
from latentwire.config.knobs import knob_of
from latentwire.config.resolve import ConfigError, knobs, with_values

LEFT_OUT = ("null", "~", "")
"""Texts by which an optional text is left out."""


def override_run(run: RunConfig, assignments: list[str]) -> RunConfig:
    """Return ``run`` with ``PATH=VALUE`` assignments laid over it. Raises :class:`~latentwire.config.resolve.ConfigError`."""
    values = {path.removeprefix("run."): value for path, value in assigned(assignments).items()}
    return with_values(run, values, "--set")


def assigned(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ``PATH=VALUE`` texts as path (``run.…``, which may be left out, or ``tune.…``) → value.

    Raises :class:`~latentwire.config.resolve.ConfigError` where a sign is missing.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        path, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"--set takes PATH=VALUE, got {text}")
        values[full_path(path)] = typed(path.removeprefix("run."), value)
    return values


def full_path(path: str) -> str:
    """Return a path in a configuration file: ``run.`` may be left out."""
    return path if path.startswith(("run.", "tune.", "search.")) else f"run.{path}"


def typed(path: str, text: str) -> Any:
    """Return a knob's text as it stands where the knob is a text, else as YAML reads it: ``3e-4``, ``true``, ``null``.

    A text that may be left out is so by ``null``, ``~`` or nothing.
    """
    types = _types(_annotation(knob_of(path)))
    # "007" and "yes" stay what they are where only a text is right.
    if str in types and types <= {str, NoneType}:
        return None if NoneType in types and text in LEFT_OUT else text
    # YAML 1.1 takes 3e-4, which has no dot, for a text.
    is_exponential = "e" in text.lower() and text[:1].isdigit()
    try:
        return float(text) if is_exponential else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text


def _annotation(path: str) -> Any:
    """Return the type of the knob at a path, be it a receiver's or the search's own; ``None``: there is no such knob."""
    # receivers.<index>.<knob>
    receivers, *place = path.split(".")
    if receivers == "receivers" and len(place) == 2 and place[0].isdecimal():
        field = ReceiverConfig.model_fields.get(place[1])
    else:
        field = _fields().get(path)
    return None if field is None else field.annotation


@functools.cache
def _fields() -> dict[str, FieldInfo]:
    """Return every knob of a run and of a search by its path."""
    return {**dict(knobs()), **dict(knobs(TuneConfig, "tune."))}


def _types(annotation: Any) -> set[Any]:
    """Return a knob's own type, or those of its union, without what bounds them."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _types(arguments[0])
    # Optional[X] has the first origin, X | None the second.
    if origin in (typing.Union, UnionType):
        return set().union(*map(_types, arguments))
    return {annotation}
