"""What a training step costs beside the frozen models that it runs through."""

from __future__ import annotations

import pyarrow as pa
import torch

from benchmarks.measure import Row, in_turns, peak_bytes
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.distributed.teachers import read_columns
from latentwire.losses.chunks import sum_by_chunks
from latentwire.losses.terms import token_ce
from latentwire.model import LatentWire
from latentwire.training.loop import Trainer


def rows(run: RunConfig, table: pa.Table, repeats: int) -> list[Row]:
    """Steps of ``run`` on the first batch of ``table`` (shard columns)."""
    batch = table.slice(0, run.training.batch_size)
    return [
        beside_bare_receivers(run, batch, repeats),
        with_teachers(run, batch, repeats),
        longer_k(run, batch, repeats),
        eager_attention(run, batch, repeats),
    ]


def trainer_of(run: RunConfig) -> Trainer:
    return Trainer(LatentWire(run), 10**6)


def beside_bare_receivers(run: RunConfig, batch: pa.Table, repeats: int) -> Row:
    """The whole step over one forward and backward of each bare receiver, on the same positions."""
    trainer = trainer_of(run)
    (collated,) = trainer.collate(batch, 0)
    message = trainer.wire.interlingua.encode(collated.tokens)
    prepared = []
    for name, lm in trainer.wire.receivers.items():
        sequences = collated.sequences[name].to(lm.device)
        with torch.no_grad():
            soft_ND = trainer.wire.interlingua.soft_rows(name, message, sequences)
            prepared.append((lm, sequences, lm.embed(sequences, soft_ND)))

    def bare() -> None:
        for lm, sequences, e_BSD in prepared:
            # A leaf that wants a gradient: backward goes through the whole receiver.
            output = lm.lm.base_model(
                inputs_embeds=e_BSD.clone().requires_grad_(), attention_mask=sequences.attention_BS
            )
            state_ND = output.last_hidden_state.flatten(0, 1).index_select(0, sequences.predict_N)
            token_ce(lm.head(state_ND), sequences.target_N).mean().backward()

    ours, theirs = in_turns(lambda: trainer.step(batch), bare, repeats)
    receivers = " + ".join(receiver.model.rsplit("/")[-1] for receiver in run.receivers)
    positions = sum(int(sequences.attention_BS.sum()) for _, sequences, _ in prepared)
    detail = f"{receivers}, {batch.num_rows} rows, {positions} positions: {1e3 * ours:.0f} / {1e3 * theirs:.0f} ms"
    return Row(
        "training step ÷ forward and backward of the bare receivers",
        ours / theirs,
        "≤ 1.15",
        detail,
    )


def with_teachers(run: RunConfig, batch: pa.Table, repeats: int) -> Row:
    """A step that compares with teachers' columns over one that does not."""
    taught = with_values(run, {"losses.kd_weight": 1.0, "losses.kd_top_k": 32})
    plain, trainer = trainer_of(run), trainer_of(taught)
    with_columns = batch
    for name, lm in trainer.wire.receivers.items():
        columns = read_columns(lm, trainer.wire.builders[name], taught, batch)
        for column in columns.column_names:
            with_columns = with_columns.append_column(column, columns[column])
    ours, theirs = in_turns(lambda: trainer.step(with_columns), lambda: plain.step(batch), repeats)
    detail = f"top 32, K = {taught.losses.k}: {1e3 * ours:.0f} / {1e3 * theirs:.0f} ms"
    return Row("step with KD from teachers' columns ÷ without KD", ours / theirs, "≤ 1.05", detail)


def longer_k(run: RunConfig, batch: pa.Table, repeats: int) -> Row:
    """A step that weighs the first eight tokens over one that weighs the first."""
    first_k = with_values(run, {"losses.first_k_ce_weight": 1.0})
    eight, one = (trainer_of(with_values(first_k, {"losses.k": k})) for k in (8, 1))
    ours, theirs = in_turns(lambda: eight.step(batch), lambda: one.step(batch), repeats)
    return Row(
        "step with K = 8 ÷ step with K = 1",
        ours / theirs,
        "≤ 1.05",
        f"{1e3 * ours:.0f} / {1e3 * theirs:.0f} ms",
    )


