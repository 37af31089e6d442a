"""The base of every part of the configuration, and how a knob is defined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from latentwire.addresses import expanded, refuse_secrets


def _as_text(given: Any) -> Any:
    """Return a path as a text; anything else as it is."""
    return str(given) if isinstance(given, Path) else given


def _named(address: str) -> str:
    """Return an address; an empty one would be the current directory, whatever that holds."""
    if not address.strip():
        raise ValueError(
            f"an address must name a directory or URI, got {address!r}; is a variable of the shell "
            f"not set? The current directory is ."
        )
    return address


Address = Annotated[
    str,
    BeforeValidator(_as_text),
    AfterValidator(_named),
    AfterValidator(refuse_secrets),
    AfterValidator(expanded),
    # Once more: what a variable stood for may hold credentials.
    AfterValidator(refuse_secrets),
]
"""A directory, or a URI without credentials: configurations are written into results and reports. ``~`` and ``$NAME`` are
replaced where it is read, so that they mean the same on every machine."""
Model = Annotated[str, BeforeValidator(_as_text), AfterValidator(expanded)]
"""A Hub id, a directory, or the name of an embedded model."""


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors; instances do not change after validation."""

    # use_attribute_docstrings: the text below a field is its description on the page of knobs.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def knob(
    *default: Any,
    shards: Literal["value", "content", "reading"] | None = None,
    teachers: Literal["value", "size"] | None = None,
    protocol: bool = False,
    may_change: Sequence[
        Literal["resumed run", "resumed sweep", "repeated trial", "cloned trial"]
    ] = (),
    smaller_costs_more: bool = False,
    steps: Literal["more", "fewer"] | None = None,
    changes_receivers: bool = False,
    calibrates: bool = False,
    **bounds: Any,
) -> Any:
    """Define a knob with what hangs on it; :func:`latentwire.config.knobs.paths_with` lists knobs by these properties.

    Args:
        default: its default; none where it must be given.
        shards: shards hang on its ``value``, on the ``content`` of what it names (files, a
            tokenizer, a rendered template), or only the way of ``reading`` them does. A search may
            vary it by enumerable choices alone.
        teachers: teachers' columns hang on its ``value``, or it is a ``size``: columns for the
            largest value serve the smaller ones too. A search varies ``value`` by choices alone.
        protocol: scores under different values must not be compared.
        may_change: what goes on, is repeated, or begins with another's wire, under another value of it.
        smaller_costs_more: a run with the smallest value needs most memory; otherwise the largest.
        steps: a larger value makes for ``more`` or ``fewer`` optimiser steps.
        changes_receivers: trials that differ in it cannot share receivers.
        calibrates: the calibration of retrieval heads hangs on it, each value of it by files of its
            own. A search varies it by choices alone.
        bounds: as for :func:`pydantic.Field`.
    """
    properties: dict[str, Any] = {
        "shards": shards,
        "teachers": teachers,
        "protocol": protocol,
        "may_change": tuple(may_change),
        "smaller_costs_more": smaller_costs_more,
        "steps": steps,
        "changes_receivers": changes_receivers,
        "calibrates": calibrates,
    }
    # pydantic keeps json_schema_extra beside a field: knobs.properties reads it from there.
    return Field(
        *default,
        json_schema_extra={name: value for name, value in properties.items() if value},
        **bounds,
    )
