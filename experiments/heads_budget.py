"""How much of the answers hangs on so many of a receiver's heads: the budget that ``adapter.cache_share`` sets.

    python experiments/heads_budget.py --wire wires/smollm2-qwen --data_dir <SQuAD parquet>

The heads of a trained wire stand in the order of their scores. For several numbers of them, the best ones see a text by the
receiver's own keys and values, the others nothing of it: a message that were perfect and had no more room. The loss of the
answers (nats a token, development rows) is what such a message leaves. The receivers read behind the
wire's prefixes, and no part is trained.
"""

from __future__ import annotations

import sys
from typing import Any

import pyarrow as pa
import torch

from latentwire.cli import run_script
from latentwire.closed_form import gather
from latentwire.closed_form.ranking import HeadScores, choose
from latentwire.config.resolve import with_values
from latentwire.data import shards
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation.own_heads import check, own_entries
from latentwire.model import LatentWire
from latentwire.models.head_slots import Heads

FACTORS = (1.0, 4 / 3, 2.0, 3.0)
"""Multiples of the wire's own number of heads that are tried, beside all of the receiver's."""


@torch.no_grad()
def answers_nll(wire: LatentWire, receiver: str, rows: pa.Table, heads: Heads) -> float:
    """Return the answers' loss in nats a token where these heads alone see the texts."""
    lm = wire.local_receiver(receiver)
    total, tokens = 0.0, 0
    for part in gather.texts_of(rows, with_questions=True):
        batch = gather.asked(wire, receiver, part)
        entry_NE = torch.cat(own_entries(wire, receiver, part["texts"][receiver], heads))
        total += gather.answers_loss(wire, lm, batch, entry_NE, heads).item()
        tokens += len(batch.target_N)
    return total / tokens


def budgets(wire: LatentWire, receiver: str) -> list[Heads]:
    """Return the heads of each budget, fewest first: the wire's own, more of the best, all."""
    adapter: Any = wire.interlingua.adapters[receiver]
    scores = HeadScores(receiver, adapter.score_LH, wire.run.adapter.ranking_texts)
    most = adapter.score_LH.numel()
    counts = {min(most, round(len(adapter.head_J2) * factor)) for factor in FACTORS} | {most}
    return [choose(scores, count) for count in sorted(counts)]


def main(*, wire: str, data_dir: str | None = None, rows: int = 96) -> None:
    """Print a line for each receiver and number of heads.

    Args:
        wire: An export or checkpoint of a wire into retrieval heads.
        data_dir: Directory of the data; none for the toy.
        rows: Development rows whose answers are read.
    """
    trained = LatentWire.from_pretrained(wire)
    check(trained.run)
    run = with_values(trained.run, {"data.data_dir": data_dir, "data.dev_samples": rows})
    table = shards.read_table(local_shards(run, ("dev",), begins=False)["dev"])
    print("| receiver | heads | of all | nats a token |\n|---|---|---|---|")
    for receiver in trained.receivers:
        tried = budgets(trained, receiver)
        most = len(tried[-1])
        for heads in tried:
            nll = answers_nll(trained, receiver, table, heads)
            share = f"{100 * len(heads) / most:.0f} %"
            print(f"| {receiver} | {len(heads)} | {share} | {nll:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
