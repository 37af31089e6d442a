"""Senders read a text as they were trained, and their states stand at the ruler's tokens."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from latentwire.config import EncoderConfig, RunConfig, SweepConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data.readers import TrainingBudget
from latentwire.data.shards import shard_key
from latentwire.model import LatentWire
from latentwire.models.encoders import (
    InterlinguaEncoder,
    MessageLengths,
    encoder_tokenizers,
    token_rows,
)
from latentwire.models.head_slots import HeadEntries, seen
from latentwire.models.key_heads import shape_of
from latentwire.models.sender import EPS
from latentwire.models.senders import (
    SEPARATOR,
    SenderStates,
    joined_row,
    lender_of,
    parted_row,
    reads_at,
    ruler_ids,
    sender_sources,
)
from latentwire.planning.planner import WORKER_BASE_BYTES, Plan, plan
from latentwire.planning.sharing import encoder_bytes, final_slots
from latentwire.pretrained import weights
from latentwire.pretrained.weights import ReceiverError
from latentwire.training.text_readers import _lengths, reader_run
from tests.conftest import HEADS, choose_some_heads
from tests.models.test_encoders import RECEIVERS, TEXTS, sentence_encoder

ONE: dict[str, Any] = {"kind": "senders", "senders": ("toy-qwen",), "lead": ""}
TWO: dict[str, Any] = {
    "kind": "senders",
    "senders": ("receiver:llama", "toy-qwen"),
    "lead": "",
}
ACCENTS = "Zoë ate 3 crêpes — “délicieux”, 日本語 she said. 🦜 Ada naïvely agreed."


def states_of(values: dict[str, Any], **changed: Any) -> SenderStates:
    return SenderStates(EncoderConfig(**values | changed), RECEIVERS, load_weights=True).eval()


def rows_of(states: SenderStates, texts: list[str]) -> list[list[int]]:
    return [row[0] for row in token_rows(states.tokenizers, texts, "none")]


def read(states: SenderStates, texts: list[str]) -> torch.Tensor:
    tensors, sizes = states.collate(rows_of(states, texts))
    return states(**tensors, length_B=torch.tensor([len(size_S) for size_S in sizes]))


def hidden(states: SenderStates, number: int, text: str) -> tuple[torch.Tensor, ...]:
    """Return what the whole model says, by transformers' own way, of a text's own tokens."""
    source = (RECEIVERS["llama"], RECEIVERS["qwen"])[number]
    model = AutoModelForCausalLM.from_pretrained(weights.resolve(source)).eval()
    sender: Any = states.senders[number]
    ids = sender.tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        told = model(torch.tensor([[*sender.prefix, *ids]]), output_hidden_states=True)
    return tuple(x_BSD[0, len(sender.prefix) :] for x_BSD in told.hidden_states)


def unit(x_SD: torch.Tensor) -> torch.Tensor:
    return x_SD / (x_SD.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("depths", [(0.0, 0.2, 0.4, 0.6, 0.8), (0.5,), (0.0,), (1.0, 0.25)])
def test_states_are_those_of_the_whole_model_over_their_rms(depths: tuple[float, ...]) -> None:
    states = states_of({"kind": "senders"}, senders=("receiver:llama",), depths=depths)
    x_SM = read(states, [ACCENTS])[0]
    layers = hidden(states, 0, ACCENTS)
    assert len(layers) == 5
    expected = [unit(layers[round(4 * depth)]) for depth in depths]
    assert states.width == len(depths) * 128 == x_SM.shape[1]
    torch.testing.assert_close(x_SM, torch.cat(expected, -1), atol=1e-5, rtol=1e-4)
    # No layer above the deepest is there to be run.
    assert len(states.senders[0].backbone.layers) == max(1, round(4 * max(depths)))


def test_the_first_state_is_what_the_first_layer_reads_however_it_is_handed_on() -> None:
    """Architectures hand it to their layers by its place, or by its name."""
    states = states_of(ONE, depths=(0.0, 0.5))
    expected_BSM = read(states, [ACCENTS])

    def by_name(_: Any, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return (), options | {"hidden_states": args[0]}

    layer = states.senders[0].backbone.layers[0]
    with layer.register_forward_pre_hook(by_name, with_kwargs=True):
        torch.testing.assert_close(read(states, [ACCENTS]), expected_BSM)


def test_a_later_token_changes_nothing_before_it() -> None:
    states = states_of(ONE)
    one, other = read(states, ["Ada lives in Oslo now.", "Ada lives in Rome now."])
    same = torch.isclose(one, other, atol=1e-5).all(-1)
    ids = [states.tokenizer(t, add_special_tokens=False).input_ids for t in ("Ada lives in", "x")]
    assert same[: len(ids[0])].all() and not same[len(ids[0]) :].any()


def test_padding_changes_nothing_and_is_zero() -> None:
    states = states_of(TWO)
    texts = [*TEXTS, ACCENTS]
    together = read(states, texts)
    rows = rows_of(states, texts)
    for row, text in enumerate(texts):
        length, alone_SM = len(ruler_ids(rows[row])), read(states, [text])[0]
        torch.testing.assert_close(together[row, :length], alone_SM[:length], atol=1e-5, rtol=1e-4)
        assert not together[row, length:].any()
        assert not length or together[row, :length].any(-1).all()
    assert not read(states, [""]).any()


def test_a_second_sender_is_read_where_the_rulers_token_ends_or_later() -> None:
    states = states_of(TWO, depths=(0.5,))
    rows = rows_of(states, [ACCENTS, TEXTS[0]])
    tensors, sizes = states.collate(rows)
    for row, text in enumerate((ACCENTS, TEXTS[0])):
        # The ends of tokens, from their own bytes.
        ends = []
        for ids, tokenizer in zip(parted_row(rows[row]), states.tokenizers, strict=True):
            sizes_S = [_size(tokenizer, token) for token in ids]
            ends.append(torch.tensor(sizes_S).cumsum(0).tolist())
            assert ends[-1][-1] == len(text.encode())
        ruler, other = ends
        expected = [next(i for i, end in enumerate(other) if end >= stop) for stop in ruler]
        assert tensors["1_read_BS"][row, : len(ruler)].tolist() == expected
        assert sizes[row].cumsum(0).tolist() == ruler
    assert ruler != other, "the two tokenizers must cut a text differently"
    x_SM = read(states, [ACCENTS])[0]
    read_S = states.collate(rows[:1])[0]["1_read_BS"][0]
    parts = unit(hidden(states, 0, ACCENTS)[2]), unit(hidden(states, 1, ACCENTS)[2])[read_S]
    torch.testing.assert_close(x_SM, torch.cat(parts, -1), atol=1e-5, rtol=1e-4)


def _size(tokenizer: Any, token: int) -> int:
    """Return the bytes of a byte-level token: each is one character of its piece."""
    return len(tokenizer.convert_ids_to_tokens(token))


def test_reads_at_the_first_end_that_is_late_enough_or_the_last() -> None:
    other_U = torch.tensor([2, 5, 6])
    assert reads_at(torch.tensor([1, 2, 3, 5, 6, 9]), other_U).tolist() == [0, 0, 1, 1, 2, 2]
    assert reads_at(torch.tensor([1]), torch.tensor([], dtype=torch.long)).tolist() == [0]


def test_a_long_text_is_read_in_windows() -> None:
    states = states_of(TWO, depths=(0.0, 1.0))
    text = " ".join(TEXTS)
    whole_SM = read(states, [text])[0]
    for sender in states.senders:
        sender.window = 7
    tensors, _ = states.collate(rows_of(states, [text]))
    assert tensors["0_ids_WT"].shape[0] > 1 < tensors["1_ids_WT"].shape[0]
    cut_SM = read(states, [text])[0]
    assert cut_SM.shape == whole_SM.shape
    # The embeddings are the same; what was read before them is not.
    for start in (0, 256):
        torch.testing.assert_close(cut_SM[:, start : start + 112], whole_SM[:, start : start + 112])
    assert not torch.allclose(cut_SM[8:], whole_SM[8:], atol=1e-3)


def test_rows_hold_every_senders_ids_and_count_the_rulers_alone() -> None:
    config = EncoderConfig(**TWO, pooling="spans", tokens_per_latent=3, split="lines")
    encoder = InterlinguaEncoder(config, RECEIVERS)
    texts = ["Ada lives in Oslo.\nBen bakes.", "", ACCENTS]
    rows = encoder.token_ids(texts)
    assert [len(row) for row in rows] == [2, 1, 1]
    llama, qwen = (
        t(ACCENTS, add_special_tokens=False).input_ids for t in encoder.states.tokenizers
    )
    assert rows[2] == [[*llama, SEPARATOR, *qwen]] and rows[1] == [[SEPARATOR]]
    assert len(llama) != len(qwen)
    assert parted_row(rows[2][0]) == [llama, qwen] and ruler_ids(rows[2][0]) == llama
    assert joined_row([llama]) == llama and parted_row([]) == [[]]
    tokens = encoder.tokens_of(rows)
    names = [receiver.name for receiver in RECEIVERS.values()]
    tokenizers = encoder_tokenizers(config, list(RECEIVERS.values()))
    lengths = MessageLengths(config, names, tokenizers)
    assert lengths.token_ids(texts) == rows
    for counted in (lengths.tokens_of(rows), lengths.tokens_of(_from_arrow(rows))):
        assert torch.equal(counted.length_B, tokens.length_B)
        assert lengths.slots(counted, "llama") == encoder.slots(tokens, "llama")
    assert tokens.length_B[-1] == len(llama) and tokens.parts == (2, 1, 1)
    ends = [encoder.states.sentence_ends(line) for row in rows for line in row]
    assert [len(end) for end in ends] == tokens.length_B.tolist()


def _from_arrow(rows: list[list[list[int]]]) -> list[list[list[int]]]:
    """Return rows as shards keep them."""
    return pa.array(rows, pa.list_(pa.list_(pa.int32()))).to_pylist()


def test_without_names_all_receivers_send_in_their_own_type() -> None:
    half = {
        name: receiver.model_copy(update={"dtype": "bfloat16"})
        for name, receiver in RECEIVERS.items()
    }
    states = SenderStates(EncoderConfig(kind="senders"), half, load_weights=True)
    assert [type(sender.backbone).__name__ for sender in states.senders] == [
        "LlamaModel",
        "Qwen2Model",
    ]
    assert {p.dtype for p in states.parameters()} == {torch.bfloat16}
    x_BSM = read(states, TEXTS[:1])
    assert x_BSM.dtype == torch.float32
    named = states_of({"kind": "senders"}, senders=("toy-llama", "toy-qwen"))
    torch.testing.assert_close(x_BSM, read(named, TEXTS[:1]), atol=0.1, rtol=0.1)
    assert F.cosine_similarity(x_BSM, read(named, TEXTS[:1]), dim=-1).min() > 0.999


def test_senders_keep_their_type_where_trained_parts_are_autocast() -> None:
    states = states_of(TWO)
    with torch.autocast("cpu", torch.bfloat16):
        x_BSM = read(states, TEXTS)
    assert x_BSM.dtype == torch.float32 and torch.equal(x_BSM, read(states, TEXTS))


def test_nothing_of_the_senders_is_trained_or_saved() -> None:
    values: dict[str, Any] = {"pooling": "spans", "tokens_per_latent": 2, "d_z": 8}
    encoder = InterlinguaEncoder(EncoderConfig(**TWO | values), RECEIVERS).train()
    assert not any(module.training for module in encoder.states.senders.modules())
    frozen = encoder.frozen_parameters()
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert frozen == {f"states.{name}" for name, _ in encoder.states.named_parameters()}
    assert trained == {"norm.weight", "norm.bias", "project.weight", "project.bias"}
    encoder(encoder.tokenize(TEXTS)).z_BLZ.square().sum().backward()
    assert {n for n, p in encoder.named_parameters() if p.grad is not None} == trained
    saved = set(encoder.state_dict()) - frozen
    assert saved == trained
    fingerprint = encoder.backbone_fingerprint()
    again = InterlinguaEncoder(EncoderConfig(**TWO | values), RECEIVERS)
    assert fingerprint == again.backbone_fingerprint()
    with torch.no_grad():
        again.states.senders[1].backbone.embed_tokens.weight[0, 0] += 1
    assert fingerprint != again.backbone_fingerprint()


SENDING: dict[str, Any] = HEADS | {"encoder.lead": "Text: "}


def own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every sender load its own weights."""
    monkeypatch.setattr("latentwire.models.senders.lender_of", lambda *_: None)


