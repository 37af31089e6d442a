"""What each part of a recipe is worth: named variants of one space, trained with several seeds by the plain loop.

    python experiments/ablate.py --space search_spaces/toy.yaml --variants experiments/ablation.yaml --output_dir runs/ablation

The variants file maps a name to knobs (dotted path → value) laid over the space's ``run:``; an empty mapping is the
recipe itself. Each pair of variant and seed has a directory of its own: the same command goes on where it was stopped.
Wires that answer are compared by exact match on the validation split, wires that recite (``dataset: text``) by the
cross-entropy of recited tokens on the development split, at the length that messages end with.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from cyclopts import Parameter

from latentwire.cli import run_script
from latentwire.cli.flags import MANY, NO_FLAGS, SharedFlags, read_config
from latentwire.config import RunConfig
from latentwire.config.places import with_home
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import shards
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation.baselines import Mode
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.summary import summarise
from latentwire.model import LatentWire, load_wire
from latentwire.storage import write_text
from latentwire.training.local import train_here

MODES: tuple[Mode, ...] = ("text", "latent", "shuffled")


def runs(
    flags: Any, variants_file: Path, names: Sequence[str] | None, seeds: Sequence[int]
) -> dict[str, RunConfig]:
    """Return ``<variant>-<seed>`` → its configuration. Raises :class:`ConfigError` for a variant that breaks a rule."""
    if flags.seed is not None:
        raise ConfigError(
            f"variants take their seeds from --seeds, got --seed {flags.seed}; say --seeds {flags.seed}"
        )
    space = with_home(read_config(flags))
    variants = yaml.safe_load(variants_file.read_text())
    if not isinstance(variants, dict):
        raise ConfigError(
            f"variants must map names to knobs, got {type(variants).__name__} ({variants_file})"
        )
    names = names or list(variants)
    if unknown := set(names) - set(variants):
        raise ConfigError(
            f"--names takes variants of {variants_file} ({', '.join(variants)}), got {', '.join(unknown)}"
        )
    configs = {}
    for name in names:
        for seed in seeds:
            values = (variants[name] or {}) | {"training.seed": seed}
            configs[f"{name}-{seed}"] = with_values(space.run, values, f"{variants_file}: {name}")
    return configs


def train_one(run: RunConfig, output: Path) -> None:
    """Train, score the best checkpoint, write ``scores.json``: what is read → receiver → scores."""
    torch.set_num_threads(1)
    paths = local_shards(run)
    wire, manifest = load_wire(train_here(LatentWire(run), paths, output))
    scores: dict[str, dict[str, dict[str, float]]]
    if not run.data.source.has_questions:
        metrics = {name: f"dev_loss_{name}" for name in wire.receivers} | {"mean": "dev_loss"}
        losses = {name: manifest["metrics"][metric] for name, metric in metrics.items()}
        scores = {"latent": {name: {"nll": loss} for name, loss in losses.items()}}
    else:
        table = shards.read_table(paths["validation"])
        scores = {mode: summarise(list(predict(wire, table, mode))) for mode in MODES}
    write_text(output / "scores.json", json.dumps(scores, indent=1))


def table(output: Path, configs: dict[str, RunConfig]) -> str:
    """Return Markdown: per variant and receiver the mean score over seeds, with the range."""
    # <variant>-<seed>: a variant's own name may hold a dash.
    names = list(dict.fromkeys(key.rsplit("-", 1)[0] for key in configs))
    first = next(iter(configs.values()))
    receivers = [receiver.name for receiver in first.receivers]
    title, score, factor, digits = "EM", "em", 100, 1
    if not first.data.source.has_questions:
        title, score, factor, digits = "nats a token,", "nll", 1, 2
    lines = [
        "| variant | " + " | ".join(f"{title} {receiver}" for receiver in receivers) + " | mean |"
    ]
    lines.append("|---|" + "---|" * (len(receivers) + 1))
    for name in names:
        seeds = [key for key in configs if key.rsplit("-", 1)[0] == name]
        files = [output / key / "scores.json" for key in seeds]
        by_seed = [json.loads(file.read_text()) for file in files]
        cells = []
        for receiver in [*receivers, "mean"]:
            values = [factor * scores["latent"][receiver][score] for scores in by_seed]
            cell = f"{statistics.mean(values):.{digits}f}"
            if len(values) > 1:
                cell += f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    *,
    flags: SharedFlags = NO_FLAGS,
    variants: Path,
    names: Annotated[list[str] | None, Parameter(**MANY)] = None,
    output: Annotated[Path, Parameter(["--output", "--output_dir"])],
    seeds: Annotated[tuple[int, ...], Parameter(**MANY)] = (0, 1, 2),
    jobs: int = 2,
    only: str | None = None,
) -> int:
    """Run what is missing, a few at once, then print and write the table.

    Args:
        variants: YAML: variant → knobs.
        names: Only these variants, in this order.
        output: Where the runs and table.md go.
        seeds: Seeds of each variant.
        jobs: Runs at once, one thread each.
        only: Train this one run, <variant>-<seed>, in this process.
    """
    configs = runs(flags, variants, names, seeds)
    if only:
        train_one(configs[only], output / only)
        return 0
    # Before the runs, which would all make the same shards; what is there is only looked at.
    for run in configs.values():
        local_shards(run)
    missing = [key for key in configs if not (output / key / "scores.json").exists()]

    def start(key: str) -> int:
        folder = output / key
        folder.mkdir(parents=True, exist_ok=True)
        # This same command, which then trains one run and ends: a process and a thread each.
        with (folder / "log").open("a") as log:
            code = subprocess.call(
                [sys.executable, *sys.argv, "--only", key], stdout=log, stderr=subprocess.STDOUT
            )
        print(f"{key}: {'done' if code == 0 else f'failed, see {folder}/log'}", flush=True)
        return code

    with ThreadPoolExecutor(jobs) as pool:
        # A list first: any alone would stop to look at the first failure.
        if any(list(pool.map(start, missing))):
            return 1
    text = table(output, configs)
    (output / "table.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
