"""A message in some heads alone: the receiver's own keys and values there are the text itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from latentwire.config import PromptConfig, ReceiverConfig
from latentwire.models.head_slots import HeadEntries, Heads, entries_of
from latentwire.models.key_heads import check_rotary, rotated, shape_of
from latentwire.pretrained.weights import ReceiverError, load_tokenizer
from latentwire.prompts.batch import Batch, collate
from latentwire.prompts.sequences import PromptBuilder
from latentwire.receivers.local import LocalReceiver

TEXTS = (
    "Ada lives in Oslo.",
    "Tom has a red ball and a blue hat, and lives by the sea.",
    "No.",
)
ASKED = ((1, "What?"), (0, "Where does Ada live?"), (1, "Where does Tom live?"), (2, "No?"))
MODELS = ("toy-llama", "toy-qwen", "toy-phi")


@pytest.fixture(scope="module", params=MODELS)
def lm(request: pytest.FixtureRequest) -> LocalReceiver:
    return LocalReceiver(ReceiverConfig(name="one", model=request.param))


@pytest.fixture(scope="module")
def builder(lm: LocalReceiver) -> PromptBuilder:
    return PromptBuilder(lm.tokenizer, lm.config, PromptConfig(), "context")


def every_head(lm: LocalReceiver) -> Heads:
    layers, heads, _ = shape_of(lm.lm)
    return tuple((layer, head) for layer in range(layers) for head in range(heads))


def own_entries(lm: LocalReceiver, builder: PromptBuilder, heads: Heads) -> list[torch.Tensor]:
    """Return each text's own keys (turned back) and values in some heads, ``[T, E]``."""
    rows = []
    for ids in builder.tokenize(list(TEXTS), [], [])["context_ids"]:
        whole = torch.tensor([[*builder.head_ids, *ids]])
        layers: Any = lm.lm.base_model(input_ids=whole, use_cache=True).past_key_values.layers
        start = len(builder.head_ids)
        position_RT = torch.arange(start, whole.shape[1])[None]
        entries = []
        for layer, head in heads:
            key = layers[layer].keys[:, head : head + 1, start:]
            entries += [
                rotated(lm.lm, layer, key, position_RT, back=True)[0, 0],
                layers[layer].values[0, head, start:].float(),
            ]
        rows.append(torch.cat(entries, -1))
    return rows


def batches(lm: LocalReceiver, builder: PromptBuilder, side: Any, answer: Any) -> list[Batch]:
    """Return text prompts of the questions, and latent ones with a slot for each token."""
    ids = builder.tokenize(list(TEXTS), [question for _, question in ASKED], ["a hat"] * len(ASKED))
    texts, latents = [], []
    for (text, _), question, said in zip(
        ASKED, ids["question_ids"], ids["answer_ids"], strict=True
    ):
        context = ids["context_ids"][text]
        texts.append(builder.text(context, question, said if answer else None))
        latents.append(builder.latent(len(context), question, said if answer else None))
    numbers = [text for text, _ in ASKED]
    return [collate(rows, side=side, messages=numbers) for rows in (texts, latents)]


@pytest.mark.parametrize("way", ["rows", "head", "parted"])
@torch.no_grad()
def test_its_own_keys_and_values_in_every_head_are_the_text(
    lm: LocalReceiver, builder: PromptBuilder, way: str
) -> None:
    heads = every_head(lm)
    entries = own_entries(lm, builder, heads)
    text, latent = batches(lm, builder, "right", True)
    expected = lm.supervised_logits(text)
    if way == "parted":
        parts = latent.parted()
        assert parts is not None
        begun, rest = lm.read_head(parts[0]), parts[1]
        with lm.heads_at_slots(torch.cat(entries), heads):
            past = lm.prefill(begun)
        logits = lm.supervised_logits(rest, None, past)
    else:
        kv_NE = torch.cat(entries)
        with lm.heads_at_slots(kv_NE, heads):
            logits = lm.supervised_logits(lm.read_head(latent) if way == "head" else latent)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("parted", [False, True], ids=["rows", "parted"])
