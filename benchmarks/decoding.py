"""What evaluation costs beside the obvious loop."""

from __future__ import annotations

import pyarrow as pa
import torch

from benchmarks.measure import Row, in_turns
from latentwire.evaluation.evaluator import predict
from latentwire.model import LatentWire


def beside_generate(wire: LatentWire, table: pa.Table, repeats: int) -> Row:
    """Batched evaluation over one example at a time through ``generate``: the same messages, prompts and limits."""
    rows = table.slice(0, 2 * wire.run.evaluation.batch_size)
    contexts, questions = rows["context"].to_pylist(), rows["question"].to_pylist()

    @torch.no_grad()
    def one_by_one() -> None:
        for context, question in zip(contexts, questions, strict=True):
            message = wire.encode([context], [question])
            for name in wire.receivers:
                wire.answer(message, [question], name)

    ours, theirs = in_turns(lambda: list(predict(wire, rows, "latent")), one_by_one, repeats)
    rates = f"{rows.num_rows / ours:.1f} / {rows.num_rows / theirs:.1f} examples/s"
    detail = f"{rows.num_rows} rows, batches of {wire.run.evaluation.batch_size}: {rates}"
    return Row("evaluation ÷ `generate` one example at a time", theirs / ours, "≥ 4", detail)
