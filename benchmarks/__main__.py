"""Speed and memory as ratios in one run: a Markdown table.

python -m benchmarks                                # the embedded toy pair
python -m benchmarks --space presets/squad.yaml --data_dir <directory with SQuAD parquet> --only preprocessing
python -m benchmarks --space search_spaces/small.yaml --data_dir <directory with SQuAD parquet> --only sharing --steps 8
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import ray
import torch

from benchmarks import data, decoding, searching, sharing, steps, trials, workers
from benchmarks.measure import Row
from latentwire.cli.flags import add_flags, read_space
from latentwire.config import SweepConfig
from latentwire.config.places import with_home
from latentwire.config.resolve import with_values
from latentwire.data import shards, streams
from latentwire.distributed import cluster
from latentwire.distributed.local_shards import local_shards
from latentwire.model import LatentWire

PARTS = ("preprocessing", "trial", "steps", "workers", "decoding", "logits", "searching", "sharing")
DEFAULT_SPACE = Path(__file__).parents[1] / "search_spaces" / "toy.yaml"


def on_rows(space: SweepConfig, options: argparse.Namespace) -> list[Row]:
    """What needs the run's own shards: a trial under Ray, then, without Ray, steps and decoding."""
    run, found = space.run, []
    paths = local_shards(run)
    table, dev = streams.training_table(run, paths["train"]), shards.read_table(paths["dev"])
    if "trial" in options.only:
        cluster.start_ray()
        found += trials.rows(space, table, options.steps)
    ray.shutdown()  # what it keeps running would slow the others
    wire = LatentWire(run)
    if "steps" in options.only:
        found += [data.padding_shares(wire, table), *steps.rows(run, table, options.repeats)]
    if "workers" in options.only:
        found += workers.rows(run, table, options.steps)
    if "decoding" in options.only:
        found.append(decoding.beside_generate(wire, dev, max(1, options.repeats // 5)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--repeats", type=int, default=15, help="measured turns of each side")
    parser.add_argument(
        "--steps", type=int, default=100, help="measured steps of the trial under Ray, and of several workers"
    )
    parser.add_argument("--finished", type=int, nargs="+", default=[10, 100, 1000], help="trials before a suggestion")
    parser.add_argument(
        "--vocabularies",
        type=int,
        nargs="+",
        default=[49_152, 262_144],
        help="tokens that the logits are measured over",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="leave the other measurements out")
    options = parser.parse_args()
    space = with_home(read_space(options, DEFAULT_SPACE))
    run = with_values(space.run, {"training.alignment_steps": 0, "training.coarsening_steps": 0})
    torch.set_num_threads(max(1, int(run.training.cpus_per_worker)))
    found: list[Row] = []
    if "preprocessing" in options.only:
        cluster.start_ray()
        found.append(data.preprocessing(run))
    if {"trial", "steps", "workers", "decoding"} & set(options.only):
        found += on_rows(space.model_copy(update={"run": run}), options)
    ray.shutdown()
    if "sharing" in options.only:
        found += [
            *sharing.rows(space.model_copy(update={"run": run}), options.steps),
            *itertools.chain.from_iterable(map(sharing.on_one_gpu, (1, 4))),
        ]
    if "logits" in options.only:
        for vocabulary in options.vocabularies:
            found += steps.supervised_logits(options.repeats, vocabulary)
        found += steps.chunked_logits(options.repeats, max(options.vocabularies))
    if "searching" in options.only:
        found += [searching.suggestion(finished) for finished in options.finished]
    print("| what | ratio | goal | measured |\n|---|---|---|---|")
    print("\n".join(map(str, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
