"""A trial that shares its receivers trains as one that has its own."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch

from latentwire.config import LossConfig, RunConfig
from latentwire.config.resolve import with_values
from latentwire.features.registry import FEATURES
from latentwire.model import LatentWire
from latentwire.pretrained.weights import ReceiverError
from latentwire.receivers.replica import Replica
from latentwire.training.loop import Trainer
from tests.conftest import HEADS, choose_some_heads, shard_table

VARIANTS = {
    "plain": {},
    "one receiver after the other": {"training.sequential_models": True},
    "aligned, and coarser then": {"training.alignment_steps": 2, "training.coarsening_steps": 4},
    "every loss": {
        f"losses.{name}": 0.3
        for name in LossConfig.model_fields
        if name.endswith("_weight") and name != "slot_kd_weight"  # which looks into the receivers
    }
    | {"losses.kd_top_k": 0, "losses.k": 2, "training.accumulation": 2},
    "chunks of logits": {"training.logit_rows": 3},
    "deep prefix and coprocessor": {
        "features.deep_prefix": {},
        "features.coprocessor": {"width": 16, "heads": 2},
    },
    "in some heads alone": HEADS,
    "in some heads, behind a prefix": HEADS | {"prefix": {"tokens": 3}},
    **{
        name: {f"features.{name}": {}}
        for name, feature in FEATURES.items()
        if not feature.needs_weights
    },
}

Make = Callable[[RunConfig, str], LatentWire]


def curve(wire: LatentWire, table: pa.Table, steps: int = 6) -> tuple[list[dict], dict[str, float]]:
    """What each step says, and the development metrics after the last."""
    torch.manual_seed(0)
    trainer = Trainer(wire, 100)
    said = [trainer.step(table.slice(4 * step % 12, 4)) for step in range(steps)]
    found = trainer.evaluate(table)
    return said, {
        name: value
        for name, value in found.items()
        if "second" not in name and name != "examples_per_s"
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_curve_is_that_of_own_receivers(
    run: RunConfig, sharing_wire: Make, variant: str
) -> None:
    run = with_values(run, VARIANTS[variant])
    table = shard_table(run, 12)
    own, shared = LatentWire(run), sharing_wire(run, "trial")
    if run.adapter.kind == "heads":
        choose_some_heads(own)
        choose_some_heads(shared)
    expected, metrics = curve(own, table)
    found, shared_metrics = curve(shared, table)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), f"step {step}"
    assert shared_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5, nan_ok=True)


def test_texts_without_questions_are_scored_alike(run: RunConfig, sharing_wire: Make) -> None:
    run = with_values(
        run, {"data.dataset": "text", "data.data_dir": "unused", "losses.bundle": "pretrain"}
    )
    table = shard_table(run, 8)
    _, expected = curve(LatentWire(run), table, 2)
    _, found = curve(sharing_wire(run, "trial"), table, 2)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)


def test_it_holds_no_weights_and_counts_what_travels(run: RunConfig, sharing_wire: Make) -> None:
    wire = sharing_wire(run, "trial")
    assert wire.fingerprints() == LatentWire(run).fingerprints()
    Trainer(wire, 100).step(shard_table(run, 4))
    for receiver in wire.receivers.values():
        assert receiver.held_bytes == 0 and all(p.is_meta for p in receiver.skeleton().parameters())
        soft = 4 * run.encoder.latent_len * receiver.width * 4  # fp32, there and back
        assert 2 * soft < receiver.bytes_sent < 2 * soft + 20_000


def test_a_message_travels_once_for_all_rows_that_read_it(
    run: RunConfig, sharing_wire: Make
) -> None:
    wire = choose_some_heads(sharing_wire(with_values(run, HEADS), "trial"))
    table = shard_table(wire.run, 4, questions=2)
    texts = list(dict.fromkeys(table["context"].to_pylist()))
    assert len(texts) == 2
    Trainer(wire, 100).step(table)
    encoder: Any = wire.interlingua.encoder
    adapters: Any = wire.interlingua.adapters
    tokens = int(encoder.tokenize(texts).length_B.sum())
    for name, receiver in wire.receivers.items():
        entries = 4 * tokens * adapters[name].linear.out_features  # fp32, there and back
        assert 2 * entries < receiver.bytes_sent < 2 * entries + 20_000


def test_what_needs_weights_says_so(run: RunConfig, sharing_wire: Make) -> None:
    wire = sharing_wire(run, "trial")
    message = wire.encode(["Ada lives in Oslo."])
    assert len(wire.answer(message, ["Where is the home of Ada?"], "llama")) == 1
    with pytest.raises(
        ReceiverError, match="needs the weights of receiver llama in this process, they are shared"
    ):
        wire.prompt_embeds(message, ["Where is the home of Ada?"], "llama")


def test_only_the_plain_sum_has_a_gradient(
    run: RunConfig, sharing_wire: Make, replicas: dict[str, Replica]
) -> None:
    wire = sharing_wire(with_values(run, {"losses.first_token_ce_weight": 0.5}), "trial")
    trainer = Trainer(wire, 100)
    lm, seen = wire.receivers["llama"], {}
    real = lm.losses
    lm.losses = lambda task, soft_ND: seen.setdefault("shares", real(task, soft_ND))
    trainer.step(shard_table(run, 4))
    with pytest.raises(RuntimeError, match="must be summed before the backward pass"):
        (seen["shares"] * torch.tensor([1.0, 2.0])).sum().backward()