def test_and_so_are_its_answers(lm: LocalReceiver, builder: PromptBuilder, parted: bool) -> None:
    heads = every_head(lm)
    with torch.no_grad():
        entries = own_entries(lm, builder, heads)
    text, _ = batches(lm, builder, "left", False)
    expected = lm.generate(text, builder.stop_ids, 8).rows
    assert any(expected)
    if parted:
        _, latent = batches(lm, builder, "right", False)
        parts = latent.parted("left")
        assert parts is not None
        with lm.heads_at_slots(torch.cat(entries), heads):
            past = lm.prefill(parts[0])
        found = lm.generate(parts[1], builder.stop_ids, 8, None, past).rows
    else:
        _, latent = batches(lm, builder, "left", False)
        with lm.heads_at_slots(torch.cat(entries), heads):
            found = lm.generate(latent, builder.stop_ids, 8).rows
    assert found == expected


@torch.no_grad()
def test_heads_that_are_not_chosen_see_nothing(lm: LocalReceiver, builder: PromptBuilder) -> None:
    """As with a mask that hides the text from all other heads, in one call of eager attention."""
    layers, heads_each, _ = shape_of(lm.lm)
    chosen = tuple((layer, (layer + 1) % heads_each) for layer in range(0, layers, 2))
    entries = own_entries(lm, builder, chosen)
    text, latent = batches(lm, builder, "right", True)
    with lm.heads_at_slots(torch.cat(entries), chosen):
        found = lm.supervised_logits(latent)
    everywhere = every_head(lm)
    own = own_entries(lm, builder, everywhere)
    kept = []
    for row, _ in ASKED:
        length = len(own[row])
        mask = torch.zeros(layers, heads_each, length, dtype=torch.bool)
        for layer, head in chosen:
            mask[layer, head] = True
        kept.append(mask)
    from latentwire.models import own_cache

    prompts = []
    ids = builder.tokenize(list(TEXTS), [question for _, question in ASKED], ["a hat"] * len(ASKED))
    for (row, _), question, said in zip(ASKED, ids["question_ids"], ids["answer_ids"], strict=True):
        prompts.append(builder.text(ids["context_ids"][row], question, said))
    with own_cache.cut(lm, prompts, kept, "right"):
        expected = lm.supervised_logits(text)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_gradients_of_entries_are_those_of_differences(
    lm: LocalReceiver, builder: PromptBuilder
) -> None:
    heads = every_head(lm)[1:3]
    with torch.no_grad():
        kv_NE = torch.cat(own_entries(lm, builder, heads))
    _, latent = batches(lm, builder, "right", True)
    parts = latent.parted()
    assert parts is not None

    def loss_of(entry_NE: torch.Tensor) -> torch.Tensor:
        with lm.heads_at_slots(entry_NE, heads):
            past = lm.prefill(lm.read_head(parts[0]))
        return lm.supervised_logits(parts[1], None, past).double().logsumexp(-1).sum()

    leaf = kv_NE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(kv_NE.shape, generator=generator)
    direction = direction / direction.norm()
    with torch.no_grad():
        step = 0.05
        up, down = loss_of(kv_NE + step * direction), loss_of(kv_NE - step * direction)
    slope = float(up - down) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.05, abs=2e-3)


def test_nothing_is_left_behind(lm: LocalReceiver, builder: PromptBuilder) -> None:
    before = lm.lm.config._attn_implementation
    heads = every_head(lm)[:2]
    with torch.no_grad():
        kv_NE = torch.cat(own_entries(lm, builder, heads))
        _, latent = batches(lm, builder, "right", True)
        rows = latent.without_latents()
        assert rows.ids_BS.shape[1] < latent.ids_BS.shape[1]
        with pytest.raises(RuntimeError, match="stop"), lm.heads_at_slots(kv_NE, heads):
            raise RuntimeError("stop")
    assert lm.lm.config._attn_implementation == before
    assert lm._at_slots is None
    assert not any(hasattr(module, "head_entries") for module in lm.lm.modules())


def test_a_receiver_without_such_heads_is_refused_with_the_reason() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    lm = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    with pytest.raises(ReceiverError, match="no self_attn"):
        shape_of(lm)
    with pytest.raises(ReceiverError, match=r"no base_model\.rotary_emb"):
        check_rotary(lm, "one")


def of_config(folder: Path, model: Any) -> LocalReceiver:
    """A model that was just drawn, with the toy pair's tokenizer."""
    model.save_pretrained(folder)
    load_tokenizer(ReceiverConfig(name="one", model="toy-llama")).save_pretrained(folder)
    return LocalReceiver(ReceiverConfig(name="one", model=str(folder), template="plain"))


