"""Errors of loading weights, as one line with the next move."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from latentwire.config import ReceiverConfig
from latentwire.pretrained.files import ReceiverError

_NUMBER = re.compile(r"\d+")


def refuse_misfit(model: nn.Module, config: ReceiverConfig, report: Mapping[str, Any]) -> None:
    """Raise :class:`ReceiverError` where transformers' report of loading names a misfit."""
    mismatched = sorted(report["mismatched_keys"])
    # Nothing reads the output of a pooler.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    # model.layers.7.mlp … and model.layers.8.mlp … are one part: numbers become N.
    known = {_NUMBER.sub("N", name) for name, _ in model.named_parameters()}
    # Others than those of one more layer are parts that no receiver has, such as a vision tower.
    unexpected = report["unexpected_keys"]
    beyond = sorted(key for key in unexpected if _NUMBER.sub("N", key) in known)
    if mismatched:
        name, stored, expected = mismatched[0]
        fault = f"{name} is {_sizes(stored)} in the weights and {_sizes(expected)} by config.json"
    elif missing:
        fault = f"the weights lack {missing[0]}"
    elif beyond:
        fault = f"config.json has no place for {beyond[0]}"
    else:
        return
    others = f"{len(mismatched or missing or beyond):,} such"
    raise ReceiverError(
        f"receiver {config.name}: config.json and weights of {config.model} must be of one model, "
        f"but {fault} ({others}); {_next_move(model)}"
    )


def _next_move(model: nn.Module) -> str:
    """Say whether other files are needed, or another model: an encoder read as a causal LM lacks its head."""
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    config: Any = model.config
    written = getattr(config, "architectures", None) or []
    if type(model).__name__.endswith(causal) and not any(name.endswith(causal) for name in written):
        return f"config.json names {', '.join(written) or 'no architecture'}, where a causal LM is needed; name one"
    return "fetch both from one place"


def _sizes(shape: Any) -> str:
    return " × ".join(map(str, shape))


def loading_error(config: ReceiverConfig, error: Exception) -> ReceiverError:
    """Make one clear error of everything that goes wrong in loading weights."""
    reason = first_line(error)
    where = {
        "encoder": "--set encoder.model=<directory>",
        "llama": "--llama_id <directory>",
        "qwen": "--qwen_id <directory>",
    }.get(config.name, "run.receivers in the configuration")
    # models/senders.py names them so.
    if config.name.startswith("sender_"):
        where = "--set encoder.senders=<directories>"
    # Their classes do not tell these errors apart, their words do.
    if "attention" in reason and "support" in reason:
        move = f"set attn_implementation: eager for it, got {config.attn_implementation}"
    elif "Unrecognized configuration class" in reason:
        move = "its architecture must be one that AutoModelForCausalLM knows: no encoder, no sequence-to-sequence model"
    elif Path(config.model).is_dir():
        move = "its directory must hold config.json, weights as safetensors and a fast tokenizer (tokenizer.json)"
    else:
        move = (
            f"there is no directory {Path(config.model).absolute()}; if it is a Hub id: log in "
            f"with `hf auth login` where the model is gated, check the network, or give a local "
            f"directory by {where}"
        )
        if config.model.startswith("receivers/"):
            move = f"{move}; `make receivers` lays out those of the shipped configurations"
    return ReceiverError(
        f"receiver {config.name}: {config.model} cannot be loaded ({reason}); {move}"
    )


def first_line(error: Exception) -> str:
    """Return the first line of what an error says; the name of its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
