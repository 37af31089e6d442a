"""The row of the table in which a receiver has read the text itself and keeps a part of its cache."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import GPT2Config

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.readers import TrainingBudget
from latentwire.evaluation.baselines import DEFAULT_MODES, MODES
from latentwire.evaluation.conditions import Budget, Condition, label, with_tuned
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.predictions import Prediction
from latentwire.evaluation.scoring import check_receivers
from latentwire.evaluation.summary import baseline_pairs, summarise
from latentwire.model import LatentWire
from latentwire.models import own_cache
from latentwire.pretrained.weights import ReceiverError, load_tokenizer
from latentwire.prompts.batch import Batch
from latentwire.training.text_readers import reader_run
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
    closed = summarise(predicted(wire, rows, Condition("closed_book")))["mean"]["nll"]
    assert (
        nlls[0] < 0.1 and nlls[1] < 0.5 * closed
    )  # a fifth of the entries is enough for much of it
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
    assert set(MODES) - set(DEFAULT_MODES) == {"own_cache", "own_heads"}
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
    GPT2Config(vocab_size=704, n_embd=16, n_layer=1, n_head=2, eos_token_id=2).save_pretrained(
        tmp_path
    )
    load_tokenizer(run.receivers[0]).save_pretrained(tmp_path)
    llama, qwen = run.receivers
    odd = llama.model_copy(update={"model": str(tmp_path)})
    other = run.model_copy(update={"receivers": (odd, qwen)})
    check_receivers(other, [Condition("text")])
    with pytest.raises(ReceiverError, match=r"receiver llama \(GPT2LMHeadModel\) has no self_attn"):
        check_receivers(other, [Condition("text"), Condition("own_cache")])


@pytest.fixture(params=[False, True], ids=["soft", "in every layer"])
def reader(request: pytest.FixtureRequest, run: RunConfig) -> LatentWire:
    """A reader of own caches, as an evaluation makes one, whose prefix is not yet trained."""
    tuned = {"evaluation.tuned_text.tokens": 5, "evaluation.tuned_text.layers": request.param}
    asked = with_values(run, tuned)
    condition = Condition("own_cache", EVERYTHING, tuned=True)
    made = reader_run(asked, asked.receivers, condition, TrainingBudget(1, 1), 1, 1.0)
    wire = LatentWire(made, wire_of(run).receivers)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in wire.interlingua.prefixes.parameters():
            weight.add_(torch.randn_like(weight))
    return wire


def test_behind_a_trained_prefix_too_the_whole_cache_says_what_the_text_says(
    reader: LatentWire, rows: pa.Table
) -> None:
    text = predicted(reader, rows, Condition("text", tuned=True))
    whole = predicted(reader, rows, Condition("own_cache", EVERYTHING, tuned=True))
    bare = predicted(reader, rows, Condition("text"))
    assert [p.text for p in whole] == [p.text for p in text]
    assert [p.nll for p in whole] == pytest.approx([p.nll for p in text], rel=1e-4)
    assert [p.positions for p in whole] == [p.positions for p in text]
    assert [p.nll for p in bare] != pytest.approx([p.nll for p in text], rel=0.1)
    assert [p.positions + 5 for p in bare] == [p.positions for p in text]
    cut = predicted(reader, rows, Condition("own_cache", Budget("latent_len", 2), tuned=True))
    assert {p.message_positions for p in cut} == {2}  # the prefix is kept, and no part of them
    assert [p.condition for p in cut] == ["own_cache at 2 latents tuned"] * len(cut)


def test_the_prefix_decides_what_a_recital_attends_to(reader: LatentWire, rows: pa.Table) -> None:
    lm, builder = reader.local_receiver("llama"), reader.builders["llama"]
    texts = rows["llama_context_ids"].to_pylist()[:2]

    def reading(batch: Batch) -> Any:
        return reader.reading("llama", batch, None)

    bare = own_cache.scores(lm, builder, texts, reading)
    behind = own_cache.scores(lm, builder, texts, reading, prefix=5)
    for bare_LHT, behind_LHT in zip(bare, behind, strict=True):
        assert bare_LHT.shape == behind_LHT.shape
        assert not torch.allclose(bare_LHT, behind_LHT, atol=0.05)
    with torch.no_grad():  # as many positions, of which something else is read
        for weight in reader.interlingua.prefixes.parameters():
            weight.neg_()
    other = own_cache.scores(lm, builder, texts, reading, prefix=5)
    for behind_LHT, other_LHT in zip(behind, other, strict=True):
        assert not torch.allclose(behind_LHT, other_LHT, atol=0.05)


def test_its_tuned_twin_is_read_by_the_reader_of_the_whole_text(run: RunConfig) -> None:
    asked = with_values(run, {"evaluation.tuned_text.tokens": 5})
    budget = Budget("latent_len", 3)
    twins = with_tuned([Condition("own_cache", budget), Condition("truncated", budget)])
    assert [row.key for row in twins] == [
        "own_cache at 3 latents", "own_cache at 3 latents tuned",
        "truncated at 3 latents", "truncated at 3 latents tuned",
    ]  # fmt: skip
    assert twins[1].trained_for == Condition("text", tuned=True)
    assert twins[3].trained_for == twins[3]
    own = reader_run(asked, asked.receivers, twins[1], TrainingBudget(1, 1), 1, 1.0)
    assert own.prompt.reads == "text" and own.encoder.latent_len == 3


def test_questions_to_one_text_each_have_their_own_cut_cache(run: RunConfig) -> None:
    """Together they say what each says in a batch of its own: nothing that is cut is read once for both."""
    table = shard_table(run, 8, questions=2)
    alone = wire_of(with_values(run, {"evaluation.batch_size": 1}))
    condition = Condition("own_cache", Budget("latent_len", 4))
    together = predicted(wire_of(run), table, condition)
    one_by_one = {(p.receiver, p.id): p for p in predicted(alone, table, condition)}
    assert len(together) == len(one_by_one) == 16
    for prediction in together:
        expected = one_by_one[prediction.receiver, prediction.id]
        assert prediction.text == expected.text
        assert prediction.nll == pytest.approx(expected.nll, abs=1e-4)