SHAPE: dict[str, Any] = {
    "vocab_size": 704,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def with_small_keys(model: Any) -> Any:
    """The model with keys that are next to nothing, wherever they stand."""
    for name, weight in model.named_parameters():
        if "k_proj" in name:
            weight.data.mul_(1e-2)
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: GlmForCausalLM(GlmConfig(**SHAPE)),
        lambda: with_small_keys(GlmForCausalLM(GlmConfig(**SHAPE))),
        lambda: SmolLM3ForCausalLM(SmolLM3Config(**SHAPE, no_rope_layers=[1, 0])),
    ],
    ids=["pairs-side-by-side", "small-keys", "a-layer-without"],
)
def test_keys_that_are_turned_in_another_way_are_refused(tmp_path: Path, model: Any) -> None:
    lm = of_config(tmp_path, model())
    with (
        pytest.raises(ReceiverError, match="turned in another way"),
        lm.heads_at_slots(torch.zeros(1, 32), ((0, 0), (1, 1))),
    ):
        pass


@pytest.mark.parametrize("layers", [2, 1], ids=["windows", "half-of-them"])
def test_a_layer_with_a_window_must_see_the_whole_prompt(tmp_path: Path, layers: int) -> None:
    kinds = ["sliding_attention", "sliding_attention" if layers == 2 else "full_attention"]
    config = Gemma3TextConfig(**SHAPE, layer_types=kinds, sliding_window=64)
    lm = of_config(tmp_path, Gemma3ForCausalLM(config))
    builder = PromptBuilder(lm.tokenizer, lm.config, PromptConfig(), "context")
    heads = every_head(lm)
    with torch.no_grad():
        entries = own_entries(lm, builder, heads)
        text, latent = batches(lm, builder, "right", True)
        kv_NE = torch.cat(entries)
        with lm.heads_at_slots(kv_NE, heads):
            found = lm.supervised_logits(latent)
    torch.testing.assert_close(found, lm.supervised_logits(text), atol=2e-4, rtol=1e-4)
    lm.window = latent.ids_BS.shape[1] - 1
    with (
        lm.heads_at_slots(kv_NE, heads),
        pytest.raises(ReceiverError, match="needs all of its prompt"),
    ):
        lm.supervised_logits(latent)


def test_entries_fill_the_slots(lm: LocalReceiver, builder: PromptBuilder) -> None:
    _, latent = batches(lm, builder, "right", True)
    slots, heads = int(latent.begun().latents_BS.sum()), every_head(lm)[:1]
    width = 2 * shape_of(lm.lm)[2]
    for count in (slots - 1, slots + 1):
        kv_NE = torch.zeros(count, width)
        with lm.heads_at_slots(kv_NE, heads), pytest.raises(ValueError, match="fill the messages"):
            lm.supervised_logits(latent)


def test_entries_are_of_the_receivers_type(lm: LocalReceiver, builder: PromptBuilder) -> None:
    _, latent = batches(lm, builder, "right", True)
    heads = every_head(lm)[:2]
    slots, width = int(latent.begun().latents_BS.sum()), 4 * shape_of(lm.lm)[2]
    entries = entries_of(lm.lm, heads, torch.randn(slots, width), latent, torch.bfloat16)
    assert entries.key_RJTD.dtype == entries.value_RJTD.dtype == torch.bfloat16


def test_entries_come_back_from_a_file_and_move_to_a_device_whole() -> None:
    heads = ((0, 1), (2, 0))
    key_RJTD, value_RJTD = torch.randn(2, 1, 2, 3, 4)
    keep_RT = torch.tensor([[True, True, False]])
    entries = HeadEntries(heads, key_RJTD, value_RJTD, keep_RT, torch.tensor([7]))
    tensors = load(save(entries.tensors()))
    again = HeadEntries.of_tensors(tensors | {"attention": torch.ones(1)})
    assert again is not None and again.heads == heads
    for name, value in vars(entries).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(again, name), value)
    assert HeadEntries.of_tensors({"attention": torch.ones(1)}) is None
    moved = entries.to(torch.device("meta"))
    assert moved.heads == heads and moved.longest == 3
    assert {v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)} == {"meta"}
