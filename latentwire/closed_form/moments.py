"""Sums over tokens, gathered in one pass: all that a regression needs to know of the texts.

Parts of the pass may run anywhere and in any order: their sums are added.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from latentwire.errors import UserError
from latentwire.storage import Place, local, place, write

FORMAT = "latentwire-moments-1"
"""Marks a file of this kind."""


class ClosedFormError(UserError):
    """Moments that cannot be added, read or solved."""


@dataclass
class ReceiverMoments:
    """Sums over the tokens of one receiver's E targets, float64."""

    y_E: torch.Tensor
    """Sum of targets y."""
    yy_E: torch.Tensor
    """Sum of their squares, entry by entry."""
    xy_ME: torch.Tensor
    """Sum of x yᵀ."""
    gradient_EE: torch.Tensor
    """Sum of g gᵀ, where g is a loss's gradient by y, in y's own units."""
    gradients: int = 0
    """Rows g that were added; they may come from other tokens than the targets."""

    @classmethod
    def empty(cls, width: int, entries: int) -> ReceiverMoments:
        """Return sums of nothing; ``width``: of the sender's states, ``entries``: of targets."""
        y_E, yy_E = zeros(entries), zeros(entries)
        return cls(y_E, yy_E, zeros(width, entries), zeros(entries, entries))


