"""The row of the table in which a receiver has read the text itself and keeps a part of its cache."""

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from transformers import GPT2Config

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.evaluation.baselines import DEFAULT_MODES, MODES
from latentwire.evaluation.conditions import Budget, Condition, label
from latentwire.evaluation.evaluator import Prediction, predict
from latentwire.evaluation.scoring import check_receivers
from latentwire.evaluation.summary import baseline_pairs, summarise
from latentwire.model import LatentWire
from latentwire.models.weights import ReceiverError, load_tokenizer
from tests.conftest import shard_table, untimed, wire_of

EVERYTHING = Budget("latent_len", 500)


@pytest.fixture(scope="module")
def rows(run: RunConfig) -> pa.Table:
    return shard_table(run, 16, seed=31)


def predicted(
    wire: LatentWire, rows: pa.Table, condition: Condition, **options
) -> list[Prediction]:
    return list(predict(wire, rows, condition, **options))


def test_with_room_for_all_of_it_the_cache_says_what_the_text_says(
    wire: LatentWire, rows: pa.Table
) -> None:
    text = predicted(wire, rows, Condition("text"), joint=True)
    whole = predicted(wire, rows, Condition("own_cache", EVERYTHING), joint=True)
    for a, b in zip(text, whole, strict=True):
        assert (a.id, a.receiver, a.text, a.em, a.first_5) == (
            b.id, b.receiver, b.text, b.em, b.first_5,
        )  # fmt: skip
        assert b.nll == pytest.approx(a.nll, abs=1e-5)
        assert (a.positions, a.message_positions) == (b.positions, b.message_positions)
        assert b.joint_logp == (None if a.joint_logp is None else pytest.approx(a.joint_logp, 1e-4))
        assert a.encode_ms == 0.0 < b.encode_ms


def test_less_of_the_cache_says_less(wire: LatentWire, rows: pa.Table) -> None:
    nlls = []
    for length in (500, 6, 1):
        condition = Condition("own_cache", Budget("latent_len", length))
        nlls.append(summarise(predicted(wire, rows, condition))["mean"]["nll"])
    print(nlls)
    closed = summarise(predicted(wire, rows, Condition("closed_book")))["mean"]["nll"]
    assert nlls[0] < 0.1 and nlls[1] < 0.5 * closed  # a fifth of the entries is enough for much of it
    assert nlls[2] > nlls[1] + 0.3


def test_rows_are_read_together_as_each_alone(wire: LatentWire, rows: pa.Table) -> None:
    condition = Condition("own_cache", Budget("latent_len", 10))
    together = {(p.id, p.receiver): p for p in predicted(wire, rows, condition)}
    for index in (0, 5, 9):
        for alone in predicted(wire, rows.slice(index, 1), condition):
            joined = together[alone.id, alone.receiver]
            assert (joined.text, joined.bytes) == (alone.text, alone.bytes)
            assert joined.nll == pytest.approx(alone.nll, rel=1e-4)


def test_it_counts_as_many_positions_as_the_message_and_far_more_bytes(
    wire: LatentWire, rows: pa.Table
) -> None:
    own = predicted(wire, rows, Condition("own_cache"))
    cut = predicted(wire, rows, Condition("truncated"))
    assert [(p.positions, p.message_positions) for p in own] == [
        (p.positions, p.message_positions) for p in cut
    ]
    for p in own:  # keys and values of 4 layers and 2 heads in 2 bytes each, for each position
        width = wire.local_receiver(p.receiver).lm.base_model.layers[0].self_attn.head_dim
        assert p.bytes == wire.run.encoder.latent_len * 4 * 2 * 2 * width * 2
    table = summarise(own)
    assert table["llama"]["bytes"] == 6 * 16 * 32 * 2


def test_it_counts_the_question_where_the_message_holds_it(run: RunConfig) -> None:
    asked = with_values(run, {"data.send": "prompt", "encoder.latent_len": 12})
    wire, table = wire_of(asked), shard_table(asked, 4, seed=5)
    text = predicted(wire, table, Condition("text"))
    whole = predicted(wire, table, Condition("own_cache", EVERYTHING))
    assert [p.text for p in text] == [p.text for p in whole]
    assert [p.nll for p in whole] == pytest.approx([p.nll for p in text], abs=1e-5)
    assert {p.message_positions for p in predicted(wire, table, Condition("own_cache"))} == {12}


def test_it_leaves_nothing_behind(wire: LatentWire, rows: pa.Table) -> None:
    few = rows.slice(0, 4)
    before = [untimed(vars(p)) for p in predicted(wire, few, Condition("text"))]
    predicted(wire, few, Condition("own_cache"))
    with pytest.raises(RuntimeError, match="of the test"):
        for _ in predict(wire, few, Condition("own_cache"), on_rows=_fail):
            pass
    assert [untimed(vars(p)) for p in predicted(wire, few, Condition("text"))] == before


def _fail(_: int) -> None:
    raise RuntimeError("of the test")


def test_it_is_asked_for_by_name_and_stands_with_what_is_as_short() -> None:
    assert set(MODES) - set(DEFAULT_MODES) == {"own_cache"}
    condition = Condition("own_cache", Budget("tokens_per_latent", 4))
    assert condition.key == "own_cache at 4 tokens per latent"
    assert label(condition.key) == (
        "own cache, cut to as much (it has read the text) at 4 tokens per latent"
    )
    latents = Condition("latent", condition.budget)
    assert baseline_pairs([latents, condition]) == [(latents.key, condition.key)]


def test_a_receiver_whose_weights_are_shared_is_refused(wire: LatentWire, rows: pa.Table) -> None:
    wire.receivers = {**wire.receivers, "qwen": SimpleNamespace(name="qwen")}
    with pytest.raises(ReceiverError, match="needs the weights of receiver qwen in this process"):
        predicted(wire, rows, Condition("own_cache"))


def test_a_receiver_that_cannot_is_refused_before_anything_is_scored(
    tmp_path: Path, run: RunConfig
) -> None:
    GPT2Config(vocab_size=704, n_embd=16, n_layer=1, n_head=2, eos_token_id=2).save_pretrained(tmp_path)
    load_tokenizer(run.receivers[0]).save_pretrained(tmp_path)
    llama, qwen = run.receivers
    odd = llama.model_copy(update={"model": str(tmp_path)})
    other = run.model_copy(update={"receivers": (odd, qwen)})
    check_receivers(other, [Condition("text")])
    with pytest.raises(ReceiverError, match=r"receiver llama \(GPT2LMHeadModel\) has no self_attn"):
        check_receivers(other, [Condition("text"), Condition("own_cache")])
