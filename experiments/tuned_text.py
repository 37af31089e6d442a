"""Score a frozen receiver that reads the text behind a few trained vectors: the text reader that a wire must be held to.

A wire learns from training questions how they are answered; a frozen model that reads the text
as it comes has not. Vectors that stand before the prompt, the same for every row, give the text
that chance (prompt tuning, arXiv 2104.08691). Nothing but these vectors is trained.

    python experiments/tuned_text.py --space search_spaces/small.yaml --receiver smollm2 --samples 1000 \\
      --data_dir <directory with SQuAD parquet> --set data.max_context_bytes=700 --set data.validation_samples=200

``--share 0.25`` shows the reader, in training and in scoring, the first quarter of each text's tokens.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from cyclopts import Parameter

from latentwire.cli import run_script
from latentwire.cli.flags import NO_FLAGS, SharedFlags, read_config
from latentwire.config import RunConfig
from latentwire.config.places import with_home
from latentwire.data import shards
from latentwire.data.documents import TrainedOn
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation import readings
from latentwire.evaluation.metrics import em_f1
from latentwire.evaluation.statistics import interval
from latentwire.prompts import sequences
from latentwire.receivers.local import LocalReceiver

START = "Answer each question with a short span copied from the passage. Be brief and exact.\n"
"""Text whose token embeddings the vectors start from, repeated where it is too short."""
WARMUP = 20
"""Steps over which the rate rises; it falls linearly to 0 after them."""


def alone(run: RunConfig, receiver: str) -> RunConfig:
    """Return the data and scoring of ``run`` with one of its receivers, without its examples."""
    named = {config.name: config for config in run.receivers}
    if receiver not in named:
        raise SystemExit(
            f"error: --receiver must be one of {', '.join(named)}, got {receiver}; name one of them"
        )
    tree = run.model_dump(mode="json", include={"data", "prompt", "evaluation"})
    tree["receivers"] = [named[receiver].model_dump(mode="json") | {"instruction": ""}]
    return RunConfig.model_validate(tree)


class TextReader:
    """A frozen receiver that reads texts behind vectors of its own."""

    def __init__(self, run: RunConfig, count: int, share: float) -> None:
        """Load the receiver; its ``count`` vectors begin as token embeddings of :data:`START`."""
        config = run.receivers[0]
        self.run, self.share, self.name = run, share, config.name
        self.lm = LocalReceiver(config)
        self.builder = sequences.PromptBuilder(self.lm.tokenizer, config, run.prompt, run.data.send)
        start_ids = self.lm.tokenizer(START, add_special_tokens=False).input_ids
        start_ids = (start_ids * (1 + count // len(start_ids)))[:count]
        self.vectors_PD = torch.nn.Parameter(
            self.lm.token_embeddings(torch.tensor(start_ids)).float().clone()
        )

    def prompt(self, row: dict[str, Any], answered: bool) -> sequences.PromptSequence:
        """Return the text prompt of a row with slots for the vectors after BOS, and its answer where ``answered``."""
        context_ids = row[f"{self.name}_context_ids"]
        context_ids = context_ids[: round(self.share * len(context_ids))]
        answer_ids = row[f"{self.name}_answer_ids"] if answered else None
        text = self.builder.text(context_ids, row[f"{self.name}_question_ids"], answer_ids)
        begin, count = (0 if text.bos is None else 1), len(self.vectors_PD)

        def shifted(positions: range) -> range:
            return range(positions.start + count, positions.stop + count)

        return replace(
            text,
            ids=[*text.ids[:begin], *[sequences.SLOT_ID] * count, *text.ids[begin:]],
            message=range(begin, begin + count),
            question=shifted(text.question),
            anchor=shifted(text.anchor),
            answer=shifted(text.answer),
            stop=None if text.stop is None else text.stop + count,
            supervised=shifted(text.supervised) if answered else range(0),
            soft=True,
        )

    def soft(self, rows: int) -> torch.Tensor:
        """Return the vectors for every row, ``[rows × P, D]``."""
        return self.vectors_PD.expand(rows, -1, -1).flatten(0, 1)

    def nll(self, rows: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of each supervised token ``[N]``, differentiable in the vectors, and its row ``[N]``."""
        batch = sequences.collate([self.prompt(row, True) for row in rows]).to(self.lm.device)
        logits_NV = self.lm.supervised_logits(batch, self.soft(len(rows))).float()
        return torch.nn.functional.cross_entropy(
            logits_NV, batch.target_N, reduction="none"
        ), batch.row_N

    def train(
        self, rows: Sequence[dict[str, Any]], steps: int, batch_size: int, rate: float
    ) -> None:
        """Train the vectors on the rows in order and print the mean loss of every 25 steps."""
        optimizer = torch.optim.AdamW([self.vectors_PD], lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(
                (step + 1) / WARMUP, max(0.0, (steps - step) / max(1, steps - WARMUP))
            ),
        )
        losses: list[float] = []
        for step in range(steps):
            ce_N, _ = self.nll(
                [rows[(step * batch_size + i) % len(rows)] for i in range(batch_size)]
            )
            loss = ce_N.mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([self.vectors_PD], 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if (step + 1) % 25 == 0 or step + 1 == steps:
                print(
                    f"step {step + 1}: training loss {statistics.mean(losses[-25:]):.3f}",
                    flush=True,
                )

    @torch.no_grad()
    def score(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
        """Return exact match and F1 in percent and the gold answer's nats per token, row by row."""
        scores: dict[str, list[float]] = {"em": [], "f1": [], "nll": []}
        size = self.run.evaluation.batch_size
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            prompts = sequences.collate([self.prompt(row, False) for row in part], side="left").to(
                self.lm.device
            )
            length = self.run.evaluation.max_answer_tokens
            decoded = self.lm.generate(prompts, self.builder.stop_ids, length, self.soft(len(part)))
            texts = self.lm.tokenizer.batch_decode(decoded.rows, skip_special_tokens=True)
            for row, text in zip(part, texts, strict=True):
                em, f1 = em_f1(
                    text.strip().split("\n")[0].strip(), row["answers"], self.run.data.dataset
                )
                scores["em"].append(100 * em)
                scores["f1"].append(100 * f1)
            ce_N, row_N = self.nll(part)
            scores["nll"] += [ce_N[row_N == index].mean().item() for index in range(len(part))]
        return scores


def main(
    *,
    flags: SharedFlags = NO_FLAGS,
    receiver: str,
    vectors: int = 16,
    steps: int = 100,
    rows_per_step: Annotated[int, Parameter("--rows_per_step")] = 8,
    rate: float = 3e-2,
    share: float = 1.0,
) -> None:
    """Train, score the validation rows, and print one line of a Markdown table.

    Args:
        receiver: Name of the receiver in the configuration.
        vectors: Vectors before the text.
        steps: Training steps; 0 scores the vectors as they start.
        rows_per_step: Training questions of a step.
        rate: Peak learning rate.
        share: Share of each text that is shown, from its beginning.
    """
    run = alone(with_home(read_config(flags)).run, receiver)
    paths = local_shards(run, ("train", "validation"))
    reader = TextReader(run, vectors, share)
    training = shards.read_table(paths["train"]).to_pylist()
    random.Random(run.training.seed).shuffle(training)
    reader.train(training, steps, rows_per_step, rate)
    rows = shards.read_table(paths["validation"]).to_pylist()
    read = readings.note(
        paths["validation"], f"text before {receiver}", TrainedOn().with_stage(run, paths["train"])
    )
    scores, contexts = reader.score(rows), [row["context"] for row in rows]
    cells = []
    for field, values in scores.items():
        low, high = interval(values, contexts)
        cells.append(f"{field} {statistics.mean(values):.2f} [{low:.2f}, {high:.2f}]")
    counts = f"{len(values)} rows of {len(set(contexts))} contexts, which the intervals resample"
    print(f"{receiver}, {counts}, text share {share}: {', '.join(cells)}")
    print(readings.sentence(read))


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
