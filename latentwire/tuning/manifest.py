"""Manifest of a sweep, ``<output>/manifest.json``: all that repeats it, or one of its trials.

Environment variables are never written, and credentials before the ``@`` of an address are left
out.
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
from latentwire.tuning.study import CLONE, RETRIES, clone_record, evaluations, own_trials

MANIFEST_VERSION = 1
MANIFEST = "manifest.json"
PROVENANCE = "sweep.json"
"""Name of the same file beside an export, which adds the winner's number."""
FREE = paths_with("may_change", "repeated trial", SweepConfig)
"""Paths that a repeated trial may change: where things lie and what computes them."""
RESOURCES = ("CPU", "GPU", "memory", "accelerator_type")
"""Beginnings of the names of a node's resources that a manifest holds."""
CREDENTIALS = re.compile(r"(?<=://)[^/@\s\"]+@")
"""``user:password@`` in an address, as in ``https://user:password@host/path``."""


def describe(
    space: SweepConfig,
    files: Mapping[str, Files],
    protocol: str,
    output: Place,
    command: str,
    study: optuna.Study | None = None,
) -> dict[str, Any]:
    """Return the manifest of a sweep.

    ``study`` adds its trials: number → values and best score. Without it, the trials of an earlier
    manifest in ``output`` stay.
    """
    before = json.loads((output / MANIFEST).read_text()) if (output / MANIFEST).exists() else {}
    commands = before.get("commands", [])
    # A manifest is written several times by one command, which stands in it once.
    if commands[-1:] != [CREDENTIALS.sub("", command)]:
        commands = [*commands, command]
    document = {
        "manifest_version": MANIFEST_VERSION,
        "commands": commands,
        "space": space.model_dump(mode="json"),
        "seeds": {
            "sampler": space.tune.seed,
            "data": space.run.data.seed,
            "training": space.run.training.seed,
        },
        "evaluation_pin": protocol,
        "data": [variant.keys for variant in files.values()],
        "receivers": receiver_hashes(output),
        "trials": before.get("trials", {}) if study is None else trials(study, space),
        "packages": packages(),
        "python": platform.python_version(),
        "git": git_state(Path(__file__).parent),
        "hardware": hardware(),
    }
    # As one text, so that no entry is forgotten.
    cleaned: dict[str, Any] = json.loads(CREDENTIALS.sub("", json.dumps(document)))
    return cleaned


def write(path: Place, document: Mapping[str, Any]) -> None:
    """Write a manifest, whole or not at all."""
    write_text(path, json.dumps(document, indent=1))


def trials(study: optuna.Study, space: SweepConfig) -> dict[str, Any]:
    """Return trial's number → its values, state and best score by ``tune.metric``.

    A trial that retries a failed one has that one's number too (``retries``), a clone what it came
    from (``clone``).
    """
    entries: dict[str, Any] = {}
    for trial in own_trials(study):
        scores = [report[space.tune.metric] for report in evaluations(trial)]
        entry = {
            "values": dict(trial.params),
            "state": trial.state.name,
            "score": space.tune.best_of(scores, default=None),
        }
        if RETRIES in trial.user_attrs:
            entry[RETRIES] = trial.user_attrs[RETRIES]
        if record := clone_record(trial):
            entry[CLONE] = record
        entries[str(trial.number)] = entry
    return entries


def receiver_hashes(output: Place) -> dict[str, str]:
    """Return receiver → hash of its weights, from the checkpoints; empty before the first."""
    for folder in children(output / "trials"):
        for path in step_checkpoints.finished(folder):
            # Receivers are frozen, so the first checkpoint speaks for all.
            pins = json.loads((path / "manifest.json").read_text())["pins"]
            return dict(pins.get("receivers", {}))
    return {}


