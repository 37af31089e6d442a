"""The optimiser and its rates: AdamW, or Muon for the matrices and AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from latentwire.config import TrainingConfig
from latentwire.models.token_codes import TokenCodes
from latentwire.models.unfolding import Unfolding

_AdamW = partial(AdamW, betas=(0.9, 0.98), fused=True)


def optimizer_of(
    interlingua: nn.Module, config: TrainingConfig, closed_form: bool = False
) -> Optimizer:
    """Return the optimiser of everything in ``interlingua`` that is trained.

    ``closed_form``: whether its linear maps began in one, and have a share of their rate.

    Encoder, adapters (with features) and prefixes have rates of their own. Only matrices decay
    (:func:`matrices_of`).
    """
    matrices = matrices_of(interlingua)
    begun = closed_form_of(interlingua) if closed_form else set()
    groups = _groups(interlingua, config, matrices, begun)
    # Muon orthogonalises updates of two dimensions; all others are AdamW's.
    flat: set[nn.Parameter] = set()
    for name, p in interlingua.named_parameters():
        if name in matrices and p.ndim == 2 and p.requires_grad:
            flat.add(p)
    if config.optimizer == "muon" and flat:
        return MuonAndAdamW(_only(groups, flat, True), _only(groups, flat, False))
    return _AdamW(groups)


def matrices_of(module: nn.Module) -> set[str]:
    """Return the names of the parameters that map one space to another: for decay, and Muon.

    Biases, gains, embeddings and tables of vectors (queries, control vectors, positions) are none:
    they are what is read or added as it stands, and have no decay.
    """
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    names = set()
    for name, p in module.named_parameters():
        # Tables of vectors have names of their own; nn.Linear calls its matrix ``weight``.
        is_matrix = p.ndim > 2 or (p.ndim == 2 and name.endswith(".weight"))
        if is_matrix and id(p) not in embeddings:
            names.add(name)
    return names


def closed_form_of(module: nn.Module) -> set[str]:
    """Return the names of the parameters that a closed form can begin."""
    names = set()
    for name, part in module.named_modules():
        if isinstance(part, TokenCodes | Unfolding):
            for parameter, _ in part.linear.named_parameters():
                names.add(f"{name}.linear.{parameter}")
    return names


def _groups(
    interlingua: nn.Module,
    config: TrainingConfig,
    decayed: Collection[str],
    closed_form: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Group parameters by part (its rate) and by decay; empty groups are left out."""
    groups = []
    parts = {
        "encoder": config.encoder_lr,
        "adapters": config.adapter_lr,
        "features": config.adapter_lr,
        "prefixes": config.prefix_lr,
    }
    for part, rate in parts.items():
        named = {}
        for name, p in interlingua.named_parameters():
            if p.requires_grad and name.startswith(f"{part}."):
                named[name] = p
        # Four groups a part. Their order is that of the optimiser's state in earlier checkpoints.
        for begun, share in ((False, 1.0), (True, config.closed_form_lr_share)):
            for decay, chosen in ((config.weight_decay, True), (0.0, False)):
                parameters = []
                for name, p in named.items():
                    if (name in decayed) is chosen and (name in closed_form) is begun:
                        parameters.append(p)
                groups.append({"params": parameters, "lr": share * rate, "weight_decay": decay})
    return [group for group in groups if group["params"]]


def _only(
    groups: list[dict[str, Any]], chosen: set[nn.Parameter], among: bool
) -> list[dict[str, Any]]:
    """Keep of each group the parameters among the chosen (or the others); drop empty groups."""
    parted = []
    for group in groups:
        parameters = [p for p in group["params"] if (p in chosen) is among]
        if parameters:
            parted.append(group | {"params": parameters})
    return parted


def parameter_names(interlingua: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names of the optimiser's parameters, in the order by which its state counts."""
    names = {id(p): name for name, p in interlingua.named_parameters()}
    return _names_in(optimizer.param_groups, names)


def former_names(interlingua: nn.Module, config: TrainingConfig) -> list[str]:
    """Return the names in the order of earlier checkpoints, which held places alone.

    Those let every table of two dimensions decay, so their groups held the parameters in another
    order.
    """
    named = dict(interlingua.named_parameters())
    former = {name for name, p in named.items() if p.ndim >= 2 and "embed" not in name}
    groups = _groups(interlingua, config, former)
    flat = {named[name] for name in former if named[name].ndim == 2 and name.endswith(".weight")}
    if config.optimizer == "muon" and any(p.requires_grad for p in flat):
        groups = [*_only(groups, flat, True), *_only(groups, flat, False)]
    return _names_in(groups, {id(p): name for name, p in named.items()})


def _names_in(groups: list[dict[str, Any]], names: dict[int, str]) -> list[str]:
    """Return the names of the groups' parameters in order. ``names``: id of a parameter → its name."""
    result = []
    for group in groups:
        result += [names[id(p)] for p in group["params"]]
    return result


def rate_share(step: int, total: int, config: TrainingConfig) -> float:
    """Return the share of its peak that every rate has in a step of a run of ``total`` steps.

    Steps count from 0. It rises in equal strides to the peak, which the last step of the warm-up
    has, and falls in a cosine to ``min_lr_ratio``, which the last step of all has. No step has a
    rate of 0 unless ``min_lr_ratio`` says so.
    """
    # Up: 1/w, 2/w, …, 1 in steps 0 to w − 1. Down: m + (1 − m)(1 + cos πf)/2, with f from 0 at step
    # w − 1 to 1 at the last one.
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    peak = max(warmup - 1, 0)
    fallen = min(1.0, (step - peak) / max(1, total - 1 - peak))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * fallen)) / 2


def set_rates(optimizer: Optimizer, share: float) -> None:
    """Set every group's rate to this share of its peak."""
    for group in optimizer.param_groups:
        # The first call finds the peak in ``lr``, and keeps it beside what ``lr`` becomes.
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * share


class MuonAndAdamW(Optimizer):
    """torch's Muon for matrices and its AdamW for the others, as one optimiser.

    Muon's steps are scaled to the size of AdamW's, so both share a rate (arXiv 2502.16982).
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
        """Take groups as torch's optimisers do; ``matrices`` hold two-dimensional parameters."""
        self._muon = Muon(matrices, adjust_lr_fn="match_rms_adamw")
        self._adamw = _AdamW(others)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on this optimiser's groups and state, as rates and states are set here."""
        # Slices hold the same dicts, so a rate that is set here is set there.
        count = len(self._muon.param_groups)
        self._muon.param_groups = self.param_groups[:count]
        self._adamw.param_groups = self.param_groups[count:]
        self._muon.state = self._adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take new groups and state, as ``load_state_dict`` gives them."""
        super().__setstate__(state)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        There is no closure: neither of the two would see the other's.
        """
        self._muon.step()
        self._adamw.step()
