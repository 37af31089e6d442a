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
from latentwire.pretrained.weights import ReceiverError


class Lora(Feature):
    """Updates of named linear layers of every receiver, only while it reads a message."""

    keeps_receivers_frozen = False
    acts_on_text = True
    needs_weights = True

    def __init__(
        self, options: LoraFeature, run: RunConfig, receivers: Mapping[str, ReceiverShape]
    ) -> None:
        super().__init__(options, run, receivers)
        self.updates = nn.ModuleDict()
        self.heads: dict[str, str] = {}
        """Receiver → the name of its output head, where that is a target."""
        for name, shape in receivers.items():
            model: Any = shape.skeleton()
            self.updates[name] = updates_of(model, options.targets, options.rank, options.alpha)
            head = model.get_output_embeddings()
            # The head's names; a model may have it under several paths.
            modules = model.named_modules()
            names = [path.split(".")[-1] for path, module in modules if module is head]
            targets = [target for target in names if target in options.targets]
            if targets:
                self.heads[name] = targets[0]

    def check_training(self) -> None:
        """Raise :class:`~latentwire.pretrained.weights.ReceiverError` where an output head is a target.

        Logits may be taken in chunks, whose gradients go to the states alone: it would not learn.
        """
        for receiver, target in self.heads.items():
            raise ReceiverError(
                f"features.lora.targets must be layers before the output head, got {target}, the "
                f"head of receiver {receiver}; leave it out"
            )

    @contextmanager
    def attached(self, receiver: str, lm: Any, reading: Reading) -> Iterator[None]:
        """Add to the outputs of the updated layers."""
        with attached(lm.lm, self.updates[receiver]):  # type: ignore[arg-type]
            yield
