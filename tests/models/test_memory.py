"""Memory tokens behind a text: what the backbone makes of them, and what a receiver reads there."""

import math
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from latentwire.config import EncoderConfig, RunConfig, SweepConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.model import LatentWire
from latentwire.models import backbones
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.models.memory import MemoryStates
from latentwire.models.slots import KEYS_VALUES, attentions, projections
from latentwire.planning.sharing import obstacles
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts.batch import collate
from latentwire.prompts.sequences import RECONSTRUCT, PromptSequence
from tests.conftest import wire_of
from tests.models.test_encoders import RECEIVERS, TEXTS, Joined

MEMORY: dict[str, Any] = {
    "kind": "lm", "model": "receiver:llama", "pooling": "memory", "attention": "causal", "tune": "lora", "latent_len": 3,
    "d_z": 16,
}  # fmt: skip
KV = MEMORY | {"pooling": "memory_kv", "projection": False, "d_z": 512}
HANDED = {f"encoder.{name}": value for name, value in KV.items()} | {
    "adapter.kind": "keys_values",
    "receivers": [RECEIVERS["llama"].model_dump()],
}
"""The knobs of a wire whose message is keys and values."""


def states_of(values: dict[str, Any]) -> MemoryStates:
    """Return memory states whose low-rank updates do something."""
    torch.manual_seed(0)
    states = MemoryStates(EncoderConfig(**values), RECEIVERS, load_weights=True).eval()
    for update in states.updates.values():
        torch.nn.init.normal_(update.up.weight, std=0.1)
    return states


def ids_of(states: MemoryStates, text: str) -> list[int]:
    return states.tokenizer(text, add_special_tokens=False).input_ids


def read(states: MemoryStates, texts: list[str], latents: list[int]) -> torch.Tensor:
    tensors, _ = states.collate([ids_of(states, text) for text in texts])
    with torch.no_grad():
        return states(**tensors, latents_B=torch.tensor(latents))


def by_hand(states: MemoryStates, text: str, memory_LM: torch.Tensor) -> Any:
    """Run the backbone on one text's embeddings with memory behind them; the updates are merged."""
    ids = torch.tensor([*states.prefix, *ids_of(states, text)])
    for path, update in states.updates.items():
        layer = states.backbone.get_submodule(path.replace("/", "."))
        layer.weight.data += update.scale * update.up.weight @ update.down.weight
    x_SM = torch.cat((states.backbone.embed_tokens(ids), memory_LM))
    with torch.no_grad():
        return states.backbone(inputs_embeds=x_SM[None], use_cache=True)


def test_memory_states_are_what_the_backbone_gives_behind_the_text() -> None:
    states = states_of(MEMORY)
    pooled_BLM = read(states, [TEXTS[0]], [3])
    state_SM = by_hand(states, TEXTS[0], states.memory_CM).last_hidden_state[0]
    assert pooled_BLM.shape == (1, 3, states.width)
    torch.testing.assert_close(pooled_BLM[0], state_SM[-3:], atol=1e-5, rtol=1e-4)


def test_memory_begins_as_large_as_the_embeddings() -> None:
    """Larger or smaller vectors would be of no kind that the backbone has met."""
    states = states_of(MEMORY | {"latent_len": 64})
    of_memory, of_table = (
        float(weight.detach().square().mean().sqrt())
        for weight in (states.memory_CM, states.backbone.embed_tokens.weight)
    )
    assert of_table != pytest.approx(1, rel=0.5)  # else a division would do as well
    assert of_memory == pytest.approx(of_table, rel=0.05)


def test_handed_values_are_the_cache_of_the_memory_and_keys_become_it_when_they_are_turned() -> (
    None
):
    states = states_of(KV)
    kv_BLE = read(states, [TEXTS[2]], [3])
    cache = by_hand(states, TEXTS[2], states.memory_CM).past_key_values
    text = len(states.prefix) + len(ids_of(states, TEXTS[2]))
    expected = torch.cat(
        [
            part[0, :, text:].transpose(0, 1).flatten(1)
            for layer in cache.layers
            for part in (layer.keys, layer.values)
        ],
        1,
    )
    turned_LE = turned(states.backbone, kv_BLE[0], range(text, text + 3))
    torch.testing.assert_close(turned_LE, expected, atol=1e-5, rtol=1e-4)


