"""Checks of the files in a receiver's directory, before anything is loaded from it.

Only names, sizes and headers are read, so that a planner can ask for all receivers of a sweep in a
moment.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from latentwire.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of a file that git-lfs left in place of a large one."""

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Names of weights in one file, and of indices of weights in several, as transformers looks for
them."""

# As llama.cpp's gguf-split names its parts.
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class ReceiverError(UserError):
    """A receiver that cannot be loaded; the message says which, why, and what to do."""


def weight_files(directory: Path) -> list[Path]:
    """Return the files of weights that transformers would load from ``directory``, if any.

    Raises :class:`ReceiverError` for an index that cannot be read.
    """
    # Safetensors before pickles, one file before several: transformers' own order.
    for single, index in zip(SINGLE, INDEXED, strict=True):
        if (directory / single).exists():
            return [directory / single]
        if (directory / index).exists():
            refuse_pointer(directory / index)
            try:
                names = set(json.loads((directory / index).read_text())["weight_map"].values())
            except (ValueError, KeyError, AttributeError) as error:
                raise ReceiverError(
                    f"{directory / index} must map names of weights to files, it cannot be read "
                    f"({error}); fetch it again"
                ) from error
            return [directory / name for name in sorted(names)]
    return []


def choose_gguf(directory: Path) -> Path | None:
    """Return the one GGUF file of ``directory`` that is a language model; ``None`` where none is.

    Raises :class:`ReceiverError` for several of them, a model in parts, or a vision projector
    alone.
    """
    files = sorted(directory.glob("*.gguf"))
    # mmproj files hold the vision part of a model that reads images.
    models = [file for file in files if "mmproj" not in file.name.lower()]
    if files and not models:
        raise ReceiverError(
            f"{directory} must hold a language model, got {files[0].name} alone, which projects "
            f"images; fetch the model's own .gguf file too"
        )
    # Several parts of one model are refused below, with the command that joins them.
    if len(models) > 1 and not all(_SPLIT.search(file.name) for file in models):
        raise ReceiverError(
            f"{directory} must hold config.json with safetensors, or exactly one .gguf file, got "
            f"{', '.join(file.name for file in models)}; name one of these files itself"
        )
    return check_gguf(models[0]) if models else None


def check_gguf(file: Path) -> Path:
    """Return a GGUF file that is one.

    Raises :class:`ReceiverError` for a part of one, a git-lfs pointer or another format.
    """
    if (part := _SPLIT.search(file.name)) and int(part[2]) > 1:
        name = file.name[: part.start()]
        first, whole = f"{name}-00001-of-{part[2]}.gguf", f"{name}.gguf"
        raise ReceiverError(
            f"a model must be one .gguf file, got {file.name}, one of {int(part[2])} parts; join "
            f"them into a directory of its own: llama-gguf-split --merge {first} {whole}"
        )
    refuse_pointer(file)
    with file.open("rb") as stream:
        if (magic := stream.read(4)) != b"GGUF":
            raise ReceiverError(f"{file} must begin with GGUF, got {magic!r}; fetch it again")
    return file


def check_weights(directory: Path) -> None:
    """Raise :class:`ReceiverError` where weights are missing, git-lfs pointers, or cut."""
    files = weight_files(directory)
    if not files:
        names = ", ".join(sorted(file.name for file in directory.iterdir())[:8])
        raise ReceiverError(
            f"{directory} must hold weights ({SINGLE[0]}, or {INDEXED[0]} with its files), got {names}; fetch them"
        )
    if missing := [file.name for file in files if not file.exists()]:
        raise ReceiverError(
            f"{directory} must hold all {len(files)} files that its index names, {len(missing)} "
            f"are missing, {missing[0]} first; fetch them"
        )
    for file in files:
        refuse_pointer(file)
        if file.suffix == ".safetensors":
            check_safetensors(file)
        else:
            check_pickled(file)


def check_safetensors(file: Path) -> None:
    """Raise :class:`ReceiverError` for a file without a header, or of another size than it says."""
    # 8 bytes: the header's length. Then the header, JSON; then all tensors, end to end.
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = stream.read(header_bytes) if header_bytes <= size else b""
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        # Beyond safetensors' own limit the first bytes are those of another kind of file.
        cut = 8 < size < 8 + header_bytes < 100_000_000
        what = f"ends within its header, at {size:,} bytes" if cut else "has no safetensors header"
        raise ReceiverError(f"{file} {what}; fetch it again") from None
    # Offsets count from the header's end, so that the last one is the length of the data.
    if (whole := 8 + header_bytes + max(ends, default=0)) != size:
        raise ReceiverError(
            f"{file} must have {whole:,} bytes by its header, got {size:,}; fetch it again"
        )


def check_pickled(file: Path) -> None:
    """Raise :class:`ReceiverError` for a ``.bin`` file that is empty or a cut zip archive."""
    with file.open("rb") as stream:
        start = stream.read(4)
    # torch wrote other files than zip archives before version 1.6, and still reads them.
    if not start or (start[:2] == b"PK" and not zipfile.is_zipfile(file)):
        raise ReceiverError(
            f"{file} must be a whole file of torch, it is cut at {file.stat().st_size:,} bytes; fetch it again"
        )


def refuse_pointer(file: Path) -> None:
    """Raise :class:`ReceiverError` for what git-lfs leaves in place of a large file."""
    if file.is_file():
        with file.open("rb") as stream:
            if stream.read(len(POINTER)) == POINTER:
                raise ReceiverError(
                    f"{file} must be the file itself, got a git-lfs pointer to it; run `git lfs pull` there"
                )


def refuse_pointers(directory: Path) -> None:
    """Raise :class:`ReceiverError` where configuration or tokenizer is a git-lfs pointer."""
    for pattern in ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"):
        for file in sorted(directory.glob(pattern)):
            refuse_pointer(file)
