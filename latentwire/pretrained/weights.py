"""Loading of weights: the embedded toys, a local directory, a GGUF file, or the Hub.

transformers is imported where something is loaded: its models take seconds and 150 MB, and a trial
that shares its receivers loads none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from latentwire.config import EncoderConfig, ReceiverConfig
from latentwire.pretrained import files
from latentwire.pretrained.errors import loading_error, refuse_misfit
from latentwire.pretrained.files import ReceiverError as ReceiverError
from latentwire.pretrained.gguf import convert_gguf
from latentwire.pretrained.quantization import check_readable, quantised_by

TOY_MODELS = ("toy-llama", "toy-qwen", "toy-phi")
PROBE = "Where is Ada?"
"""A text of which every tokenizer with a vocabulary makes several different tokens."""


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
        # A Hub id is <name> or <owner>/<name>.
        if config.model.startswith((".", "/", "~")) or config.model.count("/") > 1:
            raise ReceiverError(
                f"receiver {config.name}: model must be a Hub id or an existing directory, got {config.model}"
            )
        return config.model
    with _named(config):
        if path.is_dir():
            return str(_of_directory(path, config))
        if path.suffix == ".gguf":
            return str(convert_gguf(files.check_gguf(path), config))
    raise ReceiverError(
        f"receiver {config.name}: model must be a directory or a .gguf file, got the file {path}; name its directory"
    )


def _of_directory(path: Path, config: ReceiverConfig) -> Path:
    """Return the directory to load from: plain weights come before a GGUF beside them."""
    has_config = (path / "config.json").exists()
    if not (has_config and files.weight_files(path)):
        gguf = files.choose_gguf(path)
        if gguf is not None:
            return convert_gguf(gguf, config)
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


def text_files(config: ReceiverConfig) -> tuple[tuple[str, int, int], ...]:
    """Return name, time of change and size of each file beside a receiver's weights.

    A tokenizer that was loaded stays what it is while they are the same. None for a Hub id, whose
    revision is fetched once. Raises :class:`ReceiverError` by :func:`resolve`.
    """
    folder = Path(resolve(config))
    if not folder.is_dir():
        return ()
    # A new time of change is enough: contents are not read.
    places = [place for place in sorted(folder.iterdir()) if place.suffix != ".safetensors"]
    abouts = [(place.name, place.stat()) for place in places]
    return tuple((name, about.st_mtime_ns, about.st_size) for name, about in abouts)


def load_tokenizer(config: ReceiverConfig) -> Any:
    """Load the receiver's tokenizer, without its weights.

    Raises :class:`ReceiverError`, also for one without a vocabulary: transformers makes that for
    some architectures where no file of a tokenizer is there.
    """
    from transformers import AutoTokenizer

    tokenizer = load_from(AutoTokenizer, config)
    # Without a vocabulary everything is one unknown token.
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
    # Mismatched sizes are ignored so that they come into the report, and are refused from there.
    model, report = load_from(
        kind, config, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    refuse_misfit(model, config, report)
    return model


def load_hf_config(config: ReceiverConfig) -> Any:
    """Load the receiver's transformers configuration. Raises :class:`ReceiverError`."""
    from transformers import AutoConfig

    return load_from(AutoConfig, config)


def receiver_shape(config: ReceiverConfig) -> Any:
    """Load the transformers configuration of a model that can be a receiver.

    Raises :class:`ReceiverError` for an architecture whose layers look token ids up, which a soft
    prompt has not, and for a quantisation that cannot be read.
    """
    # Gemma 3n has such embeddings, for example.
    shape = load_hf_config(config)
    if getattr(shape.get_text_config(), "hidden_size_per_layer_input", 0):
        raise ReceiverError(
            f"receiver {config.name}: {config.model} gives every layer embeddings of its token "
            f"ids ({type(shape).__name__}.hidden_size_per_layer_input), which a soft prompt has "
            f"not; name a model without them, such as Gemma 3"
        )
    check_readable(config, shape)
    return shape


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


def fingerprint(model: Any) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of a module's weights and buffers."""
    return fingerprint_of(model.state_dict())


def fingerprint_of(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        for part, plain in _plain(name, tensor):
            digest.update(f"{part} {tuple(plain.shape)} {plain.dtype}".encode())
            # The bytes as they lie in memory: numpy has no bfloat16.
            raw: Any = plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(raw)
    return digest.hexdigest()


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tensor, or the plain tensors that a quantised one is made of, with their names."""
    # torch's protocol of tensor subclasses: the names of the attributes that hold plain tensors.
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        if (inner := getattr(tensor, part)) is not None:
            yield from _plain(f"{name}.{part}", inner)