def turned(lm: Any, kv_LE: torch.Tensor, places: range) -> torch.Tensor:
    """Give keys the rotary positions of their places; values stay as they are."""
    parts = list(kv_LE.split([p.out_features for p in projections(lm, KEYS_VALUES)], 1))
    head = attentions(lm, KEYS_VALUES)[0].head_dim
    frequency_H = 10_000.0 ** (-torch.arange(0, head, 2) / head)
    angle_LH = torch.tensor(list(places))[:, None] * frequency_H
    cos, sin = angle_LH.cos()[:, None], angle_LH.sin()[:, None]
    for index in range(0, len(parts), 2):
        first, second = parts[index].unflatten(1, (-1, head)).chunk(2, -1)
        key = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        parts[index] = key.flatten(1)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("values", [MEMORY, KV], ids=["states", "keys and values"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_padding_changes_no_memory(values: dict[str, Any], attention: str) -> None:
    states = states_of(values | {"attention": attention})
    together_BLM = read(states, TEXTS, [2, 1, 3])
    for row, (text, count) in enumerate(zip(TEXTS, (2, 1, 3), strict=True)):
        alone_BLM = read(states, [text], [count])
        torch.testing.assert_close(together_BLM[row, :count], alone_BLM[0], atol=1e-5, rtol=1e-4)
        assert not together_BLM[row, count:].any()


def test_a_text_does_not_see_memory_where_attention_is_causal() -> None:
    caught: list[torch.Tensor] = []
    for attention in ("causal", "bidirectional"):
        for size in (1.0, 3.0):
            states = states_of(MEMORY | {"attention": attention})
            states.memory_CM.data *= size
            states.backbone.norm.register_forward_hook(lambda *call: caught.append(call[2]))
            read(states, [TEXTS[0]], [3])
    count = len(caught[0][0]) - 3
    torch.testing.assert_close(caught[0][0, :count], caught[1][0, :count])
    assert not torch.allclose(caught[2][0, :count], caught[3][0, :count], atol=1e-3)


def test_a_message_of_another_length_reads_between_the_memory_tokens() -> None:
    states = states_of(MEMORY | {"latent_len": 4})
    memory_CM = states.memory_CM
    expected = torch.stack([(memory_CM[0] + memory_CM[1]) / 2, (memory_CM[2] + memory_CM[3]) / 2])
    pooled_BLM = read(states, [TEXTS[0]], [2])
    state_SM = by_hand(states, TEXTS[0], expected).last_hidden_state[0]
    torch.testing.assert_close(pooled_BLM[0], state_SM[-2:], atol=1e-5, rtol=1e-4)


def test_a_message_has_memory_for_every_so_many_tokens() -> None:
    encoder = InterlinguaEncoder(EncoderConfig(**MEMORY, tokens_per_latent=4), RECEIVERS).eval()
    tokens = encoder.tokenize(TEXTS)
    counts = [max(1, math.ceil(length / 4)) for length in tokens.length_B.tolist()]
    assert len(set(counts)) == 3 and encoder(tokens).slots("llama") == counts


def test_a_text_that_does_not_fit_with_its_memory_is_refused() -> None:
    states = states_of(MEMORY)
    with pytest.raises(ReceiverError, match=r"at most 1,024 positions, got 1,2\d\d; lower data"):
        read(states, ["Ada " * 1200], [3])


@pytest.mark.parametrize("tune", ["lora", "frozen"])
def test_gradients_reach_memory_and_updates_and_nothing_else_of_the_backbone(
    run: RunConfig, table: pa.Table, tune: str
) -> None:
    for knobs in (HANDED, {f"encoder.{name}": value for name, value in MEMORY.items()}):
        wire = wire_of(with_values(run, knobs | {"encoder.tune": tune}))
        frozen = wire.fingerprints() | {"encoder": wire.interlingua.encoder.backbone_fingerprint()}
        loss_of(wire, table).backward()
        moved = {
            name
            for name, p in wire.interlingua.named_parameters()
            if p.grad is not None and p.grad.any()
        }
        of_states = {name for name in moved if name.startswith("encoder.states.")}
        updates = {name for name in of_states if ".updates." in name}
        assert of_states - updates == {"encoder.states.memory_CM"}
        assert bool(updates) == (tune == "lora")
        # The other parts are the map to d_z and adapters, where there are any.
        assert (moved == of_states) == (knobs is HANDED)
        after = wire.fingerprints() | {"encoder": wire.interlingua.encoder.backbone_fingerprint()}
        assert after == frozen


def loss_of(wire: LatentWire, table: pa.Table) -> torch.Tensor:
    """Return the cross-entropy of the answers of a few rows, read from their messages."""
    message, batch = prompted(wire, table)
    with wire.reading("llama", batch, message) as soft_ND:
        logits_NV = wire.local_receiver("llama").supervised_logits(batch, soft_ND)
    return F.cross_entropy(logits_NV, batch.target_N)


def prompted(wire: LatentWire, table: pa.Table) -> tuple[Any, Any]:
    rows = table.slice(0, 3).to_pydict()
    contexts = [rows["context"][0], TEXTS[0], TEXTS[2]]  # of unequal lengths
    message = wire.interlingua.encode(contexts)
    pieces = zip(
        message.slots("llama"), rows["llama_question_ids"], rows["llama_answer_ids"], strict=True
    )
    return message, collate([wire.builders["llama"].latent(*row) for row in pieces])


@pytest.mark.parametrize("head_first", [False, True], ids=["whole", "after its head"])
def test_a_receiver_reads_handed_keys_and_values_as_its_own_cache(
    run: RunConfig, table: pa.Table, head_first: bool
) -> None:
    """Loss of answers equals that of transformers, which is given the same as past keys and values."""
    wire = wire_of(with_values(run, HANDED | {"encoder.tokens_per_latent": 5}))
    lm, builder = wire.local_receiver("llama"), wire.builders["llama"]
    rows = table.slice(0, 3).to_pydict()
    with torch.no_grad():
        message, batch = prompted(wire, table)
        batch = lm.read_head(batch) if head_first else batch
        with wire.reading("llama", batch, message) as soft_ND:
            logits_NV = lm.supervised_logits(batch, soft_ND)
        found = F.cross_entropy(logits_NV, batch.target_N, reduction="none")
        expected = []
        for row, count in enumerate(message.slots("llama")):
            prompt = builder.latent(
                count, rows["llama_question_ids"][row], rows["llama_answer_ids"][row]
            )
            expected.append(by_cache(lm.lm, prompt, message.z_BLZ[row, :count]))
    assert len(set(message.slots("llama"))) > 1
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def by_cache(lm: Any, prompt: PromptSequence, kv_LE: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of a prompt's targets behind past keys and values in its slots."""
    head, rest = prompt.ids[: prompt.message.start], prompt.ids[prompt.message.stop :]
    cache = lm(input_ids=torch.tensor([head]), use_cache=True).past_key_values
    parts = turned(lm, kv_LE, prompt.message).split(
        [p.out_features for p in projections(lm, KEYS_VALUES)], 1
    )
    assert isinstance(cache, DynamicCache)
    for index, attention in enumerate(attentions(lm, KEYS_VALUES)):
        key, value = (
            part.unflatten(1, (-1, attention.head_dim)).transpose(0, 1)[None]
            for part in parts[2 * index : 2 * index + 2]
        )
        cache.update(key, value, index)
    logits_SV = lm(input_ids=torch.tensor([rest]), past_key_values=cache).logits[0]
    places = [place - prompt.message.stop for place in prompt.supervised]
    targets = torch.tensor([rest[place] for place in places])
    return F.cross_entropy(logits_SV[[place - 1 for place in places]], targets, reduction="none")


def test_what_stands_in_the_slots_else_changes_nothing(run: RunConfig, table: pa.Table) -> None:
    wire = wire_of(with_values(run, HANDED))
    lm = wire.local_receiver("llama")
    with torch.no_grad():
        message, batch = prompted(wire, table)
        plain = loss_of(wire, table)
        with wire.reading("llama", batch, message) as soft_ND:
            assert soft_ND is not None and not soft_ND.any()
            logits_NV = lm.supervised_logits(batch, torch.randn_like(soft_ND))
        torch.testing.assert_close(F.cross_entropy(logits_NV, batch.target_N), plain)
        other = replace(message, z_BLZ=message.z_BLZ.flip(0))
        with wire.reading("llama", batch, other) as soft_ND:
            swapped_NV = lm.supervised_logits(batch, soft_ND)
    assert not torch.allclose(swapped_NV, logits_NV, atol=1e-2)


def test_answers_continue_what_one_pass_says(run: RunConfig, table: pa.Table) -> None:
    """Decoding with a cache keeps the handed keys and values: greedy tokens are a fresh pass's argmax."""
    wire = wire_of(with_values(run, HANDED))
    builder, rows = wire.builders["llama"], table.slice(0, 2).to_pydict()
    message = wire.encode(rows["context"])
    prompts = [builder.latent(3, ids) for ids in rows["llama_question_ids"]]
    decoded = wire.decode("llama", prompts, message)[1].rows
    said = [
        builder.latent(3, ids, answer)
        for ids, answer in zip(rows["llama_question_ids"], decoded, strict=True)
    ]
    batch = collate(said)
    with torch.no_grad(), wire.reading("llama", batch, message) as soft_ND:
        logits_NV = wire.local_receiver("llama").supervised_logits(batch, soft_ND)
    greedy = logits_NV.argmax(1).tolist()
    for row, ids in enumerate(decoded):
        place = [n for n in range(len(greedy)) if batch.row_N[n] == row]
        assert [greedy[n] for n in place][: len(ids)] == ids


def test_a_text_is_recited_from_handed_keys_and_values(run: RunConfig, table: pa.Table) -> None:
    """The control embedding keeps its own keys: it alone asks for the text."""
    wire = wire_of(with_values(run, HANDED))
    lm, builder = wire.local_receiver("llama"), wire.builders["llama"]
    message = wire.encode(table["context"][0].as_py())
    batch = collate([builder.controlled(3, RECONSTRUCT, [7, 8, 9])])
    adapter: Any = wire.interlingua.adapters["llama"]
    with wire.reading("llama", batch, message) as soft_ND:
        logits_NV = lm.supervised_logits(batch, soft_ND)
    logits_NV.square().sum().backward()
    assert adapter.control_CD.grad[RECONSTRUCT].any()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bytes": (
        {"encoder.pooling": "memory"},
        "pooling memory needs kind lm, in whose pass memory tokens stand, got byte",
    ),
    "causal bytes": (
        {"encoder.attention": "causal"},
        "attention causal needs kind lm, got byte; choose that, or attention bidirectional",
    ),
    "parts": (
        {f"encoder.{n}": v for n, v in MEMORY.items()} | {"encoder.span_parts": 2},
        "span_parts 2 needs pooling spans and d_z as its multiple, got memory",
    ),
    "private": (
        {f"encoder.{n}": v for n, v in MEMORY.items()} | {"encoder.private_len": 2},
        "private_len needs pooling queries, split none and tokens_per_latent null, got memory",
    ),
    "another model": (
        HANDED | {"encoder.model": "toy-llama"},
        "so it needs model receiver:<name>, model_layers null and projection false, got toy-llama",
    ),
    "fewer layers": (HANDED | {"encoder.model_layers": 2}, "got receiver:llama, 2 and false"),
    "projected": (HANDED | {"encoder.projection": True}, "got receiver:llama, None and true"),
    "an embedding": (
        HANDED | {"adapter.kind": "linear"},
        "go together, got memory_kv and linear; set both, or neither",
    ),
    "states": (
        HANDED | {"encoder.pooling": "memory"},
        "go together, got memory and keys_values; set both, or neither",
    ),
    "another receiver": (
        HANDED | {"receivers": [r.model_dump() for r in RECEIVERS.values()]},
        "layers of llama, which other receivers do not have, got qwen; leave them out",
    ),
    "deep prefix": (
        HANDED | {"features.deep_prefix": {}, "training.alignment_steps": 5},
        r"got features\.deep_prefix, training\.alignment_steps; switch that off",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_go_together_is_refused_in_one_sentence(why: str) -> None:
    values, message = REFUSED[why]
    with pytest.raises(ConfigError, match=message) as caught:
        with_values(RunConfig(), values)
    assert len(str(caught.value).splitlines()) == 1


def test_another_width_than_that_of_what_is_sent_is_refused(run: RunConfig) -> None:
    with pytest.raises(ReceiverError, match=r"encoder\.d_z must be 512, .* got 100; set it"):
        InterlinguaEncoder(EncoderConfig(**KV | {"d_z": 100}), RECEIVERS)
    with pytest.raises(ReceiverError, match=r"as wide as the receiver's embeddings, 128, got 32"):
        wire_of(with_values(run, {"adapter.kind": "none"}))
    with pytest.raises(
        ReceiverError, match=r"memory_kv needs a receiver whose layers have .*; choose encoder\.poo"
    ):
        projections(Joined(), KEYS_VALUES)


def test_latents_are_the_prompt_where_there_is_no_adapter(run: RunConfig) -> None:
    knobs = {f"encoder.{n}": v for n, v in MEMORY.items()} | {
        "encoder.projection": False,
        "encoder.d_z": 128,
        "adapter.kind": "none",
        "adapter.calibration": "none",
        "receivers": [RECEIVERS["llama"].model_dump()],
    }
    wire = wire_of(with_values(run, knobs))
    message = wire.encode(TEXTS[0])
    states = wire.interlingua.encoder.states
    assert isinstance(states, MemoryStates)
    torch.testing.assert_close(message.z_BLZ, read(states, [TEXTS[0]], [3]))
    with torch.no_grad():
        assert torch.equal(wire.interlingua.prompt("llama", message)[0], message.z_BLZ)


def test_handed_keys_and_values_need_the_receiver_here_and_are_no_embeddings(
    run: RunConfig,
) -> None:
    handed = with_values(run, HANDED)
    assert obstacles(SweepConfig(run=handed)) == [
        "adapter.kind keys_values acts on the receivers' own layers"
    ]
    wire = wire_of(handed)
    with pytest.raises(ConfigError, match=r"got adapter\.kind keys_values; use answer"):
        wire.prompt_embeds(wire.encode(TEXTS[0]), "Where?", "llama")


def test_memory_alone_takes_another_way_through_the_backbone() -> None:
    """Other encoders of the same backbone are as they were: their class has no memory."""
    plain = InterlinguaEncoder(
        EncoderConfig(kind="lm", model="receiver:llama", latent_len=3), RECEIVERS
    )
    assert type(plain.states) is backbones.PretrainedStates
    assert not [name for name in plain.state_dict() if "memory" in name]
