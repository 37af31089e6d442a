"""Loading of weights: the embedded toys, a local directory, a GGUF file, or the Hub.

transformers is imported where something is loaded: its models take seconds and 150 MB, and a trial
that shares its receivers loads none.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn

from latentwire.config import EncoderConfig, ReceiverConfig
from latentwire.models import files
from latentwire.models.files import ReceiverError as ReceiverError
from latentwire.storage import expanded, sha256

TOY_MODELS = ("toy-llama", "toy-qwen", "toy-phi")
PROBE = "Where is Ada?"
"""A text of which every tokenizer with a vocabulary makes several different tokens."""


def cache_dir() -> Path:
    """Return the directory of converted weights (``$LATENTWIRE_CACHE``)."""
    return Path(expanded(os.environ.get("LATENTWIRE_CACHE", "~/.cache/latentwire")))


def resolve(config: ReceiverConfig) -> str:
    """Return a path or Hub id that ``from_pretrained`` loads; converts GGUF on first use.

    Raises :class:`ReceiverError` for a missing embedded model, a directory without a model or with
    several, git-lfs pointers, or an unreadable GGUF file.
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
    with _named(config):
        if path.is_dir():
            return str(_of_directory(path, config))
        if path.suffix == ".gguf":
            return str(_convert_gguf(files.check_gguf(path), config))
    raise ReceiverError(
        f"receiver {config.name}: model must be a directory or a .gguf file, got the file {path}; name its directory"
    )


def _of_directory(path: Path, config: ReceiverConfig) -> Path:
    """Return the directory to load from: plain weights come before a GGUF beside them."""
    has_config = (path / "config.json").exists()
    if not (has_config and files.weight_files(path)):
        gguf = files.choose_gguf(path)
        if gguf is not None:
            return _convert_gguf(gguf, config)
    if not has_config:
        raise ReceiverError(
            f"{path} must hold config.json with safetensors, or exactly one .gguf file, got none; "
            f"name another directory"
        )
    files.refuse_pointers(path)
    return path


@contextmanager
def _named(config: ReceiverConfig) -> Iterator[None]:
    """Name the receiver in errors about its files."""
    try:
        yield
    except ReceiverError as error:
        if str(error).startswith("receiver "):
            raise
        raise ReceiverError(f"receiver {config.name}: {error}") from error


def backbone_source(
    config: EncoderConfig, receivers: Mapping[str, ReceiverConfig]
) -> ReceiverConfig:
    """Return the source of the encoder's backbone, in the form of a receiver's."""
    if config.lender is not None:
        return receivers[config.lender]
    return ReceiverConfig(name="encoder", model=config.model or "")


