"""``latentwire doctor``: what this machine and cluster have, what is missing, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from latentwire.config.places import home
from latentwire.errors import UserError

LEAST_GB = 4.0
"""Memory and disk below which the toy sweep may not fit."""
PACKAGES = ("ray", "torch", "transformers", "optuna", "datasets", "pyarrow")
EXTRAS = {
    "gguf": "gguf",
    "boto3": "aws",
    "mlflow": "tracking",
    "wandb": "tracking",
    "torchao": "quantization",
}
"""Optional package → the extra of ``pip install 'latentwire[…]'`` that brings it."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    state: str
    """``ok``, ``optional`` (missing, and only some runs need it) or ``missing``."""
    value: str
    remedy: str = ""


def doctor() -> int:
    """Show what this machine and cluster have, what is missing, and how to mend it; exit status 1 where something is."""
    table = Table("what", "state", "found", title="latentwire doctor", title_justify="left")
    colours = {"ok": "green", "optional": "yellow", "missing": "red"}
    findings: list[Finding] = []
    for look in LOOKS:
        findings += look()
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.subject, state, escape(finding.value))
    Console().print(table)
    for finding in findings:
        # Below the table, where no column breaks a command.
        if finding.remedy:
            print(f"{finding.subject} ({finding.state}): {finding.remedy}")
    return 1 if any(finding.state == "missing" for finding in findings) else 0


def python_and_packages() -> Iterator[Finding]:
    """Look at the interpreter and the packages."""
    # requires-python of pyproject.toml.
    right = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding(
        "Python",
        "ok" if right else "missing",
        platform.python_version(),
        "" if right else "use 3.11 or 3.12",
    )
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "missing", "not installed", f"pip install {name}")
    for name, extra in EXTRAS.items():
        if importlib.util.find_spec(name) is None:
            yield Finding(name, "optional", "not installed", f"pip install 'latentwire[{extra}]'")


def devices() -> Iterator[Finding]:
    """Look at GPUs and CPU cores."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}", "ok", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        )
    if not count:
        # The driver's tool is there and torch sees no GPU: torch was built without CUDA.
        remedy = "none needed for the toy pair; real LLMs want one"
        if shutil.which("nvidia-smi") is not None:
            remedy = "install a CUDA build of torch"
        yield Finding("GPU", "optional", "none that torch sees", remedy)
    yield Finding("CPU cores", "ok", str(os.cpu_count()))


def memory_and_storage() -> Iterator[Finding]:
    """Look at memory, the disk of outputs, and whether they can be written."""
    import psutil

    free = psutil.virtual_memory().available / 1e9
    yield _amount("memory", free, "end other work, or lower tune.max_concurrent_trials")
    outputs = home()
    if not isinstance(outputs, Path):
        yield Finding("outputs", "ok", f"{outputs} (LATENTWIRE_HOME)")
        return
    # A home that no run has made yet is made where its nearest parent lies.
    there = next(folder for folder in (outputs, *outputs.absolute().parents) if folder.exists())
    yield _amount(
        f"disk of {outputs}",
        shutil.disk_usage(there).free / 1e9,
        "set LATENTWIRE_HOME to a larger disk",
    )
    writable = os.access(there, os.W_OK)
    remedy = "" if writable else "set LATENTWIRE_HOME to a directory of yours"
    yield Finding("outputs", "ok" if writable else "missing", str(outputs), remedy)


def _amount(subject: str, gigabytes: float, remedy: str) -> Finding:
    free = f"{gigabytes:.1f} GB free"
    if gigabytes >= LEAST_GB:
        return Finding(subject, "ok", free)
    return Finding(subject, "missing", f"{free} of {LEAST_GB:.1f} for the toy sweep", remedy)


def hub() -> Iterator[Finding]:
    """Look for a Hugging Face token, which gated models need."""
    from huggingface_hub import get_token

    if get_token() is None:
        yield Finding(
            "Hugging Face token",
            "optional",
            "none",
            "hf auth login (gated models, e.g. Llama, need it)",
        )
    else:
        yield Finding("Hugging Face token", "ok", "there")


def ray_cluster() -> Iterator[Finding]:
    """Look at the cluster of ``RAY_ADDRESS``, if it is set; nothing is started."""
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        state = "is local" if address else "is not set"
        yield Finding("Ray cluster", "ok", f"RAY_ADDRESS {state}: Ray starts on this machine")
        return
    import ray

    from latentwire.distributed.cluster import start_ray

    try:
        start_ray()
    except UserError as error:
        yield Finding("Ray cluster", "missing", address, str(error))
        return
    amounts = ray.cluster_resources()
    resources = ", ".join(f"{amounts.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
    yield Finding("Ray cluster", "ok", f"{address}: {len(ray.nodes())} nodes, {resources}")
    ray.shutdown()


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python_and_packages,
    devices,
    memory_and_storage,
    hub,
    ray_cluster,
)
