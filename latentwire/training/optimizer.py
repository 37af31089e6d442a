"""What updates the weights: AdamW all of them, or Muon the matrices and AdamW the rest."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from latentwire.config import TrainingConfig

_AdamW = partial(AdamW, betas=(0.9, 0.98), fused=True)


def optimizer_of(interlingua: nn.Module, config: TrainingConfig) -> Optimizer:
    """The optimiser of everything in ``interlingua`` that is trained: encoder and adapters (with features), each at its rate.

    Vectors, gains and embeddings have no decay.
    """
    groups, matrices = [], set()
    parts = {"encoder": config.encoder_lr, "adapters": config.adapter_lr, "features": config.adapter_lr}
    for part, rate in parts.items():
        named = {n: p for n, p in interlingua.named_parameters() if p.requires_grad and n.startswith(part)}
        decayed = {name: p for name, p in named.items() if p.ndim >= 2 and "embed" not in name}
        others = [p for name, p in named.items() if name not in decayed]
        groups.append({"params": list(decayed.values()), "lr": rate, "weight_decay": config.weight_decay})
        groups.append({"params": others, "lr": rate, "weight_decay": 0.0})
        # A table of vectors (queries, controls, places) is no map from one space to another: ``.weight`` alone is.
        matrices |= {p for name, p in decayed.items() if p.ndim == 2 and name.endswith(".weight")}
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "muon" and matrices:
        return MuonAndAdamW(_only(groups, matrices, True), _only(groups, matrices, False))
    return _AdamW(groups)


def _only(groups: list[dict[str, Any]], chosen: set[nn.Parameter], wanted: bool) -> list[dict[str, Any]]:
    """The groups with those of their parameters that are (or are not) among the chosen; empty ones are left out."""
    parted = [group | {"params": [p for p in group["params"] if (p in chosen) is wanted]} for group in groups]
    return [group for group in parted if group["params"]]


class MuonAndAdamW(Optimizer):
    """torch's Muon for matrices and its AdamW for the others, as one optimiser to schedulers and checkpoints.

    Muon's steps are scaled to the size of AdamW's, so both share a rate (arXiv 2502.16982).
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
        """Groups as torch's optimisers take them; those of ``matrices`` hold parameters of two dimensions alone."""
        self._muon = Muon(matrices, adjust_lr_fn="match_rms_adamw")
        self._adamw = _AdamW(others)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on this optimiser's groups and state: whoever sets a rate or loads a state does it here."""
        count = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self._muon.state = self._adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by ``load_state_dict`` with new groups and state."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. No closure: neither of the two would see the other's."""
        self._muon.step()
        self._adamw.step()
