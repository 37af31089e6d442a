"""What every part of the configuration is."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from latentwire.storage import expanded, refuse_secrets

Address = Annotated[str, AfterValidator(refuse_secrets), AfterValidator(expanded), AfterValidator(refuse_secrets)]
"""A directory, or a URI without credentials: configurations are written into results and reports. ``~`` and ``$NAME`` are
replaced where it is read, so that they mean the same on every machine."""
Model = Annotated[str, AfterValidator(expanded)]
"""A Hub id, a directory, or the name of an embedded model."""


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors; instances do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)
