"""Speed and memory as ratios in one run: a Markdown table.

python -m tests.benchmarks                                # the embedded toy pair
python -m tests.benchmarks --space search_spaces/small.yaml --data_dir <directory with SQuAD parquet>
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from latentwire.config.resolve import with_values
from latentwire.data import shards
from latentwire.options import add_flags, read_space, with_home
from latentwire.tuning import planner
from tests.benchmarks import steps

DEFAULT_SPACE = Path(__file__).parents[2] / "search_spaces" / "toy.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--repeats", type=int, default=15, help="measured turns of each side")
    options = parser.parse_args()
    run = with_home(read_space(options, DEFAULT_SPACE)).run
    run = with_values(run, {"training.alignment_steps": 0, "training.coarsening_steps": 0})
    torch.set_num_threads(max(1, int(run.training.cpus_per_worker)))
    table = shards.read_table(planner.local_shards(run)["train"])
    found = steps.rows(run, table, options.repeats)
    for vocabulary in (49_152, 262_144):
        found += steps.supervised_logits(options.repeats, vocabulary)
    print("| what | ratio | goal | measured |\n|---|---|---|---|")
    print("\n".join(map(str, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
