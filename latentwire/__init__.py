"""LatentWire: one text, compressed once into a few latent vectors, read by several frozen LLMs.

    from latentwire import LatentWire, tune

    result = tune("toy", output="runs/first", overrides={"tune.trials": 2})
    wire = LatentWire.from_pretrained(result.export)
    packet = wire.encode(contexts).to_bytes(bits=8)
    answers = wire.answer(packet, questions, receiver="qwen")

A name is loaded when it is used, so that commands start without what they do not need.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentwire.api.evaluate import evaluate
    from latentwire.api.sweep import Sweep
    from latentwire.api.train import train, train_seeds
    from latentwire.api.tune import tune
    from latentwire.config import RunConfig, SweepConfig
    from latentwire.errors import UserError
    from latentwire.message import Message, WireError
    from latentwire.model import LatentWire
    from latentwire.models.decoded import Sampling
    from latentwire.prefilled import Prefilled

# Threads of one operation wait for each other asleep. By default they spin, and where other
# processes want the same cores, what they wait for cannot run. OpenMP reads this once, when torch
# is loaded, and Ray's workers inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = [
    "LatentWire",
    "Message",
    "Prefilled",
    "RunConfig",
    "Sampling",
    "Sweep",
    "SweepConfig",
    "UserError",
    "WireError",
    "evaluate",
    "train",
    "train_seeds",
    "tune",
]
__version__ = "0.2.0"

_HOMES = {
    "LatentWire": "latentwire.model",
    "Message": "latentwire.message",
    "Prefilled": "latentwire.prefilled",
    "RunConfig": "latentwire.config",
    "Sampling": "latentwire.models.decoded",
    "Sweep": "latentwire.api.sweep",
    "SweepConfig": "latentwire.config",
    "UserError": "latentwire.errors",
    "WireError": "latentwire.message",
    "evaluate": "latentwire.api.evaluate",
    "train": "latentwire.api.train",
    "train_seeds": "latentwire.api.train",
    "tune": "latentwire.api.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module latentwire has no attribute {name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
