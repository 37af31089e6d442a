"""What a GPU computes is what the CPU computes: `LATENTWIRE_TEST_CUDA=1 pytest tests/test_cuda.py` on a machine that has one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.evaluator import predict
from latentwire.features.registry import FEATURES
from latentwire.model import LatentWire, load_wire
from latentwire.training import checkpoints
from latentwire.training.loop import Trainer
from tests.conftest import SMALL, shard_table

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a CUDA device, and LATENTWIRE_TEST_CUDA=1 to be shown it",
)

LM_ENCODER = {
    "encoder.kind": "lm",
    "encoder.model": "toy-llama",
    "encoder.pooling": "spans",
    "encoder.tokens_per_latent": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "bytes": {},
    "lm encoder, coarsening, recited": LM_ENCODER
    | {"training.coarsening_steps": 2, "losses.reconstruction_ce_weight": 0.5, "losses.continuation_ce_weight": 0.5},
    "one receiver after the other": {"training.sequential_models": True, "training.accumulation": 2},
    "every feature": {f"features.{name}": {} for name, feature in FEATURES.items() if feature.keeps_receivers_frozen},
    "kd": {"losses.kd_weight": 1.0, "losses.kd_top_k": 0, "losses.hidden_kd_weight": 0.1},
    "alignment": {"training.alignment_steps": 2},
    "eager": {"receivers.0.attn_implementation": "eager", "receivers.1.attn_implementation": "eager"},
}  # fmt: skip


def run_on(device: str, values: dict[str, Any]) -> RunConfig:
    both = {
        f"receivers.{i}.{key}": value
        for i in (0, 1)
        for key, value in (("device", device), ("dtype", "float32"))
    }
    return with_values(RunConfig(), SMALL | both | values)


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_training_on_it_has_the_curve_of_the_cpu(values: dict[str, Any]) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        run = run_on(device, values)
        trainer = Trainer(LatentWire(run), 8)
        table = shard_table(run, 8)
        losses.append([trainer.step(table.slice(4 * (step % 2), 4))["loss"] for step in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_a_wire_trained_on_it_answers_alike_on_the_cpu(tmp_path: Path) -> None:
    run = run_on("cuda", {"features.deep_prefix": {}})
    trainer, table = Trainer(LatentWire(run), 8), shard_table(run, 16)
    for step in range(4):
        trainer.step(table.slice(4 * step, 4))
    checkpoints.save(
        tmp_path / "wire", trainer.wire, {}, {"receivers": trainer.wire.fingerprints()}
    )
    found = []
    for device in ("cuda", "cpu"):
        wire, _ = load_wire(tmp_path / "wire", run_on(device, {"features.deep_prefix": {}}))
        found.append(
            [p for mode in ("latent", "text") for p in predict(wire, table, Condition(mode))]
        )
    assert [p.text for p in found[0]] == [p.text for p in found[1]]
    assert [p.nll for p in found[0]] == pytest.approx([p.nll for p in found[1]], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_bfloat16_token_embeddings_through_the_latent_path_equal_text(name: str) -> None:
    run = with_values(RunConfig(), SMALL | {f"receivers.{i}.device": "cuda" for i in (0, 1)})
    wire, table = LatentWire(run), shard_table(run, 8)
    assert wire.receivers[name].lm.dtype == torch.bfloat16
    text, oracle = (
        [p.nll for p in predict(wire, table, Condition(mode)) if p.receiver == name]
        for mode in ("text", "embeddings")
    )
    assert oracle == pytest.approx(text, rel=0.05, abs=0.05)
