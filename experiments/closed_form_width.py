"""What a wire into retrieval heads answers by its closed form alone, for several numbers a token.

    python experiments/closed_form_width.py --config smollm2_qwen --data_dir <SQuAD parquet> --codes 144 288 576

Nothing is trained but the text readers, whose vectors a prefix may begin as. What the configuration begins from (readers,
rankings, sums over texts) is made first, or reused; it is the same for every width. The loss of the answers is the mean over
development rows of nats a token. So a width, senders or their order can be chosen in minutes, before hours of training.
"""

from __future__ import annotations

import sys
from statistics import fmean
from typing import Annotated

from cyclopts import Parameter

from latentwire.cli import run_script
from latentwire.cli.flags import MANY, NO_FLAGS, SharedFlags, read_config, refuse_search
from latentwire.closed_form import begin
from latentwire.config import RunConfig
from latentwire.config.places import with_home
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import shards
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation.evaluator import predict
from latentwire.model import LatentWire


def of_width(run: RunConfig, codes: int) -> RunConfig:
    """Return a run whose message has so many numbers a token."""
    assert run.encoder.tokens_per_latent is not None, "retrieval heads ask for it"
    # Losses alone are compared: one token of each answer is decoded.
    values = {
        "encoder.d_z": codes * run.encoder.tokens_per_latent,
        "evaluation.max_answer_tokens": 1,
    }
    return with_values(run, values)


def main(
    *,
    flags: SharedFlags = NO_FLAGS,
    codes: Annotated[list[int], Parameter(help="Numbers a token.", **MANY)],
) -> None:
    """Print a line for each width and receiver."""
    refuse_search(flags)
    run = with_values(with_home(read_config(flags, "toy_heads")).run, {"stages": {}})
    if run.closed_form is None:
        raise ConfigError(
            "the configuration must have a closed form, got closed_form null; name one such as toy_heads"
        )
    if run.training.init_from is not None:
        raise ConfigError(
            f"a closed form begins a fresh wire here, got training.init_from {run.training.init_from}; leave that out"
        )
    runs = [of_width(run, count) for count in codes]
    paths = local_shards(runs[0])
    table = shards.read_table(paths["dev"])
    receivers = None
    print("| numbers a token | receiver | nats a token | not linear |\n|---|---|---|---|")
    for count, each in zip(codes, runs, strict=True):
        wire = LatentWire(each, receivers)
        receivers = wire.receivers
        begin.begin(wire, paths["train"])
        left = begin.solved(each, paths["train"]).unexplained
        rows = list(predict(wire, table, "latent"))
        for name in wire.receivers:
            nll = fmean(row.nll for row in rows if row.receiver == name)
            print(f"| {count} | {name} | {nll:.3f} | {100 * left[name]:.1f} % |", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
