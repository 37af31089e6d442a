"""Every encoder reads its own text, all of it, and nothing of the batch around it."""

import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import BertConfig, BertModel

from latentwire.config import AdapterConfig, EncoderConfig, RunConfig
from latentwire.message import Message
from latentwire.models import backbones
from latentwire.models.adapter import Adapter
from latentwire.models.backbones import PretrainedStates
from latentwire.models.encoders import STATES, InterlinguaEncoder, token_rows
from latentwire.models.low_rank import updates_of
from latentwire.models.slots import heads_of_entries, projections
from latentwire.pretrained.weights import ReceiverError, load_tokenizer

TEXTS = [
    "Ada lives in Oslo.",
    "",
    "Ben works as baker. Cleo owns an uncommonly-long-word. Ada eats rice.",
]
RECEIVERS = {receiver.name: receiver for receiver in RunConfig().receivers}
SMALL = {"latent_len": 5, "d_z": 16, "d_model": 32, "layers": 2, "heads": 4}


def sentence_encoder(folder: Path) -> str:
    """A small BERT of random weights with 16 positions, so that longer texts need several windows."""
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = load_tokenizer(RECEIVERS["llama"])
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=16,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


KINDS: dict[str, dict] = {
    "byte": {},
    "byte-spans": {"pooling": "spans"},
    "byte-ratio": {"pooling": "spans", "tokens_per_latent": 3},
    "byte-sentences": {"pooling": "spans", "span_ends": "sentences", "latent_len": 2},
    "byte-private": {"private_len": 2},
    "byte-lines": {"split": "lines"},
    "st": {"kind": "st"},
    "st-frozen": {"kind": "st", "tune": "frozen"},
    "st-lora": {"kind": "st", "tune": "lora"},
    "lm": {"kind": "lm", "model": "receiver:llama", "model_layers": 2},
    "lm-ratio": {"kind": "lm", "model": "toy-qwen", "pooling": "spans", "tokens_per_latent": 4},
    "lm-sentences": {
        "kind": "lm",
        "model": "toy-qwen",
        "pooling": "spans",
        "span_ends": "sentences",
        "latent_len": 2,
    },
    "lm-frozen": {"kind": "lm", "model": "toy-qwen", "tune": "frozen"},
    "lm-lora": {"kind": "lm", "model": "receiver:qwen", "tune": "lora"},
    "lm-causal": {"kind": "lm", "model": "toy-qwen", "attention": "causal", "pooling": "spans"},
    "senders": {"kind": "senders", "senders": ("toy-qwen", "receiver:llama"), "pooling": "spans"},
    "senders-ratio": {"kind": "senders", "pooling": "spans", "tokens_per_latent": 3},
    "lm-memory": {
        "kind": "lm",
        "model": "toy-qwen",
        "attention": "causal",
        "pooling": "memory",
        "tokens_per_latent": 4,
    },
    "lm-memory-kv": {
        "kind": "lm",
        "model": "receiver:llama",
        "pooling": "memory_kv",
        "projection": False,
        "tune": "lora",
        "d_z": 512,
    },
}


def test_every_kind_has_states_of_its_own() -> None:
    assert set(STATES) == set(typing.get_args(EncoderConfig.model_fields["kind"].annotation))


def test_every_kind_is_tried() -> None:
    tried = {values.get("kind", "byte") for values in KINDS.values()}
    assert tried == set(typing.get_args(EncoderConfig.model_fields["kind"].annotation))


@pytest.fixture(params=KINDS)
def encoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> InterlinguaEncoder:
    values = SMALL | KINDS[request.param]
    if values.get("kind") == "st":
        values["model"] = sentence_encoder(tmp_path_factory.getbasetemp() / "sentence-encoder")
    torch.manual_seed(0)
    return InterlinguaEncoder(EncoderConfig(**values), RECEIVERS).eval()


def read(message: Message, row: int, receiver: str) -> torch.Tensor:
    z_BLZ, keep_BL = message.read_by(receiver)
    return z_BLZ[row, keep_BL[row]]


def test_a_batch_gives_what_each_row_gives_alone(encoder: InterlinguaEncoder) -> None:
    tokens = encoder.tokenize(TEXTS)
    together = encoder(tokens)
    for row, text in enumerate(TEXTS):
        alone = encoder(encoder.tokenize([text]))
        for name in RECEIVERS:
            torch.testing.assert_close(
                read(together, row, name), read(alone, 0, name), atol=1e-5, rtol=1e-4
            )
            assert (
                len(read(together, row, name))
                == encoder.slots(tokens, name)[row]
                == together.slots(name)[row]
            )


