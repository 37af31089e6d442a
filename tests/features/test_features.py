"""The contract of every feature: optimiser, checkpoint, training, decoding, export; and frozen or labelled."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import profile

from latentwire import exports
from latentwire.assembly import LatentWire
from latentwire.config import FeaturesConfig, RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data.batches import TrainingCollator
from latentwire.data.layout import collate
from latentwire.evaluation.evaluator import predict
from latentwire.features.registry import FEATURES, keeps_receivers_frozen
from latentwire.training import checkpoints
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from tests.conftest import wire_of

NAMES = list(FEATURES)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def featured(run: RunConfig, name: str) -> LatentWire:
    return wire_of(with_values(run, {f"features.{name}": {}}))


def shake(wire: LatentWire) -> None:
    """Random parameters: features start as nothing, and nothing proves nothing."""
    generator = torch.Generator().manual_seed(3)
    for parameter in wire.interlingua.features.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def logits(wire: LatentWire, table: pa.Table, receiver: str = "llama") -> torch.Tensor:
    (batch,) = TrainingCollator(wire.run, wire.builders, wire.interlingua.encoder)(table, step=0)
    wire.interlingua.eval()
    with torch.no_grad():
        message = wire.interlingua.encode(batch.tokens)
        sequences = batch.sequences[receiver]
        with wire.reading(receiver, sequences, message) as soft_ND:
            return wire.receivers[receiver].supervised_logits(sequences, soft_ND)


def hooks(wire: LatentWire) -> dict[str, list[int]]:
    """Those of each part of a receiver. transformers leaves some of its own where hidden states were once asked for."""
    return {name: list(part._forward_hooks) for name, part in wire.receivers["llama"].lm.named_modules()}


def test_the_registry_and_the_configuration_name_the_same_features() -> None:
    assert set(FEATURES) == set(FeaturesConfig.model_fields)


def test_it_starts_as_nothing_and_then_acts(featured: LatentWire, wire: LatentWire, table: pa.Table) -> None:
    attached = hooks(featured)
    plain = logits(wire, table)
    torch.testing.assert_close(logits(featured, table), plain, atol=1e-5, rtol=1e-4)
    shake(featured)
    assert (logits(featured, table) - plain).abs().max() > 1e-2
    assert hooks(featured) == attached  # nothing stays


def test_a_batch_of_unequal_messages_gives_what_each_row_gives_alone(
    run: RunConfig, name: str, table: pa.Table
) -> None:
    growing = {"encoder.pooling": "spans", "encoder.tokens_per_latent": 3}
    featured = wire_of(with_values(run, growing | {f"features.{name}": {}}))
    shake(featured)
    order = pc.sort_indices(table.column("sender_bytes")).to_pylist()
    rows = [table.slice(order[place], 1) for place in (0, -1)]
    tokens = featured.interlingua.encoder.tokenize([row["context"][0].as_py() for row in rows])
    assert len(set(featured.interlingua.encoder.slots(tokens, "qwen"))) == 2
    for receiver in featured.receivers:
        alone = torch.cat([logits(featured, row, receiver) for row in rows])
        torch.testing.assert_close(logits(featured, pa.concat_tables(rows), receiver), alone, atol=1e-4, rtol=1e-3)


def test_every_parameter_is_in_the_optimiser_and_learns(featured: LatentWire, table: pa.Table) -> None:
    trainer = Trainer(featured, 4)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    features = dict(featured.interlingua.features.named_parameters())
    assert features and all(id(p) in held for p in features.values())
    shake(featured)
    before = {key: p.detach().clone() for key, p in features.items()}
    frozen = featured.fingerprints()
    for rows in table_epochs(featured.run.training, table)(0):
        trainer.step(rows)
    assert [key for key, p in features.items() if torch.equal(p, before[key])] == []
    assert featured.fingerprints() == frozen


def test_it_is_saved_exported_and_loaded(featured: LatentWire, name: str, table: pa.Table, tmp_path: Path) -> None:
    shake(featured)
    path = checkpoints.save(tmp_path / "best", featured, {}, {})
    saved = load_file(path / f"features/{name}.safetensors")
    assert saved.keys() == featured.interlingua.features[name].state_dict().keys()
    assert exports.read_manifest(path)["receivers_frozen"] == FEATURES[name].keeps_receivers_frozen
    again, _ = checkpoints.load_wire(path)
    assert torch.equal(logits(again, table), logits(featured, table))


@pytest.mark.parametrize("receiver", ["llama", "qwen"])
def test_decoding_with_a_cache_is_what_one_forward_says(featured: LatentWire, table: pa.Table, receiver: str) -> None:
    """Free-running answers are the argmax of a fresh forward over prompt and answer: the feature acts in every step."""
    shake(featured)
    rows = table.slice(0, 4).to_pydict()
    message = featured.encode(rows["context"])
    lm, builder = featured.receivers[receiver], featured.builders[receiver]
    questions = rows[f"{receiver}_question_ids"]
    prompts = collate([builder.latent(6, ids) for ids in questions], side="left")
    with torch.no_grad(), featured.reading(receiver, prompts, message) as soft_ND:
        answers = lm.generate(prompts, (0,), 5, soft_ND).rows  # a token that is never said
    full = collate([builder.latent(6, ids, answer) for ids, answer in zip(questions, answers, strict=True)])
    with torch.no_grad(), featured.reading(receiver, full, message) as soft_ND:
        said = lm.supervised_logits(full, soft_ND).argmax(-1)
    for row, answer in enumerate(answers):
        assert said[full.row_N == row].tolist()[:-1] == answer


def test_text_never_meets_a_feature(featured: LatentWire, wire: LatentWire, table: pa.Table) -> None:
    shake(featured)
    for mode in ("text", "closed_book"):
        own, plain = (list(predict(w, table.slice(0, 4), mode)) for w in (featured, wire))
        assert [(p.text, p.nll) for p in own] == [(p.text, p.nll) for p in plain]


def test_only_lora_touches_what_receivers_compute(run: RunConfig) -> None:
    frozen = {name: keeps_receivers_frozen(with_values(run, {f"features.{name}": {}})) for name in NAMES}
    assert [name for name, kept in frozen.items() if not kept] == ["lora"]


def test_options_are_checked(run: RunConfig) -> None:
    with pytest.raises(ConfigError, match="did you mean lora"):
        with_values(run, {"features.lorra": {}})
    with pytest.raises(ConfigError, match=r"depths in \(0, 1\]"):
        with_values(run, {"features.latent_adapters": {"depths": [0.0]}})
    with pytest.raises(ConfigError, match="width must be a multiple of 2 × heads"):
        with_values(run, {"features.coprocessor": {"width": 9}})
    with pytest.raises(ConfigError, match=r"d_z must be a multiple of 2 × refiner\.heads"):
        with_values(run, {"features.refiner": {"heads": 5}})


def test_no_layer_makes_the_host_wait_for_a_mask(run: RunConfig, table: pa.Table) -> None:
    """What a mask selects is counted on the device, and the host waits for the number: once a step, not once a projection."""
    trainer = Trainer(wire_of(with_values(run, {"features.deep_prefix": {}})), 8)
    projections = sum(2 * len(receiver.lm.base_model.layers) for receiver in trainer.wire.own_receivers())
    with profile() as record:
        trainer.step(table.slice(0, 4))
    waits = sum(event.count for event in record.key_averages() if event.key == "aten::masked_select")
    assert 0 < waits <= len(trainer.wire.receivers) < projections
