"""Speed and memory as ratios in one run: a Markdown table.

python -m benchmarks                                # the embedded toy pair
python -m benchmarks --space presets/squad.yaml --data_dir <directory with SQuAD parquet> --only preprocessing
python -m benchmarks --space search_spaces/small.yaml --data_dir <directory with SQuAD parquet> --only sharing --steps 8
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection
from typing import Annotated, Literal, get_args

import ray
import torch
from cyclopts import Parameter

from benchmarks import attention, data, decoding, reading, searching, sharing, trials, workers
from benchmarks import steps as steps_
from benchmarks.measure import Row
from latentwire.cli import run_script
from latentwire.cli.flags import MANY, NO_FLAGS, SharedFlags, read_config
from latentwire.config import SweepConfig
from latentwire.config.places import with_home
from latentwire.config.resolve import with_values
from latentwire.data import shards, streams
from latentwire.distributed import cluster
from latentwire.distributed.local_shards import local_shards
from latentwire.model import LatentWire

Part = Literal[
    "preprocessing",
    "trial",
    "steps",
    "attention",
    "workers",
    "reading",
    "decoding",
    "logits",
    "searching",
    "sharing",
]
PARTS: tuple[Part, ...] = get_args(Part)


def on_rows(space: SweepConfig, only: Collection[str], count: int, repeats: int) -> list[Row]:
    """Measure what needs the run's own shards: a trial under Ray, then, without Ray, steps and decoding."""
    run, measured = space.run, []
    paths = local_shards(run)
    table, dev = streams.training_table(run, paths["train"]), shards.read_table(paths["dev"])
    if "trial" in only:
        cluster.start_ray()
        measured += trials.rows(space, table, count)
    # What Ray keeps running would slow the others.
    ray.shutdown()
    wire = LatentWire(run)
    if "steps" in only:
        measured += [data.padding_shares(wire, table), *steps_.rows(run, table, repeats)]
    if "workers" in only:
        measured += workers.rows(run, table, count)
    if "decoding" in only:
        # One turn decodes two whole batches one by one: fewer turns are enough.
        measured.append(decoding.beside_generate(wire, dev, max(1, repeats // 5)))
    return measured


def main(
    *,
    flags: SharedFlags = NO_FLAGS,
    repeats: int = 15,
    steps: int = 100,
    finished: Annotated[tuple[int, ...], Parameter(**MANY)] = (10, 100, 1000),
    vocabularies: Annotated[tuple[int, ...], Parameter(**MANY)] = (49_152, 262_144),
    only: Annotated[tuple[Part, ...], Parameter(**MANY)] = PARTS,
) -> int:
    """Measure, and print a Markdown table of ratios.

    Args:
        repeats: Measured turns of each side.
        steps: Measured steps of the trial under Ray, and of several workers.
        finished: Trials before a suggestion.
        vocabularies: Tokens that the logits are measured over.
        only: Leave the other measurements out.
    """
    space = with_home(read_config(flags, "toy"))
    # No receiver runs in alignment steps, and coarser messages change a step's size.
    run = with_values(space.run, {"training.alignment_steps": 0, "training.coarsening_steps": 0})
    torch.set_num_threads(max(1, int(run.training.cpus_per_worker)))
    measured: list[Row] = []
    if "preprocessing" in only:
        cluster.start_ray()
        measured.append(data.preprocessing(run))
    if {"trial", "steps", "workers", "decoding"} & set(only):
        measured += on_rows(space.model_copy(update={"run": run}), only, steps, repeats)
    ray.shutdown()
    if "reading" in only:
        measured += reading.rows(run, repeats)
    if "sharing" in only:
        measured += sharing.rows(space.model_copy(update={"run": run}), steps)
        # By configurations alone: batches in one part, and in four.
        measured += itertools.chain.from_iterable(map(sharing.on_one_gpu, (1, 4)))
    if "attention" in only:
        measured += attention.rows(repeats)
    if "logits" in only:
        for vocabulary in vocabularies:
            measured += steps_.supervised_logits(repeats, vocabulary)
        measured += steps_.chunked_logits(repeats, max(vocabularies))
    if "searching" in only:
        measured += [searching.suggestion(count) for count in finished]
    print("| what | ratio | goal | measured |\n|---|---|---|---|")
    print("\n".join(map(str, measured)))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