def test_the_first_and_the_last_word_matter(encoder: InterlinguaEncoder) -> None:
    texts = [TEXTS[2], TEXTS[2].replace("rice", "fish"), TEXTS[2].replace("Ben", "Dan")]
    message = encoder(encoder.tokenize(texts))
    for other in (1, 2):
        assert not torch.allclose(
            read(message, 0, "llama"), read(message, other, "llama"), atol=1e-4
        )


def test_spans_cover_the_text_once_for_each_group_of_latents(encoder: InterlinguaEncoder) -> None:
    tokens = encoder.tokenize(TEXTS)
    for name in RECEIVERS:
        span_BL2 = encoder.spans(tokens, name)
        keep_BL = encoder(tokens).read_by(name)[1]
        assert span_BL2.shape[:2] == keep_BL.shape
        for row, text in [(0, TEXTS[0]), (2, TEXTS[2])]:
            own_L2 = span_BL2[row, keep_BL[row]]
            groups = 2 if encoder.private else 1
            size_L = own_L2[:, 1] - own_L2[:, 0]
            assert float(size_L.sum()) == pytest.approx(groups, abs=1e-5)
            starts = [place for place, start in enumerate(own_L2[:, 0].tolist()) if start < 1e-6]
            assert len(starts) >= groups and float(own_L2[-1, 1]) == pytest.approx(1, abs=1e-5)
            alone_BL2 = encoder.spans(encoder.tokenize([text]), name)
            torch.testing.assert_close(alone_BL2[0, : len(own_L2)], own_L2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [1, 4, 9])
def test_each_receiver_reads_its_own_private_latents_at_any_length(shared: int) -> None:
    config = EncoderConfig(latent_len=4, private_len=2, d_z=8, d_model=32, layers=1, heads=2)
    encoder = InterlinguaEncoder(config, RECEIVERS)
    tokens = encoder.tokenize(TEXTS)
    message = encoder(replace(tokens, latents_B=torch.full_like(tokens.latents_B, shared)))
    for place, name in enumerate(RECEIVERS):
        z_BLZ, keep_BL = message.read_by(name)
        private_BLZ = message.z_BLZ[:, shared + 2 * place :][:, :2]
        assert keep_BL.all() and torch.equal(
            z_BLZ, torch.cat((message.z_BLZ[:, :shared], private_BLZ), 1)
        )


def test_what_is_trained_is_what_tune_says(encoder: InterlinguaEncoder) -> None:
    if not isinstance(encoder.states, PretrainedStates):
        frozen = encoder.frozen_parameters()
        assert all(p.requires_grad == (n not in frozen) for n, p in encoder.named_parameters())
        return
    tuned = encoder.states.tuned
    assert {p.requires_grad for p in encoder.states.backbone.parameters()} == {tuned == "full"}
    assert (len(encoder.states.updates) > 0) == (tuned == "lora")
    assert (encoder.backbone_fingerprint() is None) == (tuned == "full")
    encoder.train()
    assert encoder.states.backbone.training == (tuned == "full")
    encoder(encoder.tokenize(TEXTS)).z_BLZ.square().sum().backward()
    reached = [name for name, p in encoder.named_parameters() if p.grad is not None]
    assert any("backbone" in name for name in reached) == (tuned == "full")
    assert any("updates" in name for name in reached) == (tuned == "lora")


