"""Low-rank updates of linear layers (LoRA, arXiv 2106.09685), laid over them by hooks.

Hooks rather than a library that replaces modules: the updated model keeps its modules, names, hash
and gradient flags, which is what lets a receiver be proved unchanged, and the update is there only
while it is attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from latentwire.pretrained.weights import ReceiverError


class LowRank(nn.Module):
    """``scale · B(A(x))`` for one linear layer; zero at first."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the update, in the type of ``x`` and on its device."""
        return (self.scale * self.up(self.down(x.to(self.down.weight)))).to(x)


def updates_of(model: nn.Module, targets: Iterable[str], rank: int, alpha: float) -> nn.ModuleDict:
    """Build an update for each linear layer whose last name is among ``targets``.

    It lies under the layer's path with ``/`` for dots.

    Raises :class:`ReceiverError` where a target names no linear layer.
    """
    names = set(targets)
    layers: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.split(".")[-1] in names:
            layers[path] = module
    if missing := names - {path.split(".")[-1] for path in layers}:
        raise ReceiverError(
            f"targets must name linear layers of {type(model).__name__}, got {', '.join(sorted(missing))}"
        )
    # A name in a ModuleDict may hold no dot.
    return nn.ModuleDict(
        {path.replace(".", "/"): LowRank(m, rank, alpha / rank) for path, m in layers.items()}
    )


@contextmanager
def attached(model: nn.Module, updates: nn.ModuleDict) -> Iterator[None]:
    """Add ``updates`` (:func:`updates_of` the same model) to its layers' outputs meanwhile."""
    with ExitStack() as stack:
        for key, update in updates.items():
            layer = model.get_submodule(key.replace("/", "."))

            # By its default value each hook keeps its own update, not the loop's last.
            def add(
                _: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor, update: Any = update
            ) -> torch.Tensor:
                return output + update(inputs[0])

            stack.callback(layer.register_forward_hook(add).remove)
        yield
