"""Scores of a training on its development rows, shared out over workers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pyarrow as pa
import torch

from latentwire.evaluation.conditions import own_condition
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.summary import means
from latentwire.losses.bundles import term_counts, weights_at
from latentwire.training.receiver_losses import add_to

if TYPE_CHECKING:
    from latentwire.training.loop import Trainer


def scores(trainer: Trainer, dev: pa.Table) -> dict[str, float]:
    """Return the scores of a table of development rows.

    ``dev_f1``, ``dev_em`` and ``dev_loss`` are means over receivers, with one each beside them;
    ``wire_bytes`` is the mean size of a message in bytes as fp16, ``prompt_positions`` all
    positions that a receiver reads. Texts without questions have ``dev_loss`` alone, and each
    of its terms.
    """
    # Worker r of W scores rows r, r + W, r + 2W, …
    rows = range(trainer.workers.rank, dev.num_rows, trainer.workers.size)
    share = dev.take(pa.array(rows, pa.int64()))
    if trainer.wire.run.data.source.has_questions:
        return _of_answers(trainer, share)
    return _of_texts(trainer, share)


def _of_answers(trainer: Trainer, share: pa.Table) -> dict[str, float]:
    wire = trainer.wire
    condition = own_condition(wire.run)
    # A worker without rows joins the exchange all the same, or the others would wait for it.
    predictions = list(predict(wire, share, condition)) if share.num_rows else []
    predictions = trainer.workers.gather(predictions)
    metrics: dict[str, float] = {}
    by_receiver = means(predictions)
    for name, row in by_receiver.items():
        suffix = "" if name == "mean" else f"_{name}"
        metrics |= {
            f"dev_f1{suffix}": row["f1"],
            f"dev_em{suffix}": row["em"],
            f"dev_loss{suffix}": row["nll"],
        }
    return metrics | {
        "wire_bytes": by_receiver["mean"]["bytes"],
        "prompt_positions": by_receiver["mean"]["positions"],
    }


@torch.no_grad()
def _of_texts(trainer: Trainer, share: pa.Table) -> dict[str, float]:
    """Return weighted terms in nats per token, with messages and weights as they end."""
    wire = trainer.wire
    # Schedules count from the end of the alignment.
    last_step = trainer.total_steps - trainer.config.alignment_steps
    weights = weights_at(wire.run.losses, last_step)
    size = wire.run.evaluation.batch_size
    wire.interlingua.eval()
    metrics = {"dev_loss": 0.0}
    for name, lm in wire.receivers.items():
        sums = dict.fromkeys(weights.terms, 0.0)
        counts = dict.fromkeys(weights.terms, 0.0)
        ones = dict.fromkeys(weights.terms, 1.0)  # shares are then sums over tokens
        for start in range(0, share.num_rows, size):
            rows = share.slice(start, size)
            for batch in trainer.collate(rows, trainer.total_steps, own_length=True):
                message = trainer.encode(batch)
                with ExitStack() as attached:
                    shares, _ = trainer.losses.read(
                        name, batch, message, weights, ones, last_step, attached
                    )
                add_to(sums, {term: float(share_T) for term, share_T in shares.items()})
                add_to(counts, term_counts(weights, batch.sequences[name]))
        # Summed before they are divided: workers may have unequal numbers of tokens.
        sums = trainer.workers.sum_counts(sums, lm.device)
        counts = trainer.workers.sum_counts(counts, lm.device)
        terms = {term: sums[term] / max(1.0, counts[term]) for term in weights.terms}
        metrics |= {f"dev_{term}_{name}": value for term, value in terms.items()}
        metrics[f"dev_loss_{name}"] = sum(terms.values())
        metrics["dev_loss"] += metrics[f"dev_loss_{name}"] / len(wire.receivers)
    return metrics