@pytest.mark.parametrize(
    "values", [{}, {"pooling": "spans", "tokens_per_latent": 3}], ids=["fixed", "ratio"]
)
def test_lines_are_encoded_alone_and_their_messages_joined(values: dict) -> None:
    torch.manual_seed(0)
    encoder = InterlinguaEncoder(EncoderConfig(**SMALL | values, split="lines"), RECEIVERS).eval()
    one, other = TEXTS[0], TEXTS[2]
    tokens = encoder.tokenize([f"{one}\n\n{other}", other, ""])
    message = encoder(tokens)
    alone = [read(encoder(encoder.tokenize([text])), 0, "qwen") for text in (one, other, "")]
    assert encoder.slots(tokens, "qwen") == [
        len(alone[0]) + len(alone[1]),
        len(alone[1]),
        len(alone[2]),
    ]
    torch.testing.assert_close(read(message, 0, "qwen"), torch.cat(alone[:2]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read(message, 1, "qwen"), alone[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read(message, 2, "qwen"), alone[2], atol=1e-5, rtol=1e-4)


def test_parts_of_a_latent_are_the_latents_of_parts_of_its_span() -> None:
    base = {"kind": "byte", "pooling": "spans", "d_model": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    parted = InterlinguaEncoder(
        EncoderConfig(**base, latent_len=3, d_z=16, span_parts=2), {}
    ).eval()
    finer = InterlinguaEncoder(EncoderConfig(**base, latent_len=6, d_z=8), {}).eval()
    finer.load_state_dict(parted.state_dict())
    texts = ["Ada lives in Oslo and works as a baker.", "Ben owns a dog."]
    z_BLZ, finer_BLZ = (encoder(encoder.tokenize(texts)).z_BLZ for encoder in (parted, finer))
    assert z_BLZ.shape == (2, 3, 16)
    torch.testing.assert_close(z_BLZ.unflatten(2, (2, 8)).flatten(1, 2), finer_BLZ)
    with pytest.raises(
        ValidationError, match="span_parts 2 needs pooling spans and d_z as its multiple"
    ):
        EncoderConfig(span_parts=2)


@pytest.mark.parametrize("kind", ["byte-sentences", "lm-sentences"])
def test_a_span_holds_whole_sentences_where_there_are_enough(kind: str) -> None:
    encoder = InterlinguaEncoder(EncoderConfig(**SMALL | KINDS[kind]), RECEIVERS)
    texts = [
        "Ada lives in Oslo. Ben has a very small cat.",
        "Ada lives in Oslo. Ben eats. Cleo works as pilot.",
        "Ada",
    ]
    span_BL2 = encoder.spans(encoder.tokenize(texts), "qwen")
    ends = [
        texts[0].index("Ben"),
        texts[1].index("Cleo"),
    ]  # three sentences in two spans: two, then one
    for span_L2, text, end in zip(span_BL2, texts, ends, strict=False):
        (_, first), (second, stop) = (span_L2 * len(text)).tolist()
        assert first == second == pytest.approx(end, abs=1.01)  # the space belongs to either word
        assert stop == pytest.approx(len(text))
    assert 0 < span_BL2[2, 0, 1] == span_BL2[2, 1, 0] < 1  # one sentence: it is parted evenly


def own_ids(states: PretrainedStates, texts: list[str]) -> list[list[int]]:
    return [row[0] for row in token_rows([states.tokenizer], texts, "none")]


def test_a_causal_lm_is_made_bidirectional() -> None:
    states = PretrainedStates(
        EncoderConfig(kind="lm", model="receiver:llama"), RECEIVERS, load_weights=True
    ).eval()
    tensors, sizes = states.collate(own_ids(states, [TEXTS[0], TEXTS[0].replace("Oslo", "Rome")]))
    one, other = states(**tensors, length_B=torch.tensor([len(size_S) for size_S in sizes]))
    assert not torch.allclose(one[0], other[0], atol=1e-3)  # the first token sees the last


def test_a_mask_that_shows_everything_is_the_default_and_none_leaves_the_lm_as_it_is() -> None:
    for attention in ("bidirectional", "causal"):
        config = EncoderConfig(kind="lm", model="receiver:llama", attention=attention)
        states = PretrainedStates(config, RECEIVERS, load_weights=True).eval()
        ids = own_ids(states, [TEXTS[0]])[0]
        tensors, _ = states.collate([ids])
        shown_SS = torch.ones(1, 1, *2 * tensors["ids_WT"].shape[1:], dtype=torch.bool)
        shown = {"attention_mask": shown_SS} if attention == "bidirectional" else {}
        with torch.no_grad():
            state_SM = states.backbone(input_ids=tensors["ids_WT"], **shown).last_hidden_state[0]
            found_SM = states(**tensors, length_B=torch.tensor([len(ids)]))[0]
        assert torch.equal(found_SM, state_SM[len(states.prefix) :])


def test_eager_attention_gives_what_sdpa_gives() -> None:
    receivers = {"llama": RECEIVERS["llama"].model_copy(update={"attn_implementation": "eager"})}
    config = EncoderConfig(kind="lm", model="receiver:llama")
    eager, sdpa = (
        PretrainedStates(config, lenders, load_weights=True).eval()
        for lenders in (receivers, RECEIVERS)
    )
    assert eager.backbone.config._attn_implementation == "eager"
    rows = [sdpa.tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    length_B = torch.tensor([len(row) for row in rows])
    window = sdpa.collate(rows)[0]
    torch.testing.assert_close(
        eager(**window, length_B=length_B), sdpa(**window, length_B=length_B), rtol=1e-4, atol=1e-5
    )


def test_a_long_text_is_read_in_windows_and_nothing_is_cut(tmp_path: Path) -> None:
    config = EncoderConfig(kind="st", model=sentence_encoder(tmp_path / "st"))
    states = PretrainedStates(config, RECEIVERS, load_weights=True).eval()
    text = " ".join(TEXTS)
    (own,) = own_ids(states, [text])
    tensors, sizes = states.collate([own])
    assert len(own) > states.window and tensors["ids_WT"].shape[0] > 1
    assert tensors["ids_WT"][tensors["real_WT"]].tolist() == own and len(sizes[0]) == len(own)
    assert states(**tensors, length_B=torch.tensor([len(own)])).shape == (1, len(own), 32)


def test_a_real_sentence_encoder_reads_what_a_text_is_about(real_receivers: Path) -> None:
    config = EncoderConfig(kind="st", model=str(real_receivers / "minilm"), tune="frozen")
    states = PretrainedStates(config, RECEIVERS, load_weights=True).eval()
    texts = [
        "A cat sleeps on the sofa.",
        "The kitten is napping on a couch.",
        "Interest rates rose again. " * 200,
    ]
    tensors, sizes = states.collate(own_ids(states, texts))
    assert len(sizes[2]) > states.window  # read in windows
    lengths = [len(size_S) for size_S in sizes]
    x_BSM = states(**tensors, length_B=torch.tensor(lengths))
    means = [x_BSM[row, :length].mean(0) for row, length in enumerate(lengths)]
    cat, kitten, rates = (mean / mean.norm() for mean in means)
    assert cat @ kitten > 0.5 > cat @ rates


class Tower(torch.nn.Module):
    """A model that keeps its layers elsewhere."""

    base_model = torch.nn.Linear(2, 2)


class Joined(torch.nn.Module):
    """A model whose attention makes queries, keys and values in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model, layer = torch.nn.Module(), torch.nn.Module()
        layer.self_attn = torch.nn.ModuleDict({"qkv_proj": torch.nn.Linear(2, 6)})
        self.base_model.layers = torch.nn.ModuleList([layer])


def test_layers_and_backbones_that_are_not_there() -> None:
    with pytest.raises(ReceiverError, match="model_layers must be ≤ 4, the backbone's own, got 9"):
        PretrainedStates(
            EncoderConfig(kind="lm", model="toy-qwen", model_layers=9), RECEIVERS, load_weights=True
        )
    with pytest.raises(
        ReceiverError, match="model_layers needs a backbone with a list of layers, Tower has none"
    ):
        backbones.keep_layers(Tower(), 1)
    with pytest.raises(
        ReceiverError, match="targets must name linear layers of LlamaModel, got nobody"
    ):
        updates_of(
            PretrainedStates(EncoderConfig(kind="lm", model="toy-llama"), RECEIVERS, True).backbone,
            ["nobody"],
            2,
            2.0,
        )
    with pytest.raises(
        ReceiverError, match=r"deep_prefix needs a receiver with base_model\.layers, Tower has none"
    ):
        projections(Tower(), "deep_prefix")
    for part, feature in ((projections, "deep_prefix"), (heads_of_entries, "coprocessor")):
        with pytest.raises(
            ReceiverError,
            match=f"{feature} needs a receiver whose layers have .*--set features.{feature}=null",
        ):
            part(Joined(), feature)
    with pytest.raises(
        ReceiverError, match="receiver encoder: model must be a Hub id or an existing directory"
    ):
        PretrainedStates(EncoderConfig(kind="lm", model="./nowhere"), RECEIVERS, load_weights=True)


def test_a_linear_adapter_is_the_start_of_an_mlp() -> None:
    adapters = []
    for kind in ("mlp", "linear"):
        adapters.append(Adapter(AdapterConfig(kind=kind), d_z=8, d_model=16, embed_rms=0.03))
    mlp, linear = adapters
    linear.skip.load_state_dict(mlp.skip.state_dict())
    z_BLZ = torch.randn(2, 3, 8)
    torch.testing.assert_close(linear(z_BLZ), mlp(z_BLZ))
    trained = {name for name, _ in linear.named_parameters()}
    assert trained == {"norm.weight", "norm.bias", "skip.weight", "gain", "control_CD"}


@pytest.mark.parametrize("calibration", ["learned", "embed_rms", "none"])
def test_calibration_sets_the_scale_of_the_prompt(calibration: str) -> None:
    torch.manual_seed(0)
    adapter = Adapter(AdapterConfig(calibration=calibration), d_z=64, d_model=128, embed_rms=0.03)
    rms_B = adapter(5 * torch.randn(8, 4, 64)).square().mean((1, 2)).sqrt()
    expected = 1.0 if calibration == "none" else 0.03
    assert rms_B.mean().item() == pytest.approx(expected, rel=0.1)
    with torch.no_grad():
        adapter.skip.weight *= 3
    after_B = adapter(5 * torch.randn(8, 4, 64)).square().mean((1, 2)).sqrt()
    assert after_B.mean().item() == pytest.approx(
        0.03 if calibration == "embed_rms" else 3 * expected, rel=0.1
    )
    assert hasattr(adapter, "gain") == (calibration == "learned")


def test_a_held_scale_is_each_examples_own() -> None:
    adapter = Adapter(AdapterConfig(calibration="embed_rms"), d_z=8, d_model=16, embed_rms=0.03)
    with torch.no_grad():
        adapter.down.bias.fill_(0.5)
        adapter.up.weight.mul_(9)
    keep_BL = torch.tensor([[True, True, True], [True, False, False]])
    p_BLD = adapter(
        torch.randn(2, 3, 8) * torch.tensor([1.0, 9.0])[:, None, None], keep_BL
    ).detach()
    for row, count in ((0, 3), (1, 1)):
        assert float(p_BLD[row, :count].square().mean().sqrt()) == pytest.approx(0.03, rel=1e-4)


@pytest.mark.parametrize(("words", "latents"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3), (0, 1)])
def test_a_message_has_a_latent_for_every_so_many_tokens_and_for_what_is_left(
    words: int, latents: int
) -> None:
    encoder = InterlinguaEncoder(
        EncoderConfig(**SMALL | {"pooling": "spans", "tokens_per_latent": 3}), RECEIVERS
    )
    tokens = encoder.tokenize([" ".join(["word"] * words)])  # a word is a patch
    assert tokens.length_B.tolist() == [words] and encoder.slots(tokens, "qwen") == [latents]
    assert encoder(tokens).length_B.tolist() == [latents]


def test_held_scale_does_not_see_padding() -> None:
    adapter = Adapter(AdapterConfig(calibration="embed_rms"), d_z=8, d_model=16, embed_rms=0.03)
    z_BLZ, keep_BL = torch.randn(1, 4, 8), torch.tensor([[True, True, True, False]])
    padded = z_BLZ.clone()
    padded[0, 3] = 99
    torch.testing.assert_close(adapter(padded, keep_BL)[:, :3], adapter(z_BLZ[:, :3])[:, :3])


def test_slot_positions_tell_equal_latents_apart() -> None:
    adapter = Adapter(
        AdapterConfig(slot_positions=True), d_z=8, d_model=16, embed_rms=0.03, slots=2
    )
    torch.nn.init.normal_(adapter.position_LD)
    one, other = adapter(torch.ones(1, 2, 8))[0]
    assert not torch.allclose(one, other)


def test_spans_of_lines_are_shares_of_the_whole_text() -> None:
    """Receivers count the ends of lines too: a long last line begins where it does in the text."""
    config = EncoderConfig(**SMALL | {"pooling": "spans"}, split="lines")
    text = "\n".join(["abcde"] * 100 + ["x" * 600])
    (span_L2,) = InterlinguaEncoder(config, RECEIVERS).spans(
        InterlinguaEncoder(config, RECEIVERS).tokenize([text]), "qwen"
    )
    start = text.index("x") / len(text)
    assert start == 0.5
    first_of_long = 100 * config.latent_len
    assert float(span_L2[first_of_long, 0]) == pytest.approx(start)
    assert float(span_L2[first_of_long - 1, 1]) == pytest.approx(start)
    assert float(span_L2[-1, 1]) == pytest.approx(1)
