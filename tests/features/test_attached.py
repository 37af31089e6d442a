"""What features lay over a receiver, against the same written out, and where."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.features.base import Reading
from latentwire.features.latent_adapters import GatedCrossAttention
from latentwire.features.slot_kv import SlotKeyValues
from latentwire.message import Message
from latentwire.model import LatentWire
from latentwire.prompts.batch import collate
from tests.conftest import wire_of
from tests.features.test_features import shake


def added(wire: LatentWire, name: str, reading: Reading) -> torch.Tensor:
    """What a feature adds to the slots of llama."""
    caught: list[torch.Tensor] = []
    feature: Any = wire.interlingua.features[name]
    lm = SimpleNamespace(
        added_to_slots=lambda added_NE, _: caught.append(added_NE) or nullcontext()
    )
    with torch.no_grad(), feature.attached("llama", lm, reading):
        pass
    return caught[0]


def reading_of(
    wire: LatentWire, questions: list[list[int]], keep: list[list[bool]], z_RLZ: torch.Tensor
) -> Reading:
    longest = max(map(len, questions))
    ids = torch.tensor([q + [5] * (longest - len(q)) for q in questions])
    question_keep = torch.tensor([[place < len(q) for place in range(longest)] for q in questions])
    keep_RL = torch.tensor(keep)
    return Reading(
        z_RLZ, keep_RL, keep_RL, wire.receivers["llama"].token_embeddings, ids, question_keep
    )


@pytest.fixture
def asked(run: RunConfig) -> LatentWire:
    wire = wire_of(with_values(run, {"features.coprocessor": {}}))
    shake(wire)
    return wire


def test_a_coprocessor_reads_the_question_its_order_and_nothing_beyond_it(
    asked: LatentWire,
) -> None:
    z_RLZ = torch.randn(1, 3, 32)
    all_three = [[True] * 3]

    def said(
        question: list[int], z_RLZ: torch.Tensor = z_RLZ, keep: list[list[bool]] = all_three
    ) -> torch.Tensor:
        return added(asked, "coprocessor", reading_of(asked, [question], keep, z_RLZ))

    plain = said([7, 8, 9])
    assert plain.shape[0] == 3
    for other in ([7, 8, 10], [8, 7, 9], [7, 8]):
        assert (said(other) - plain).abs().max() > 1e-4, other
    swapped = said([7, 8, 9], z_RLZ[:, [1, 0, 2]])
    assert (swapped[[1, 0, 2]] - plain).abs().max() > 1e-4  # places of latents matter too
    # Beside a longer question and a longer message nothing changes.
    z_other = torch.cat((torch.cat((z_RLZ, torch.randn(1, 2, 32)), 1), torch.randn(1, 5, 32)))
    keep = [[True] * 3 + [False] * 2, [True] * 5]
    both = added(
        asked, "coprocessor", reading_of(asked, [[7, 8, 9], [1, 2, 3, 4, 6]], keep, z_other)
    )
    torch.testing.assert_close(both[:3], plain, atol=1e-5, rtol=1e-4)


def test_a_deep_prefix_is_an_mlp_of_the_normalised_latent(run: RunConfig) -> None:
    wire = wire_of(with_values(run, {"features.deep_prefix": {}}))
    shake(wire)
    feature: Any = wire.interlingua.features["deep_prefix"]
    z_RLZ = 3 + 2 * torch.randn(2, 2, 32)
    reading = reading_of(wire, [[7], [8]], [[True, False], [True, True]], z_RLZ)
    norm, linear, _ = feature.hidden["llama"]
    out = feature.slots["llama"].out
    rows = [z_RLZ[0, 0], z_RLZ[1, 0], z_RLZ[1, 1]]
    expected = [
        out(
            F.gelu(
                linear(
                    (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
                )
            )
        )
        for z in rows
    ]
    torch.testing.assert_close(
        added(wire, "deep_prefix", reading), torch.stack(expected), atol=1e-4, rtol=1e-4
    )


def test_slots_get_what_is_added_on_top_of_their_own_keys_and_values(run: RunConfig) -> None:
    wire = wire_of(run)
    lm = wire.local_receiver("llama")
    attention = lm.lm.base_model.layers[1].self_attn
    shape = SlotKeyValues(lm.lm, 4, "deep_prefix")
    latents_RS = torch.tensor([[False, True, True], [True, False, False]])
    added_NE = torch.randn(3, shape.out.out_features)
    x_RSD = torch.randn(2, 3, attention.k_proj.in_features)
    plain = [projection(x_RSD) for projection in (attention.k_proj, attention.v_proj)]
    with torch.no_grad(), lm.added_to_slots(added_NE, latents_RS):
        found = [projection(x_RSD) for projection in (attention.k_proj, attention.v_proj)]
    width = attention.k_proj.out_features
    for place, (before, after) in enumerate(zip(plain, found, strict=True)):
        part = added_NE[
            :, (2 + place) * width : (3 + place) * width
        ]  # after the keys and values of layer 0
        expected = before.clone()
        for row, (r, s) in enumerate([(0, 1), (0, 2), (1, 0)]):
            expected[r, s] += part[row]
        torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("depth", [0.25, 0.5, 1.0])
def test_latent_adapters_act_after_the_layer_that_their_depth_names(
    run: RunConfig, depth: float
) -> None:
    wire = wire_of(with_values(run, {"features.latent_adapters": {"depths": [depth]}}))
    shake(wire)
    lm, builder = wire.local_receiver("llama"), wire.builders["llama"]
    batch = collate([builder.latent(3, [7, 8], [9])])
    message = wire.encode("Ada lives in Oslo.")
    soft_ND = torch.randn(3, lm.width)
    feature: Any = wire.interlingua.features["latent_adapters"]
    z_RLZ, keep_RL = message.z_BLZ[:, :3], torch.ones(1, 3, dtype=torch.bool)
    reading = Reading(
        z_RLZ, keep_RL, batch.latents_BS, lm.token_embeddings, batch.ids_BS, batch.question_BS
    )

    def states() -> list[torch.Tensor]:
        """What each layer puts out, last norm left out."""
        caught: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda *call: caught.append(call[2][0] if isinstance(call[2], tuple) else call[2])
            )
            for layer in lm.lm.base_model.layers
        ]
        lm.supervised_states(batch, soft_ND)
        for hook in hooks:
            hook.remove()
        return caught

    with torch.no_grad():
        plain = states()
        with feature.attached("llama", lm, reading):
            acted = states()
    changed = [
        not torch.allclose(one, other, atol=1e-5) for one, other in zip(plain, acted, strict=True)
    ]
    first = round(depth * len(plain))
    assert changed == [place >= first for place in range(1, len(plain) + 1)]


def test_gated_cross_attention_reads_real_latents_alone() -> None:
    torch.manual_seed(0)
    attention = GatedCrossAttention(6, 5, 8, 2).requires_grad_(False)
    attention.gate.fill_(0.7)
    x_RSD, z_RLZ = torch.randn(1, 2, 6), torch.randn(1, 3, 5)
    found = attention(x_RSD, z_RLZ, torch.tensor([[True, True, False]]))[0]
    kv = z_RLZ[0, :2] @ attention.key_value.weight.T + attention.key_value.bias
    query_SW = attention.query(attention.norm(x_RSD))[0]
    for place in range(2):
        heads = []
        for at in (slice(0, 4), slice(4, 8)):
            weight_L = (kv[:, :8][:, at] @ query_SW[place, at] / 2).exp()
            heads.append((weight_L / weight_L.sum()) @ kv[:, 8:][:, at])
        expected = torch.tanh(torch.tensor(0.7)) * attention.out(torch.cat(heads))
        torch.testing.assert_close(found[place], expected, atol=1e-5, rtol=1e-4)


def test_a_refiner_relates_private_latents_to_the_others_and_padding_to_none(
    run: RunConfig,
) -> None:
    wire = wire_of(with_values(run, {"features.refiner": {}}))
    shake(wire)
    z_BLZ = torch.randn(1, 5, 32)

    def refined(place: int | None = None) -> torch.Tensor:
        changed = z_BLZ.clone()
        if place is not None:
            changed[0, place] += torch.randn(32)
        message = Message(changed, torch.tensor([2]), {"llama": range(3, 4), "qwen": range(4, 5)})
        with torch.no_grad():
            feature: Any = wire.interlingua.features["refiner"]
            return feature.refine(message).z_BLZ[0]

    plain = refined()
    for place in (0, 1, 3, 4):
        others = [other for other in (0, 1, 3, 4) if other != place]
        assert bool(((refined(place) - plain)[others].abs().amax(1) > 1e-4).all()), place
    torch.testing.assert_close(refined(2)[[0, 1, 3, 4]], plain[[0, 1, 3, 4]])  # the row's padding
