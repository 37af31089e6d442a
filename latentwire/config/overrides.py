"""``PATH=VALUE`` assignments laid over a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from latentwire.config import RunConfig
from latentwire.config.knobs import knob_of
from latentwire.config.resolve import ConfigError, knobs, with_values


def override_run(run: RunConfig, assignments: list[str]) -> RunConfig:
    """Return ``run`` with ``PATH=VALUE`` assignments laid over it. Raises :class:`~latentwire.config.resolve.ConfigError`."""
    return with_values(
        run,
        {path.removeprefix("run."): value for path, value in assigned(assignments).items()},
        "--set",
    )


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
    """Return a knob's text as it stands where the knob is a text, else as YAML reads it: ``3e-4``, ``true``, ``null``."""
    field = dict(knobs()).get(knob_of(path))
    if field is not None and field.annotation is str:
        return text
    try:
        return float(text) if "e" in text.lower() and text[:1].isdigit() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text
