"""Quantised receivers: how they are loaded, and what weights that are quantised already say."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from latentwire.config import ReceiverConfig
from latentwire.pretrained.files import ReceiverError


def quantization_config(config: ReceiverConfig) -> Any:
    """Return transformers' settings for int8 (torchao) or NF4 (bitsandbytes).

    Raises :class:`ReceiverError` where the package is not installed.
    """
    package = "torchao" if config.quantization == "int8" else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        raise ReceiverError(
            f"receiver {config.name}: quantization {config.quantization} needs {package}, which "
            f"is not installed; pip install 'latentwire[quantization]', or set quantization: none"
        )
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if config.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def keep_layout(lm: nn.Module) -> None:
    """Keep the memory layout of 4-bit weights.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 arranges them anew in the first forward pass, and
    undoes only half of that when their state is read (for a fingerprint, say): the next pass gives
    other answers.
    """
    module: Any
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantised_by(shape: Any) -> Mapping[str, Any] | None:
    """Return a transformers configuration's quantisation; ``None``: its weights are plain."""
    settings = getattr(shape, "quantization_config", None)
    # A model of text and images keeps it in the part that is its language model.
    settings = settings or getattr(shape.get_text_config(), "quantization_config", None)
    return settings if settings is None or isinstance(settings, Mapping) else settings.to_dict()


def check_readable(config: ReceiverConfig, shape: Any) -> None:
    """Raise :class:`ReceiverError` for a quantisation that cannot be read here, or a second one.

    ``shape``: the transformers configuration of the receiver.
    """
    if (quantised := quantised_by(shape)) is None:
        return
    from transformers.quantizers import AutoHfQuantizer

    method = quantised.get("quant_method")
    if config.quantization != "none":
        raise ReceiverError(
            f"receiver {config.name}: quantization {config.quantization} needs plain weights, "
            f"{config.model} is quantised already ({method}); set quantization: none"
        )
    try:
        if not AutoHfQuantizer.supports_quant_method(quantised):
            raise ValueError(f"transformers knows no quantization_config.quant_method {method}")
        AutoHfQuantizer.from_config(dict(quantised), pre_quantized=True).validate_environment(
            device_map=None
        )
    except (ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ReceiverError(
            f"receiver {config.name}: {config.model} is quantised in a way that cannot be read "
            f"here ({reason}); name its plain weights and set quantization: int8 or nf4"
        ) from error
    except RuntimeError:
        # No GPU on this machine: the planner's need not have one.
        pass