def eager_attention(run: RunConfig, batch: pa.Table, repeats: int) -> Row:
    """A step whose receivers attend by plain products over one that uses torch's fused attention."""
    every = [f"receivers.{i}.attn_implementation" for i in range(len(run.receivers))]
    eager = trainer_of(with_values(run, dict.fromkeys(every, "eager")))
    fused = trainer_of(with_values(run, dict.fromkeys(every, "sdpa")))
    ours, theirs = in_turns(lambda: eager.step(batch), lambda: fused.step(batch), repeats)
    detail = f"{batch.num_rows} rows: {1e3 * ours:.0f} / {1e3 * theirs:.0f} ms"
    return Row("step with eager attention ÷ with sdpa", ours / theirs, "report", detail)


def supervised_logits(
    repeats: int, vocabulary: int, width: int = 576, positions: int = 160, targets: int = 5
) -> list[Row]:
    """The head at supervised positions alone over the head at all positions, forward and backward: time and memory."""
    rows = 4
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    state_BSD = torch.randn(rows, positions, width, requires_grad=True)
    target_BS = torch.randint(vocabulary, (rows, positions))

    def full() -> None:
        token_ce(head(state_BSD).flatten(0, 1), target_BS.flatten()).mean().backward()

    def supervised() -> None:
        # [rows, positions, D] → [rows · targets, D]
        state_ND = state_BSD[:, -targets:].flatten(0, 1)
        token_ce(head(state_ND), target_BS[:, -targets:].flatten()).mean().backward()

    ours, theirs = in_turns(supervised, full, repeats)
    size, whole = peak_bytes(supervised), peak_bytes(full)
    shape = f"{vocabulary:,} tokens, {targets} of {positions} positions in {rows} rows"
    time, memory = (
        f"{1e3 * ours:.0f} / {1e3 * theirs:.0f} ms",
        f"{size / 1e6:.0f} / {whole / 1e6:.0f} MB",
    )
    return [
        Row(
            "logits where supervised ÷ everywhere: time",
            ours / theirs,
            "report",
            f"{shape}: {time}",
        ),
        Row(
            "logits where supervised ÷ everywhere: peak memory",
            size / whole,
            "report",
            f"{shape}: {memory}",
        ),
    ]


def chunked_logits(
    repeats: int, vocabulary: int, width: int = 640, targets: int = 2_048
) -> list[Row]:
    """Losses by chunks of 256 tokens over all logits at once, forward and backward: time and memory."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    state_ND, target_N = (
        torch.randn(targets, width, requires_grad=True),
        torch.randint(vocabulary, (targets,)),
    )

    def sums(rows: slice, part_ND: torch.Tensor) -> torch.Tensor:
        return token_ce(head(part_ND), target_N[rows]).sum()[None]

    def whole() -> None:
        sum_by_chunks(sums, state_ND, None).sum().backward()

    def chunked() -> None:
        sum_by_chunks(sums, state_ND, 256).sum().backward()

    ours, theirs = in_turns(chunked, whole, max(1, repeats // 5))
    size, all_at_once = peak_bytes(chunked), peak_bytes(whole)
    shape = f"{vocabulary:,} tokens, {targets:,} targets"
    return [
        Row("losses by chunks ÷ at once: time", ours / theirs, "report", f"{shape}: {ours:.1f} / {theirs:.1f} s"),
        Row(
            "losses by chunks ÷ at once: peak memory", size / all_at_once, "report",
            f"{shape}: {size / 1e6:,.0f} / {all_at_once / 1e6:,.0f} MB",
        ),
    ]  # fmt: skip