def load_from(kind: Any, config: ReceiverConfig, **options: Any) -> Any:
    """Load a receiver's part by a class of transformers (``AutoTokenizer``, ``AutoModel`` …).

    Raises :class:`ReceiverError`.
    """
    try:
        return kind.from_pretrained(
            resolve(config),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise loading_error(config, error) from error


def load_tokenizer(config: ReceiverConfig) -> Any:
    """Load the receiver's tokenizer, without its weights.

    Raises :class:`ReceiverError`, also for one without a vocabulary: transformers makes that for
    some architectures where no file of a tokenizer is there.
    """
    from transformers import AutoTokenizer

    tokenizer = load_from(AutoTokenizer, config)
    if len(set(ids := tokenizer(PROBE, add_special_tokens=False).input_ids)) < 2:
        raise ReceiverError(
            f"receiver {config.name}: {config.model} must come with its tokenizer, the one that "
            f"it gives reads {PROBE!r} as {ids}; put its tokenizer.json (or tokenizer.model) "
            f"beside its weights"
        )
    return tokenizer


def load_model(kind: Any, config: ReceiverConfig, **options: Any) -> Any:
    """Load a model, all of whose weights must be there and fit its config.json.

    Raises :class:`ReceiverError` otherwise: transformers would draw what is missing at random.
    Weights that are quantised, or are to be, have other names and shapes, which are left to their
    quantiser.
    """
    source = Path(resolve(config))
    if source.is_dir():
        with _named(config):
            files.check_weights(source)
    if "quantization_config" in options or quantised_by(load_hf_config(config)) is not None:
        return load_from(kind, config, **options)
    model, report = load_from(
        kind, config, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    _refuse_misfit(model, config, report)
    return model


def _refuse_misfit(model: nn.Module, config: ReceiverConfig, report: Mapping[str, Any]) -> None:
    """Raise :class:`ReceiverError` where transformers' report of loading names a misfit."""
    mismatched = sorted(report["mismatched_keys"])
    # Nothing reads the output of a pooler.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    known = {_NUMBER.sub("N", name) for name, _ in model.named_parameters()}
    # Others than those of one more layer are parts that no receiver has, such as a vision tower.
    beyond = sorted(key for key in report["unexpected_keys"] if _NUMBER.sub("N", key) in known)
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
    written = getattr(model.config, "architectures", None) or []
    if type(model).__name__.endswith(causal) and not any(name.endswith(causal) for name in written):
        return f"config.json names {', '.join(written) or 'no architecture'}, where a causal LM is needed; name one"
    return "fetch both from one place"


_NUMBER = re.compile(r"\d+")


def _sizes(shape: Any) -> str:
    return " × ".join(map(str, shape))


def load_hf_config(config: ReceiverConfig) -> Any:
    """Load the receiver's transformers configuration. Raises :class:`ReceiverError`."""
    from transformers import AutoConfig

    return load_from(AutoConfig, config)


def receiver_shape(config: ReceiverConfig) -> Any:
    """Load the transformers configuration of a model that can be a receiver.

    Raises :class:`ReceiverError` for an architecture whose layers look token ids up, which a soft
    prompt has not, and for a quantisation that cannot be read.
    """
    from transformers.quantizers import AutoHfQuantizer

    shape = load_hf_config(config)
    if getattr(shape.get_text_config(), "hidden_size_per_layer_input", 0):
        raise ReceiverError(
            f"receiver {config.name}: {config.model} gives every layer embeddings of its token "
            f"ids ({type(shape).__name__}.hidden_size_per_layer_input), which a soft prompt has "
            f"not; name a model without them, such as Gemma 3"
        )
    if (quantised := quantised_by(shape)) is None:
        return shape
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
        pass  # no GPU on this machine: the planner's need not have one
    return shape


def quantised_by(shape: Any) -> Mapping[str, Any] | None:
    """Return a transformers configuration's quantisation; ``None``: its weights are plain."""
    settings = getattr(shape, "quantization_config", None)
    settings = settings or getattr(shape.get_text_config(), "quantization_config", None)
    return settings if settings is None or isinstance(settings, Mapping) else settings.to_dict()


def skeleton(config: ReceiverConfig, *, check: bool = True) -> nn.Module:
    """Build the receiver's model without its weights, on the meta device.

    ``check``: hold weights in a directory against it (:func:`check_fit`). Raises
    :class:`ReceiverError`.
    """
    from transformers import AutoModelForCausalLM

    shape = receiver_shape(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape)
    except ValueError as error:
        raise loading_error(config, error) from error
    if check:
        check_fit(AutoModelForCausalLM, config)
    return model


def check_fit(kind: Any, config: ReceiverConfig) -> None:
    """Raise :class:`ReceiverError` where a directory's weights do not fit its config.json.

    Only their headers are read. What is on the Hub is held against its configuration when it is
    loaded.
    """
    if Path(resolve(config)).is_dir():
        # transformers refuses to load where the meta device is the default, even onto it.
        with torch.device("cpu"), _silent():
            load_model(kind, config, device_map="meta")


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from reporting what it loads: our error for a misfit is one line."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of that name; ``auto`` is CUDA, then MPS, then CPU."""
    if name != "auto":
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ReceiverError(
                f"device must exist on this machine, got {name} and no CUDA; use device: auto"
            )
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type of that name; ``auto`` is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


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
            # Planners ask for a model's shape under the meta device, which holds no weights.
            with torch.device("cpu"):
                model, report = AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
                )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:
            raise ReceiverError(
                f"receiver {config.name}: {file} cannot be read as GGUF ({_first_line(error)}); "
                f"fetch it again, or another quantisation of it"
            ) from error
        _refuse_misfit(model, config, report)
        _forget_quantisation(model)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            folder = Path(aside) / target.name  # as readable as the umask allows, unlike ``aside``
            folder.mkdir()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            # As the umask says: safetensors leaves private files.
            readable = (folder / "config.json").stat().st_mode
            for file in folder.glob("*.safetensors"):
                file.chmod(readable)
            folder.rename(target)
    return target


def _forget_quantisation(model: Any) -> None:
    """Remove the marks of GGUF's quantisation: the weights are plain fp32 by now.

    transformers refuses to save a model that has them.
    """
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)


def fingerprint(model: Any) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        for part, plain in _plain(name, tensor):
            digest.update(f"{part} {tuple(plain.shape)} {plain.dtype}".encode())
            raw: Any = plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(raw)
    return digest.hexdigest()


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tensor, or the plain tensors that a quantised one is made of, with their names."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        if (inner := getattr(tensor, part)) is not None:
            yield from _plain(f"{name}.{part}", inner)


def loading_error(config: ReceiverConfig, error: Exception) -> ReceiverError:
    """Make one clear error of everything that goes wrong in loading weights."""
    reason = _first_line(error)
    where = {
        "encoder": "--set encoder.model=<directory>",
        "llama": "--llama_id <directory>",
        "qwen": "--qwen_id <directory>",
    }.get(config.name, "run.receivers in the configuration")
    if config.name.startswith("sender_"):  # see models/senders.py
        where = "--set encoder.senders=<directories>"
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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