def test_a_sender_reads_with_the_weights_of_a_receiver_that_are_there(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States, hashes, files and what is loaded of them are as with weights of its own, bit for bit."""
    run = with_values(run, SENDING)
    lent = choose_some_heads(LatentWire(run))
    encoder: Any = lent.interlingua.encoder
    for sender, lm in zip(encoder.states.senders, lent.local_receivers(), strict=True):
        weights = dict(lm.lm.base_model.named_parameters())
        for name, weight in sender.backbone.named_parameters():
            assert weight is weights[name]
        assert len(sender.backbone.layers) < len(lm.lm.base_model.layers)
        assert not {*sender.backbone.modules()} & {*lm.lm.modules()}
    with monkeypatch.context() as patched:
        own_weights(patched)
        own = choose_some_heads(LatentWire(run))
    ids = [{id(p) for p in wire.interlingua.parameters()} for wire in (own, lent)]
    theirs = [{id(p) for lm in w.local_receivers() for p in lm.parameters()} for w in (own, lent)]
    assert not ids[0] & theirs[0] and ids[1] & theirs[1]
    texts = [text for text in (*TEXTS, ACCENTS) if text]
    for one, other in zip(
        lent.interlingua.state_dict().items(), own.interlingua.state_dict().items(), strict=True
    ):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    assert torch.equal(lent.encode(texts).z_BLZ, own.encode(texts).z_BLZ)
    assert lent.encoder_id == own.encoder_id and lent.fingerprints() == own.fingerprints()
    asked = ["Where?"] * len(texts)
    for name in lent.receivers:
        answers = [wire.answer(wire.encode(texts), asked, name) for wire in (lent, own)]
        assert answers[0] == answers[1]
    before = lent.fingerprints()
    lent.save_pretrained(tmp_path / "lent")
    own.save_pretrained(tmp_path / "own")
    for file in sorted((tmp_path / "own").rglob("*.safetensors")):
        there = tmp_path / "lent" / file.relative_to(tmp_path / "own")
        assert there.read_bytes() == file.read_bytes()
    loaded = LatentWire.from_pretrained(tmp_path / "own")
    states: Any = loaded.interlingua.encoder.states  # type: ignore[union-attr]
    first = next(states.senders[0].backbone.parameters())
    assert any(first is p for p in loaded.local_receiver("llama").parameters())
    assert torch.equal(loaded.encode(texts).z_BLZ, own.encode(texts).z_BLZ)
    assert loaded.encoder_id == own.encoder_id and lent.fingerprints() == before


@torch.no_grad()
def test_nothing_that_is_done_to_a_receiver_reaches_its_sender(run: RunConfig) -> None:
    """Not the messages that some of its heads see, nor how its layers are computed in training."""
    wire = choose_some_heads(LatentWire(with_values(run, SENDING)))
    encoder: Any = wire.interlingua.encoder
    expected = read(encoder.states, TEXTS)
    lm = wire.local_receiver("llama")
    count, heads, width = shape_of(lm.lm)
    chosen = tuple((layer, head) for layer in range(count) for head in range(heads))
    shape = (len(TEXTS), len(chosen), 3, width)
    entries = HeadEntries(
        chosen,
        torch.ones(shape),
        torch.ones(shape),
        torch.ones(len(TEXTS), 3, dtype=torch.bool),
        torch.zeros(len(TEXTS), dtype=torch.long),
    )
    kv_NE = torch.ones(3, 2 * width * len(chosen))
    with lm.heads_at_slots(kv_NE, chosen), seen(lm.lm, entries):
        assert torch.equal(read(encoder.states, TEXTS), expected)
    lm.recompute_activations()
    lm.compile_layers("eager")
    for module in lm.lm.modules():
        module.training = True
    with torch.enable_grad():
        assert torch.equal(read(encoder.states, TEXTS), expected)
    for sender in encoder.states.senders:
        layers = [module for layer in sender.backbone.layers for module in layer.modules()]
        assert not any(module.training for module in layers)
    # One that is made of a receiver in training is none the less itself.
    again = LatentWire(with_values(run, SENDING), wire.receivers)
    assert torch.equal(read(again.interlingua.encoder.states, TEXTS), expected)  # type: ignore[union-attr]


def test_a_sender_of_other_weights_than_the_receivers_loads_its_own(run: RunConfig) -> None:
    config, receivers = EncoderConfig(kind="senders"), dict(RECEIVERS)

    def lenders(senders: tuple[str, ...] = (), **changed: Any) -> list[str | None]:
        receivers["qwen"] = RECEIVERS["qwen"].model_copy(update=changed)
        chosen = config.model_copy(update={"senders": senders})
        return [lender_of(source, receivers) for source in sender_sources(chosen, receivers)]

    assert lenders() == ["llama", "qwen"]
    assert lenders(("toy-qwen", "toy-llama", "toy-phi")) == ["qwen", "llama", None]
    assert lenders(("toy-qwen",), dtype="bfloat16") == [None]
    assert lenders(("receiver:qwen",), dtype="bfloat16") == ["qwen"]
    for changed in (
        {"quantization": "int8"},
        {"device_map": "auto"},
        {"attn_implementation": "flash_attention_2"},
        {"device": "cuda:1"},
    ):
        assert lenders(**changed) == ["llama", None]


def test_planners_count_weights_that_a_sender_shares_once(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = SweepConfig(run=with_values(run, HEADS))
    states: Any = LatentWire(space.run).interlingua.encoder.states  # type: ignore[union-attr]
    size = 4 * sum(p.numel() for p in states.parameters())

    def planned(receivers: str) -> Plan:
        tune = space.tune.model_copy(update={"receivers": receivers})
        return plan(space.model_copy(update={"tune": tune}), {"CPU": 4}, 64e9)

    lent, shared = planned("own"), planned("shared")
    own_weights(monkeypatch)
    assert planned("own").bytes_per_worker == lent.bytes_per_worker + size
    # Where the receivers are elsewhere, a trial loads its senders.
    assert planned("shared").worker_bytes == shared.worker_bytes
    trained = 16 * shared.trainable_parameters
    assert shared.worker_bytes > trained + size + WORKER_BASE_BYTES


def test_shards_are_named_by_the_tokenizers_of_all_senders() -> None:
    run = RunConfig()
    lm = with_values(run, {"encoder.kind": "lm", "encoder.model": "toy-llama"})

    def key(*senders: str) -> str:
        chosen = {"encoder.kind": "senders", "encoder.senders": senders}
        return shard_key(with_values(run, chosen), "train")[0]

    assert key("toy-llama") == key("receiver:llama") == shard_key(lm, "train")[0]
    assert key("toy-llama", "toy-qwen") == key() != key("toy-llama")
    assert key("toy-qwen", "toy-llama") != key()


def test_a_text_reader_counts_by_the_senders_of_its_wire() -> None:
    from latentwire.evaluation.conditions import Condition

    senders = {"encoder.kind": "senders", "encoder.senders": ("receiver:qwen", "toy-phi")}
    length = {"encoder.pooling": "spans", "encoder.tokens_per_latent": 2}
    run = with_values(RunConfig(), senders | length)
    lengths = _lengths(run, Condition("truncated"))
    assert lengths.senders == ("toy-qwen", "toy-phi")
    everyone = _lengths(with_values(run, {"encoder.senders": ()}), Condition("truncated"))
    assert everyone.senders == ("toy-llama", "toy-qwen")


def test_a_text_reader_counts_by_a_wire_whose_senders_give_keys_and_values(run: RunConfig) -> None:
    """It reads text: nobody sends it anything, so its configuration asks for no heads."""
    from latentwire.evaluation.conditions import Condition

    heads = {"encoder.sender_heads": True, "closed_form": {}, "evaluation.tuned_text": {"steps": 2}}
    wire = with_values(run, HEADS | heads)
    condition = Condition("truncated", tuned=True)
    reader = reader_run(wire, wire.receivers, condition, TrainingBudget(2, 2), 8, 0.1)
    assert reader.is_reader and not reader.encoder.sender_heads
    assert reader.encoder.tokens_per_latent == 2  # 0.4 of the cache


def test_planners_know_what_senders_take() -> None:
    run = with_values(RunConfig(), {"encoder.kind": "senders", "encoder.tokens_per_latent": 4})
    codes = with_values(run, {"encoder.pooling": "tokens", "adapter.kind": "heads"})
    assert final_slots(codes) > 3 * final_slots(run)
    assert encoder_bytes(codes) > encoder_bytes(run) > 0
    with_heads = with_values(codes, {"encoder.sender_heads": True, "closed_form": {}})
    # Numbers of a position's cache in both toy models: 4 layers × 2 heads × keys and values.
    caches = 2 * 4 * 2 * (32 + 28)
    positions = encoder_bytes(with_heads) - encoder_bytes(codes)
    assert positions % (4 * round(1.75 * caches)) == 0 and positions > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "toy-llama"}, "model and model_layers must be null, got toy-llama and None"),
        ({"model_layers": 2}, "model and model_layers must be null, got None and 2"),
        ({"depths": (0.5, 1.5)}, r"depths must lie in \[0, 1\], got 1.5"),
        ({"depths": ()}, "at least 1 item"),
        ({"kind": "byte", "senders": ("toy-qwen",)}, "senders need kind senders, got byte"),
        ({"attention": "causal"}, "attention causal needs kind lm, got senders"),
        ({"pooling": "memory"}, "pooling memory needs kind lm"),
    ],
)
def test_bad_senders_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EncoderConfig(**{"kind": "senders"} | values)


def test_senders_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="among llama, qwen, got receiver:gpt"):
        with_values(
            RunConfig(), {"encoder.kind": "senders", "encoder.senders": ("receiver:gpt", "toy-phi")}
        )
    with pytest.raises(ReceiverError, match="model must be a Hub id or an existing directory"):
        states_of(ONE, senders=("./nowhere",))
    folder = sentence_encoder(tmp_path / "bert")
    with pytest.raises(ReceiverError, match=r"causal LMs with a list of layers.*BertModel without"):
        states_of(ONE, senders=(folder,))


def test_shapes_alone_need_no_weights() -> None:
    with torch.device("meta"):
        encoder = InterlinguaEncoder(
            EncoderConfig(**TWO, pooling="spans"), RECEIVERS, load_weights=False
        )
    assert encoder.states.width == 5 * (128 + 112)
    assert not any(p.requires_grad for p in encoder.states.parameters())


def test_what_leads_a_text_is_read_and_not_sent() -> None:
    plain, led = states_of(ONE), states_of(ONE, lead="Text: ")
    sender: Any = led.senders[0]
    lead_ids = sender.tokenizer("Text: ", add_special_tokens=False).input_ids
    assert sender.prefix[-len(lead_ids) :] == lead_ids
    text = TEXTS[0]
    found = read(led, [text])
    assert found.shape == read(plain, [text]).shape
    assert not torch.allclose(found, read(plain, [text]), atol=1e-2)
    joined = plain.senders[0]
    own_ids = joined.tokenizer(text, add_special_tokens=False).input_ids
    tensors, _ = plain.collate([[*lead_ids, *own_ids]])
    whole = plain(**tensors, length_B=torch.tensor([len(lead_ids) + len(own_ids)]))
    torch.testing.assert_close(found, whole[:, len(lead_ids) :], atol=1e-5, rtol=1e-5)
