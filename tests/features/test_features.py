"""The contract of every feature: optimiser, checkpoint, training, decoding, export; and frozen or labelled."""

from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import profile

from latentwire import exports
from latentwire.config import FeaturesConfig, RunConfig, SweepConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data.batches import TrainingCollator
from latentwire.evaluation.evaluator import predict
from latentwire.features.base import Feature, Reading
from latentwire.features.registry import FEATURES, keeps_receivers_frozen
from latentwire.model import LatentWire, load_wire
from latentwire.planning.planner import plan
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts.batch import collate
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
    return {
        name: list(part._forward_hooks) for name, part in wire.receivers["llama"].lm.named_modules()
    }


def test_the_registry_and_the_configuration_name_the_same_features() -> None:
    assert set(FEATURES) == set(FeaturesConfig.model_fields)


def test_a_feature_that_changes_nothing_is_left_out_of_readings(
    run: RunConfig, wire: LatentWire
) -> None:
    plain = Feature(None, run, {})
    message, reading = wire.encode(["Ada lives in Oslo."]), cast(Reading, None)
    assert plain.refine(message) is message and not (plain.acts_inside or plain.acts_on_message)
    with plain.attached("llama", wire.receivers["llama"], reading):
        pass


def test_it_starts_as_nothing_and_then_acts(
    featured: LatentWire, wire: LatentWire, table: pa.Table
) -> None:
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
        torch.testing.assert_close(
            logits(featured, pa.concat_tables(rows), receiver), alone, atol=1e-4, rtol=1e-3
        )


def test_every_parameter_is_in_the_optimiser_and_learns(
    featured: LatentWire, table: pa.Table
) -> None:
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


def test_it_is_saved_exported_and_loaded(
    featured: LatentWire, name: str, table: pa.Table, tmp_path: Path
) -> None:
    shake(featured)
    path = checkpoints.save(tmp_path / "best", featured, {}, {})
    saved = load_file(path / f"features/{name}.safetensors")
    assert saved.keys() == featured.interlingua.features[name].state_dict().keys()
    assert exports.read_manifest(path)["receivers_frozen"] == FEATURES[name].keeps_receivers_frozen
    again, _ = load_wire(path)
    assert torch.equal(logits(again, table), logits(featured, table))


@pytest.mark.parametrize("receiver", ["llama", "qwen"])
def test_decoding_with_a_cache_is_what_one_forward_says(
    featured: LatentWire, table: pa.Table, receiver: str
) -> None:
    """Free-running answers are the argmax of a fresh forward over prompt and answer: the feature acts in every step."""
    shake(featured)
    rows = table.slice(0, 4).to_pydict()
    message = featured.encode(rows["context"])
    lm, builder = featured.receivers[receiver], featured.builders[receiver]
    questions = rows[f"{receiver}_question_ids"]
    prompts = collate([builder.latent(6, ids) for ids in questions], side="left")
    with torch.no_grad(), featured.reading(receiver, prompts, message) as soft_ND:
        answers = lm.generate(prompts, (0,), 5, soft_ND).rows  # a token that is never said
    full = collate(
        [builder.latent(6, ids, answer) for ids, answer in zip(questions, answers, strict=True)]
    )
    with torch.no_grad(), featured.reading(receiver, full, message) as soft_ND:
        said = lm.supervised_logits(full, soft_ND).argmax(-1)
    for row, answer in enumerate(answers):
        assert said[full.row_N == row].tolist()[:-1] == answer


def test_text_never_meets_a_feature(
    featured: LatentWire, wire: LatentWire, table: pa.Table
) -> None:
    shake(featured)
    for mode in ("text", "closed_book"):
        own, plain = (list(predict(w, table.slice(0, 4), mode)) for w in (featured, wire))
        assert [(p.text, p.nll) for p in own] == [(p.text, p.nll) for p in plain]


def test_a_run_is_frozen_unless_a_feature_says_otherwise(run: RunConfig) -> None:
    frozen = {
        name: keeps_receivers_frozen(with_values(run, {f"features.{name}": {}})) for name in NAMES
    }
    assert (
        frozen == {name: FEATURES[name].keeps_receivers_frozen for name in NAMES}
        and not frozen["lora"]
    )


