"""Features by the name they have in ``run.features``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from latentwire.config import RunConfig
from latentwire.features.base import Feature
from latentwire.features.coprocessor import Coprocessor
from latentwire.features.deep_prefix import DeepPrefix
from latentwire.features.latent_adapters import LatentAdapters
from latentwire.features.lora import Lora
from latentwire.features.refiner import Refiner
from latentwire.models.interlingua import ReceiverShape

FEATURES: dict[str, type[Feature]] = {
    "refiner": Refiner,
    "deep_prefix": DeepPrefix,
    "coprocessor": Coprocessor,
    "latent_adapters": LatentAdapters,
    "lora": Lora,
}


def build(run: RunConfig, receivers: Mapping[str, ReceiverShape]) -> nn.ModuleDict:
    """Build the features that the configuration names."""
    features = nn.ModuleDict()
    for name, feature in FEATURES.items():
        options = getattr(run.features, name)
        if options is not None:
            features[name] = feature(options, run, receivers)
    return features


def check_training(features: nn.ModuleDict) -> None:
    """Raise a :class:`~latentwire.errors.UserError` where a part of a feature would not learn."""
    feature: Any
    for feature in features.values():
        feature.check_training()


def keeps_receivers_frozen(run: RunConfig) -> bool:
    """Return whether all features that are on leave the receivers' own weights as they act."""
    for name, feature in FEATURES.items():
        is_on = getattr(run.features, name) is not None
        if is_on and not feature.keeps_receivers_frozen:
            return False
    return True