def packages() -> dict[str, str]:
    """Return the version of every installed distribution."""
    installed = importlib.metadata.distributions()
    versions = {d.metadata["Name"]: d.version for d in installed if d.metadata["Name"]}
    return dict(sorted(versions.items(), key=lambda item: item[0].lower()))


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit and whether files differ from it; ``None`` outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # Fails where this file is not tracked: an installed package may lie in another project.
        git("ls-files", "--error-unmatch", "manifest.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    """Describe this machine, and the nodes of the cluster where Ray runs."""
    nodes = []
    for node in ray.nodes() if ray.is_initialized() else []:
        if node["Alive"]:
            resources = node["Resources"].items()
            nodes.append({name: amount for name, amount in resources if name.startswith(RESOURCES)})
    return {
        "cpu": _cpu(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "nodes": nodes,
    }


def _cpu() -> str:
    """Return the processor's name, or its architecture where the system has no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------- repeating


def read(path: Place) -> dict[str, Any]:
    """Return a manifest.

    Raises :class:`~latentwire.config.resolve.ConfigError` for anything else.
    """
    file = path / MANIFEST if path.is_dir() else path
    try:
        document = json.loads(file.read_text())
        version = document["manifest_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"from_manifest must name the {MANIFEST} of a sweep, got {path} ({error!r})"
        ) from error
    if version != MANIFEST_VERSION:
        raise ConfigError(
            f"manifest_version must be {MANIFEST_VERSION}, got {version} ({file}); use the version that wrote it"
        )
    return document


def one_trial(
    manifest: Place, number: int | None, assignments: Iterable[str]
) -> tuple[SweepConfig, dict[str, Any]]:
    """Return a sweep that repeats one trial of a manifest, and the manifest.

    ``number``: which trial; ``None``: the export's own, else the best. Raises
    :class:`~latentwire.config.resolve.ConfigError` for a trial that it does not know, for one whose
    receivers' hashes it does not hold, and for assignments that would make another trial of it.
    """
    document = read(manifest)
    space = validate(SweepConfig, document["space"], f"{manifest}: space")
    # JSON has texts as keys.
    trials = {int(key): trial for key, trial in document["trials"].items()}
    scored = {key: trial for key, trial in trials.items() if trial["score"] is not None}
    if number is None:
        best = space.tune.best_of(scored, key=lambda key: scored[key]["score"]) if scored else None
        number = document.get("trial", best)
    if number not in scored or not document["receivers"]:
        known = ", ".join(map(str, sorted(scored))) or "none"
        raise ConfigError(
            f"trial must be one with a score in {manifest}, got {number}; there are {known}"
        )
    if record := scored[number].get(CLONE):
        raise ConfigError(
            f"trial {number} of {manifest} is a clone of trial {record['parent']} at step {record['step']}, which its values "
            f"alone do not repeat; repeat that one by --trial {record['parent']}"
        )
    tree = space.model_dump(mode="json")
    # One trial, which begins with these values and which nothing stops.
    tree["tune"] |= {
        "trials": 1,
        "start_with": [scored[number]["values"]],
        "scheduler": "none",
        "warm_start": None,
        "finalists": 0,
        "sampler": SamplerConfig(name="random").model_dump(),
    }
    for path, value in assigned(assignments).items():
        if path not in FREE:
            raise ConfigError(
                f"a repeated trial keeps its configuration; only {', '.join(FREE)} can change, got {path}"
            )
        set_path(tree, path, value)
    repeated: SweepConfig = validate(SweepConfig, tree, str(manifest))
    check_search(repeated, str(manifest))
    return repeated, document | {"trial": number}


def check_data(document: Mapping[str, Any], files: Mapping[str, Files], protocol: str) -> None:
    """Check that the rows are those of the manifest.

    Raises :class:`~latentwire.config.resolve.ConfigError` where they are not.
    """
    for variant in files.values():
        if variant.keys not in document["data"]:
            raise ConfigError(
                f"a repeated trial needs the shards that its manifest names ({document['data']}), "
                f"these are {variant.keys}; give the same data by --set data.data_dir=<directory>"
            )
    if protocol != document["evaluation_pin"]:
        raise ConfigError(
            f"the protocol hash must be {document['evaluation_pin']} as in the manifest, got "
            f"{protocol}; use the version of latentwire that wrote it"
        )
