"""Where a receiver's weights come from (the embedded toys, a local directory, a GGUF file, or the Hub), and where they go.

transformers is imported where something is loaded: its models take seconds and 150 MB, and a trial that shares its receivers
loads none.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from latentwire.config import EncoderConfig, ReceiverConfig
from latentwire.errors import UserError
from latentwire.storage import sha256

TOY_MODELS = ("toy-llama", "toy-qwen", "toy-phi")


class ReceiverError(UserError):
    """A receiver that cannot be loaded; the message says which, why, and what to do."""


def cache_dir() -> Path:
    """Directory of converted weights: ``$LATENTWIRE_CACHE``, else ``~/.cache/latentwire``."""
    return Path(os.environ.get("LATENTWIRE_CACHE", Path.home() / ".cache" / "latentwire"))


def resolve(config: ReceiverConfig) -> str:
    """A path or Hub id that ``from_pretrained`` loads; converts GGUF on first use.

    Raises :class:`ReceiverError` for a missing embedded model, a directory without weights, or an unreadable GGUF file.
    """
    if config.model in TOY_MODELS:
        return str(resources.files("latentwire") / "toy_pair" / config.model)
    path = Path(config.model)
    if config.model.startswith("toy-") and not path.exists():
        raise ReceiverError(
            f"receiver {config.name}: an embedded model must be one of {', '.join(TOY_MODELS)}, got {config.model}"
        )
    if not path.exists():
        if config.model.startswith((".", "/", "~")) or config.model.count("/") > 1:
            raise ReceiverError(
                f"receiver {config.name}: model must be a Hub id or an existing directory, got {config.model}"
            )
        return config.model
    if not path.is_dir():
        raise ReceiverError(
            f"receiver {config.name}: model must be a directory, got the file {path}; name its directory"
        )
    if (path / "config.json").exists():
        return str(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ReceiverError(
            f"receiver {config.name}: {path} must hold config.json with safetensors, or exactly one .gguf file, got {found}"
        )
    return str(_convert_gguf(files[0], config))


def backbone_source(config: EncoderConfig, receivers: Mapping[str, ReceiverConfig]) -> ReceiverConfig:
    """Where the encoder's backbone comes from, as a receiver's weights are found."""
    return (
        receivers[config.lender]
        if config.lender is not None
        else ReceiverConfig(name="encoder", model=config.model or "")
    )


def load_from(kind: Any, config: ReceiverConfig, **options: Any) -> Any:
    """What a class of transformers (``AutoTokenizer``, ``AutoModel`` …) loads of a receiver. Raises :class:`ReceiverError`."""
    try:
        return kind.from_pretrained(
            resolve(config), revision=config.revision, trust_remote_code=config.trust_remote_code, **options
        )
    except (OSError, ValueError) as error:
        raise loading_error(config, error) from error


def load_tokenizer(config: ReceiverConfig) -> Any:
    """The receiver's tokenizer, without its weights. Raises :class:`ReceiverError`."""
    from transformers import AutoTokenizer

    return load_from(AutoTokenizer, config)


def load_hf_config(config: ReceiverConfig) -> Any:
    """The receiver's transformers configuration, without its weights. Raises :class:`ReceiverError`."""
    from transformers import AutoConfig

    return load_from(AutoConfig, config)


def skeleton(config: ReceiverConfig) -> nn.Module:
    """The receiver's model without its weights, on the meta device. Raises :class:`ReceiverError`."""
    from transformers import AutoModelForCausalLM

    shape = load_hf_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(shape)
    except ValueError as error:
        raise loading_error(config, error) from error


def pick_device(wanted: str = "auto") -> torch.device:
    """``auto`` is CUDA, then MPS, then CPU."""
    if wanted != "auto":
        device = torch.device(wanted)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ReceiverError(f"device must exist on this machine, got {wanted} and no CUDA; use device: auto")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on CUDA and float32 elsewhere."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, wanted)


def _convert_gguf(file: Path, config: ReceiverConfig) -> Path:
    """Dequantise once into fp32 safetensors, in a cache directory named by the file's hash."""
    target = cache_dir() / "gguf" / sha256(file)[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        from transformers import AutoModelForCausalLM, AutoTokenizer

        print(f"receiver {config.name}: converting {file.name} once into {target}", flush=True)
        try:
            with torch.device("cpu"):  # planners ask for a model's shape under the meta device, which holds no weights
                model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:
            raise ReceiverError(
                f"receiver {config.name}: {file} cannot be read as GGUF ({error}); fetch it again"
            ) from error
        _forget_quantisation(model)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            os.rename(aside, target)
            os.mkdir(aside)  # for the context manager to remove
    return target


def _forget_quantisation(model: Any) -> None:
    """transformers refuses to save what it loaded from GGUF, although the weights are plain fp32 by now."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)


def fingerprint(model: Any) -> str:
    """SHA-256 over names, shapes, types and bytes of a module's weights and buffers, quantised ones included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        for part, plain in _plain(name, tensor):
            digest.update(f"{part} {tuple(plain.shape)} {plain.dtype}".encode())
            raw: Any = plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(raw)
    return digest.hexdigest()


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or the plain tensors that a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        if (inner := getattr(tensor, part)) is not None:
            yield from _plain(f"{name}.{part}", inner)


def loading_error(config: ReceiverConfig, error: Exception) -> ReceiverError:
    """One clear message for everything that goes wrong between a Hub id or a directory and loaded weights."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = {
        "encoder": "--set encoder.model=<directory>",
        "llama": "--llama_id <directory>",
        "qwen": "--qwen_id <directory>",
    }.get(config.name, "run.receivers in the space file")
    if "attention" in reason and "support" in reason:
        move = f"set attn_implementation: eager for it, got {config.attn_implementation}"
    elif "Unrecognized configuration class" in reason:
        move = "its architecture must be one that AutoModelForCausalLM knows: no encoder, no sequence-to-sequence model"
    elif Path(config.model).is_dir():
        move = "its directory must hold config.json, weights as safetensors and a fast tokenizer (tokenizer.json)"
    else:
        move = (
            f"there is no directory {Path(config.model).absolute()}; if it is a Hub id: log in with `hf auth login` where the "
            f"model is gated, check the network, or give a local directory by {where}"
        )
    return ReceiverError(f"receiver {config.name}: {config.model} cannot be loaded ({reason}); {move}")
