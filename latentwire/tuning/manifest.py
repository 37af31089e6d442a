"""What it takes to repeat a run, in ``<output>/manifest.json``; and one trial repeated from it.

Environment variables are never written, and what stands before the ``@`` of an address is left out.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
import psutil
import ray
import torch

from latentwire.config import SamplerConfig, SweepConfig
from latentwire.config.knobs import paths_with
from latentwire.config.overrides import assigned
from latentwire.config.resolve import ConfigError, check_search, set_path, validate
from latentwire.distributed.sweep_files import Files
from latentwire.storage import Place, children, write_text
from latentwire.training import step_checkpoints
from latentwire.tuning.study import RETRIES, evaluations, own_trials

MANIFEST_VERSION = 1
MANIFEST = "manifest.json"
PROVENANCE = "sweep.json"
"""The same beside an export, with the winner's number."""
FREE = paths_with("may_change", "repeated trial", SweepConfig)
"""What a repeated trial may have otherwise: where things lie and what computes them."""
CREDENTIALS = re.compile(r"(?<=://)[^/@\s\"]+@")


def describe(
    space: SweepConfig,
    files: Mapping[str, Files],
    pin: str,
    output: Place,
    command: str,
    study: optuna.Study | None = None,
) -> dict[str, Any]:
    """The manifest of a sweep. ``study`` adds its trials: number → values and best score; without it those that an earlier
    manifest there holds stay.
    """
    before = json.loads((output / MANIFEST).read_text()) if (output / MANIFEST).exists() else {}
    commands = before.get("commands", [])
    document = {
        "manifest_version": MANIFEST_VERSION,
        "commands": commands if commands[-1:] == [CREDENTIALS.sub("", command)] else [*commands, command],
        "space": space.model_dump(mode="json"),
        "seeds": {"sampler": space.tune.seed, "data": space.run.data.seed, "training": space.run.training.seed},
        "evaluation_pin": pin,
        "data": [own.keys for own in files.values()],
        "receivers": receiver_hashes(output),
        "trials": before.get("trials", {}) if study is None else trials(study, space),
        "packages": packages(),
        "python": platform.python_version(),
        "git": git_state(Path(__file__).parent),
        "hardware": hardware(),
    }
    cleaned: dict[str, Any] = json.loads(CREDENTIALS.sub("", json.dumps(document)))
    return cleaned


def write(path: Place, document: Mapping[str, Any]) -> None:
    """Written aside and renamed."""
    write_text(path, json.dumps(document, indent=1))


def trials(study: optuna.Study, space: SweepConfig) -> dict[str, Any]:
    """Trial's number → its values, state and best score by ``tune.metric``.

    A trial that took up a failed one has that one's number too (``retries``).
    """
    return {
        str(trial.number): {
            "values": dict(trial.params),
            "state": trial.state.name,
            "score": space.tune.best_of((report[space.tune.metric] for report in evaluations(trial)), default=None),
        }
        | {name: number for name, number in trial.user_attrs.items() if name == RETRIES}
        for trial in own_trials(study)
    }


def receiver_hashes(output: Place) -> dict[str, str]:
    """Receiver → hash of its weights, as the sweep's workers found them; empty before the first checkpoint."""
    for folder in children(output / "trials"):
        for path in step_checkpoints.finished(folder):
            pins = json.loads((path / "manifest.json").read_text())["pins"]
            return dict(pins.get("receivers", {}))
    return {}


def packages() -> dict[str, str]:
    """Every installed distribution and its version."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, and whether files differ from it; ``None`` outside a checkout that tracks this package."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "manifest.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """This machine, and the nodes of the cluster where Ray runs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    here = {"cpu": _cpu(), "cores": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total, "gpus": gpus}
    named = ("CPU", "GPU", "memory", "accelerator_type")
    nodes = [
        {name: amount for name, amount in node["Resources"].items() if name.startswith(named)}
        for node in (ray.nodes() if ray.is_initialized() else [])
        if node["Alive"]
    ]
    return here | {"system": platform.platform(), "nodes": nodes}


def _cpu() -> str:
    """The processor's name; its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------- repeating


def read(path: Place) -> dict[str, Any]:
    """A manifest. Raises :class:`~latentwire.config.resolve.ConfigError` for anything else."""
    file = path / MANIFEST if path.is_dir() else path
    try:
        document = json.loads(file.read_text())
        version = document["manifest_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"from_manifest must name the {MANIFEST} of a sweep, got {path} ({error!r})") from error
    if version != MANIFEST_VERSION:
        raise ConfigError(
            f"manifest_version must be {MANIFEST_VERSION}, got {version} ({file}); use the version that wrote it"
        )
    return document


def one_trial(path: Place, number: int | None, assignments: Iterable[str]) -> tuple[SweepConfig, dict[str, Any]]:
    """A sweep of one trial, the manifest's ``number`` (``None``: the export's own, else the best), and the manifest.

    Raises :class:`~latentwire.config.resolve.ConfigError` for a trial that it does not know, for one whose receivers' hashes it
    does not hold, and for assignments that would make another trial of it.
    """
    document = read(path)
    space = validate(SweepConfig, document["space"], f"{path}: space")
    scored = {int(key): trial for key, trial in document["trials"].items() if trial["score"] is not None}
    if number is None:
        best = space.tune.best_of(scored, key=lambda key: scored[key]["score"]) if scored else None
        number = document.get("trial", best)
    if number not in scored or not document["receivers"]:
        there = ", ".join(map(str, sorted(scored))) or "none"
        raise ConfigError(f"trial must be one with a score in {path}, got {number}; there are {there}")
    tree = space.model_dump(mode="json")
    tree["tune"] |= {
        "trials": 1, "start_with": [scored[number]["values"]], "scheduler": "none", "warm_start": None, "finalists": 0,
        "sampler": SamplerConfig(name="random").model_dump(),
    }  # fmt: skip
    for knob, value in assigned(assignments).items():
        if knob not in FREE:
            raise ConfigError(
                f"a repeated trial keeps its configuration; only {', '.join(FREE)} can change, got {knob}"
            )
        set_path(tree, knob, value)
    repeated: SweepConfig = validate(SweepConfig, tree, str(path))
    check_search(repeated, str(path))
    return repeated, document | {"trial": number}


def check_data(document: Mapping[str, Any], files: Mapping[str, Files], pin: str) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` where the rows are not those of the manifest."""
    for own in files.values():
        if own.keys not in document["data"]:
            raise ConfigError(
                f"a repeated trial needs the shards that its manifest names ({document['data']}), these are {own.keys}; "
                f"give the same data by --set data.data_dir=<directory>"
            )
    if pin != document["evaluation_pin"]:
        raise ConfigError(f"evaluation_pin must be {document['evaluation_pin']} as in the manifest, got {pin}")