@pytest.mark.parametrize("parts", [2, 3])
def test_a_head_meets_its_own_part_of_a_latent(run: RunConfig, parts: int) -> None:
    """Two heads in each of four layers: with two parts, a head has one in every layer; with three, they take turns."""
    values = {"encoder.d_z": 12, "features.deep_prefix": {"head_parts": parts}}
    featured = wire_of(with_values(run, values))
    shake(featured)
    feature, lm = featured.interlingua.features["deep_prefix"], featured.local_receiver("llama").lm
    z_RLZ = torch.randn(1, 1, 12)
    latents_RS = torch.tensor([[False, True, False]])

    def added(z_RLZ: torch.Tensor) -> torch.Tensor:
        """Keys and values of the slot, ``[layers, 2, heads, head's width]``."""
        found: list[torch.Tensor] = []
        reading = Reading(
            z_RLZ,
            torch.ones(1, 1, dtype=torch.bool),
            latents_RS,
            lm.get_input_embeddings(),
            *2 * [latents_RS],
        )
        with torch.no_grad(), feature.attached("llama", featured.receivers["llama"], reading):
            for layer in lm.base_model.layers:
                for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                    found.append(projection(torch.zeros(1, 3, projection.in_features))[0, 1])
        return torch.stack(found).view(4, 2, 2, -1)

    for part in range(parts):
        changed = z_RLZ.clone()
        changed.view(parts, -1)[part].neg_()
        moved = (added(changed) - added(z_RLZ)).abs().sum(-1) > 1e-6
        heads = torch.arange(8).view(4, 1, 2) % parts == part
        assert torch.equal(moved, heads.expand(4, 2, 2))


def test_options_are_checked(run: RunConfig) -> None:
    with pytest.raises(ConfigError, match="did you mean lora"):
        with_values(run, {"features.lorra": {}})
    with pytest.raises(ConfigError, match=r"depths in \(0, 1\]"):
        with_values(run, {"features.latent_adapters": {"depths": [0.0]}})
    with pytest.raises(ConfigError, match="width must be a multiple of 2 × heads"):
        with_values(run, {"features.coprocessor": {"width": 9}})
    with pytest.raises(
        ConfigError, match=r"d_z must be a multiple of deep_prefix\.head_parts, got 32, 5"
    ):
        with_values(run, {"features.deep_prefix": {"head_parts": 5}})
    with pytest.raises(
        ReceiverError, match=r"head_parts must be ≤ the 8 key-value heads in all layers"
    ):
        wire_of(with_values(run, {"features.deep_prefix": {"head_parts": 16}}))
    with pytest.raises(ConfigError, match=r"d_z must be a multiple of 2 × refiner\.heads"):
        with_values(run, {"features.refiner": {"heads": 5}})


def test_an_update_of_the_output_head_is_refused_before_training_and_read_with_after(
    run: RunConfig,
) -> None:
    """Where logits are taken in chunks it gets no gradient; what was trained before this rule still loads."""
    headed = with_values(run, {"features.lora": {"targets": ("q_proj", "lm_head")}})
    wire = wire_of(headed)
    message = r"lora\.targets must be layers before the output head, got lm_head, the head of receiver llama; leave it out"
    with pytest.raises(ReceiverError, match=message):
        Trainer(wire, 8)
    with pytest.raises(ReceiverError, match=message):
        plan(SweepConfig(run=headed), {"CPU": 2}, 64e9)


def test_no_layer_makes_the_host_wait_for_a_mask(run: RunConfig, table: pa.Table) -> None:
    """What a mask selects is counted on the device, and the host waits for the number: once a step, not once a projection."""
    trainer = Trainer(wire_of(with_values(run, {"features.deep_prefix": {}})), 8)
    projections = sum(
        2 * len(receiver.lm.base_model.layers) for receiver in trainer.wire.local_receivers()
    )
    with profile() as record:
        trainer.step(table.slice(0, 4))
    waits = sum(
        event.count for event in record.key_averages() if event.key == "aten::masked_select"
    )
    assert 0 < waits <= len(trainer.wire.receivers) < projections