@dataclass
class Moments:
    """Sums over tokens: of the sender's states x, M wide, and of each receiver's targets."""

    count: int
    """Tokens."""
    x_M: torch.Tensor
    """Sum of x."""
    xx_MM: torch.Tensor
    """Sum of x xᵀ."""
    receivers: dict[str, ReceiverMoments] = field(default_factory=dict)

    @classmethod
    def empty(cls, width: int, entries: Mapping[str, int]) -> Moments:
        """Return sums of nothing.

        Args:
            width: of the sender's states.
            entries: of each receiver's targets.
        """
        receivers = {name: ReceiverMoments.empty(width, size) for name, size in entries.items()}
        return cls(0, zeros(width), zeros(width, width), receivers)

    @torch.no_grad()
    def add_tokens(self, x_NM: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> None:
        """Add N tokens: the sender's states, and for every receiver the targets ``y_NE``.

        Products of a batch are fp32 and computed where its tensors are; sums are float64.
        """
        assert targets.keys() == self.receivers.keys(), "every receiver has targets for a token"
        assert all(len(y_NE) == len(x_NM) for y_NE in targets.values()), "a row for each token"
        if not len(x_NM):
            return
        x_M, centred_NM = centred(x_NM)
        for name, receiver in self.receivers.items():
            y_E, centred_NE = centred(targets[name])
            add_products(receiver.xy_ME, centred_NM, centred_NE, x_M, y_E)
            # Σ y² = Σ (y − mean y)² + (Σ y)² / N, entry by entry.
            squares_E = centred_NE.square().sum(0, dtype=torch.float64) + y_E.square() / len(x_NM)
            receiver.y_E += y_E.to(receiver.y_E.device)
            receiver.yy_E += squares_E.to(receiver.yy_E.device)
        add_products(self.xx_MM, centred_NM, centred_NM, x_M, x_M)
        self.x_M += x_M.to(self.x_M.device)
        self.count += len(x_NM)

    @torch.no_grad()
    def add_gradients(self, name: str, g_NE: torch.Tensor) -> None:
        """Add N gradients of the loss by one receiver's targets, in the targets' own units."""
        receiver = self.receivers[name]
        # Only the mean of g gᵀ matters: gradients stay uncentred.
        receiver.gradient_EE += product(g_NE.float(), g_NE.float()).to(receiver.gradient_EE.device)
        receiver.gradients += len(g_NE)

    def merge(self, other: Moments) -> None:
        """Add the sums of another part of the pass to these.

        Raises:
            ClosedFormError: they are of other widths, or of other receivers.
        """
        if self.widths() != other.widths():
            raise ClosedFormError(
                f"moments that are added must have the same widths, got {self.widths()} and "
                f"{other.widths()}; gather both with the same sender and receivers"
            )
        sums, others = self.tensors(), other.tensors()
        # tensors() gives the sums themselves, which += changes in place.
        for key, total in sums.items():
            total += others[key].to(total.device)
        for name, receiver in self.receivers.items():
            receiver.gradients += other.receivers[name].gradients
        self.count += other.count

    def widths(self) -> dict[str, int]:
        """Return the width of the sender's states, named ``x``, and of each receiver's targets."""
        entries = {f"y of {name}": len(one.y_E) for name, one in sorted(self.receivers.items())}
        return {"x": len(self.x_M)} | entries

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the sums themselves, by the names that they have in a file."""
        tensors = {"x": self.x_M, "xx": self.xx_MM}
        for name, receiver in self.receivers.items():
            tensors[f"{name}.y"] = receiver.y_E
            tensors[f"{name}.yy"] = receiver.yy_E
            tensors[f"{name}.xy"] = receiver.xy_ME
            tensors[f"{name}.gradient"] = receiver.gradient_EE
        return tensors

    def save(self, path: str | Place) -> None:
        """Write one safetensors file, whole or not at all."""
        gradients = {name: receiver.gradients for name, receiver in self.receivers.items()}
        metadata = {"format": FORMAT, "count": str(self.count), "gradients": json.dumps(gradients)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}
        write(place(path), functools.partial(save_file, tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | Place) -> Moments:
        """Read a file of :meth:`save`.

        Raises:
            ClosedFormError: no such file, or one of another kind.
        """
        try:
            with local(place(path)) as file, safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ClosedFormError(
                        f"moments must be a {FORMAT} file, got {metadata.get('format')} at {path}; "
                        f"gather them anew"
                    )
                receivers = {}
                for name, gradients in json.loads(metadata["gradients"]).items():
                    receivers[name] = ReceiverMoments(
                        opened.get_tensor(f"{name}.y"),
                        opened.get_tensor(f"{name}.yy"),
                        opened.get_tensor(f"{name}.xy"),
                        opened.get_tensor(f"{name}.gradient"),
                        gradients,
                    )
                x_M, xx_MM = opened.get_tensor("x"), opened.get_tensor("xx")
                return cls(int(metadata["count"]), x_M, xx_MM, receivers)
        except (OSError, SafetensorError) as error:
            raise ClosedFormError(
                f"moments must be a file of Moments.save, got {path} ({error}); gather them anew"
            ) from error


def zeros(*shape: int) -> torch.Tensor:
    """Return float64 zeros on the CPU."""
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


def centred(x_NM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of N rows (float64), and the rows less their mean (fp32)."""
    x_M = x_NM.sum(0, dtype=torch.float64)
    return x_M, x_NM.float() - (x_M / len(x_NM)).float()


def product(a_NM: torch.Tensor, b_NE: torch.Tensor) -> torch.Tensor:
    """Return the sum of a bᵀ over N rows in fp32, also where autocast is on."""
    with torch.autocast(a_NM.device.type, enabled=False):
        return a_NM.T @ b_NE


def add_products(
    total_ME: torch.Tensor,
    centred_NM: torch.Tensor,
    centred_NE: torch.Tensor,
    x_M: torch.Tensor,
    y_E: torch.Tensor,
) -> None:
    """Add the sum of x yᵀ over N rows to ``total_ME``, from centred rows and the rows' sums.

    A few entries of a model's states have means far larger than their spread. Of x yᵀ itself fp32
    would keep too few digits of the covariance.
    """
    # addr_ adds an outer product in place, here [M] ⊗ [E].
    # Σ x yᵀ = Σ (x − mean x)(y − mean y)ᵀ + (Σ x)(Σ y)ᵀ / N, the last term in float64.
    total_ME += product(centred_NM, centred_NE).to(total_ME.device)
    total_ME.addr_(x_M.to(total_ME.device), y_E.to(total_ME.device) / len(centred_NM))
