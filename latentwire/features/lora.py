"""Low-rank updates of the receivers' own attention: with them the receivers are not frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from latentwire.config import LoraFeature, RunConfig
from latentwire.features.base import Feature, Reading
from latentwire.models.interlingua import ReceiverShape
from latentwire.models.low_rank import attached, updates_of


class Lora(Feature):
    """Updates of the named linear layers of every receiver, there only while it reads a message."""

    keeps_receivers_frozen = False
    acts_on_text = True
    needs_weights = True

    def __init__(self, options: LoraFeature, run: RunConfig, receivers: Mapping[str, ReceiverShape]) -> None:
        super().__init__(options, run, receivers)
        self.updates = nn.ModuleDict(
            {
                name: updates_of(shape.skeleton(), options.targets, options.rank, options.alpha)
                for name, shape in receivers.items()
            }
        )

    @contextmanager
    def attached(self, receiver: str, lm: Any, reading: Reading) -> Iterator[None]:
        """Adds to the outputs of the updated layers."""
        with attached(lm.lm, self.updates[receiver]):  # type: ignore[arg-type]
            yield
