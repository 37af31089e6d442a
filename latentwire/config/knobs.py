"""All knobs by their paths, and by the properties that :func:`~latentwire.config.section.knob` gives them."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from latentwire.config.run import RunConfig
from latentwire.config.stages import STAGES

APART = ("receivers", STAGES)
"""Sections of a run that are lists or mappings of others."""


def knobs(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every knob of a section and of those in it, by its path; receivers' and stages' are left out."""
    for name, field in model.model_fields.items():
        section = section_in(field.annotation)
        # losses.schedules is a knob itself: its keys are the names of other knobs.
        if section is not None and name not in (*APART, "schedules"):
            yield from knobs(section, f"{prefix}{name}.")
        elif name not in APART:
            yield f"{prefix}{name}", field


def knob_of(path: str) -> str:
    """Return the path below ``run`` of the knob that a path names, be it the run's or a stage's."""
    stage, knob = parted(path)
    return path if stage is None else knob


def parted(path: str) -> tuple[str | None, str]:
    """Return the stage that a path below ``run`` belongs to, and the path in it; no stage: that of all."""
    # stages.<name>.<path below run>
    words = path.split(".", 2)
    if words[0] == STAGES and len(words) > 2:
        return words[1], words[2]
    return None, path


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field of this type holds, alone, optionally, or several times."""
    # Section | None, tuple[Section, ...] and dict[str, Section] have it among their arguments.
    for option in typing.get_args(annotation) or (annotation,):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def properties(field: FieldInfo) -> Mapping[str, Any]:
    """Return a knob's properties; those that it does not have are left out."""
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}


def paths_with(
    name: str, value: str | None = None, model: type[BaseModel] = RunConfig
) -> tuple[str, ...]:
    """Return the paths of all knobs that have a property.

    Args:
        name: the property, an argument of :func:`~latentwire.config.section.knob`.
        value: only where it is this, or holds this. None: whatever it is.
        model: the section whose knobs are meant.
    """
    return tuple(path for path, field in knobs(model) if _has(field, name, value))


def has_property(path: str, name: str, value: str | None = None) -> bool:
    """Return whether the knob at a path below ``run`` has a property.

    A path may go on below the knob, into a mapping or list: ``receivers.0.model``,
    ``training.worker_resources.GPU``. It may be a stage's: ``stages.answers.training.max_steps``.
    """
    section: type[BaseModel] | None = RunConfig
    field = None
    for part in knob_of(path).split("."):
        # What is no field (an index, a name) is passed over: the knob above it stays.
        if section is not None and part in section.model_fields:
            field = section.model_fields[part]
            section = section_in(field.annotation)
    return field is not None and _has(field, name, value)


def _has(field: FieldInfo, name: str, value: str | None) -> bool:
    given = properties(field).get(name)
    if value is None or given is None:
        return given is not None
    # may_change holds several values, every other property one.
    return value in given if isinstance(given, tuple) else given == value
