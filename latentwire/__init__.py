"""LatentWire: one text, compressed once into a few latent vectors, read by several frozen LLMs.

    from latentwire import LatentWire

    wire = LatentWire.from_pretrained("runs/x/best")
    packet = wire.encode(contexts).to_bytes(bits=8)
    answers = wire.answer(packet, questions, receiver="qwen")

What stands here is loaded when it is used, so that the command lines start without what they do not need.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentwire.message import Message, WireError
    from latentwire.model import LatentWire

# Threads of one operation wait for each other asleep. By default they spin, and where other processes want the same cores,
# what they wait for cannot run. OpenMP reads this once, when torch is loaded, and Ray's workers inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = ["LatentWire", "Message", "WireError"]
__version__ = "0.1.0"

_HOMES = {"LatentWire": "latentwire.model", "Message": "latentwire.message", "WireError": "latentwire.message"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module latentwire has no attribute {name}")
    return getattr(importlib.import_module(_HOMES[name]), name)
