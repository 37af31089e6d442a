"""GGUF files, converted once into weights that transformers loads as any other."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from latentwire.addresses import cache_dir
from latentwire.config import ReceiverConfig
from latentwire.pretrained.errors import first_line, refuse_misfit
from latentwire.pretrained.files import ReceiverError
from latentwire.storage import sha256


@functools.lru_cache(maxsize=32)
def _hash_of(file: Path, changed: int, size: int) -> str:
    """Return a file's SHA-256, computed anew where its time or size has changed."""
    return sha256(file)


def convert_gguf(file: Path, config: ReceiverConfig) -> Path:
    """Dequantise once into fp32 safetensors, in a cache directory named by the file's hash."""
    # Hashing gigabytes takes a while, so it is done anew only for a file that has changed.
    about = file.stat()
    target = cache_dir() / "gguf" / _hash_of(file.absolute(), about.st_mtime_ns, about.st_size)[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    # Workers of one machine start together: one converts, the others find it done.
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        if importlib.util.find_spec("gguf") is None:
            raise ReceiverError(
                f"receiver {config.name}: {file} is read by the package gguf, which is not installed; "
                f"pip install 'latentwire[gguf]'"
            )
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
                f"receiver {config.name}: {file} cannot be read as GGUF ({first_line(error)}); "
                f"fetch it again, or another quantisation of it"
            ) from error
        refuse_misfit(model, config, report)
        _forget_quantisation(model)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            # As readable as the umask allows, unlike ``aside``, which mkdtemp keeps private.
            folder = Path(aside) / target.name
            folder.mkdir()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            # As the umask says: safetensors leaves private files.
            readable = (folder / "config.json").stat().st_mode
            for file in folder.glob("*.safetensors"):
                file.chmod(readable)
            # Whole or not at all: what ends halfway goes with ``aside``.
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
