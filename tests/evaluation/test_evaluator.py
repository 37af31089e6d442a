"""The baselines say what they should on receivers that can read."""

import pyarrow as pa
import pytest

from latentwire.assembly import LatentWire
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.evaluation.baselines import BUDGET_MODES, MODES, kept_context, self_information
from latentwire.evaluation.evaluator import predict, summarise
from latentwire.evaluation.settings import label, settings
from latentwire.evaluation.statistics import interval
from tests.conftest import SMALL, shard_table


@pytest.fixture(scope="module")
def rows(run: RunConfig) -> pa.Table:
    return shard_table(run, 64, seed=11)


def test_the_pair_reads_text_and_knows_nothing_without(wire: LatentWire, rows: pa.Table) -> None:
    text = summarise(list(predict(wire, rows, "text")))
    closed = summarise(list(predict(wire, rows, "closed_book")))
    for name in wire.receivers:
        assert text[name]["em"] >= 0.9
        assert closed[name]["em"] <= 0.2
        assert text[name]["nll"] < closed[name]["nll"]
        assert text[name]["positions"] > closed[name]["positions"]


def test_a_prediction_hangs_on_its_own_row_only(wire: LatentWire, rows: pa.Table) -> None:
    together = {(p.id, p.receiver): p for p in predict(wire, rows.slice(0, 8), "latent")}
    for index in (0, 5):
        for alone in predict(wire, rows.slice(index, 1), "latent"):
            joined = together[alone.id, alone.receiver]
            assert joined.text == alone.text
            assert joined.nll == pytest.approx(alone.nll, rel=1e-3)


def test_the_gold_answer_does_not_reach_the_decoder(wire: LatentWire, rows: pa.Table) -> None:
    changed = rows.slice(0, 8)
    for name in wire.receivers:
        column = changed.column_names.index(f"{name}_answer_ids")
        longer = [ids * 5 for ids in changed.column(column).to_pylist()]
        changed = changed.set_column(column, f"{name}_answer_ids", pa.array(longer, pa.list_(pa.int32())))
    assert [p.text for p in predict(wire, rows.slice(0, 8), "latent")] == [
        p.text for p in predict(wire, changed, "latent")
    ]


def test_token_embeddings_through_the_latent_path_say_what_the_text_says(wire: LatentWire, rows: pa.Table) -> None:
    text, own = (list(predict(wire, rows, mode)) for mode in ("text", "embeddings"))
    assert [p.text for p in own] == [p.text for p in text]
    assert [p.nll for p in own] == pytest.approx([p.nll for p in text], abs=1e-4)
    assert [p.positions for p in own] == [p.positions for p in text]


@pytest.mark.parametrize("mode", ["truncated", "window", "selected"])
def test_baselines_of_the_same_budget_read_as_many_positions(wire: LatentWire, rows: pa.Table, mode: str) -> None:
    latent = {(p.id, p.receiver): p for p in predict(wire, rows, "latent")}
    for prediction in predict(wire, rows, mode):
        assert prediction.positions == latent[prediction.id, prediction.receiver].positions


def test_baselines_keep_what_they_say(wire: LatentWire, rows: pa.Table) -> None:
    columns = rows.slice(0, 4).to_pydict()
    for row in range(4):
        context, question = columns["llama_context_ids"][row], columns["llama_question_ids"][row]

        def kept(mode: str, budget: int = 5, context=context, question=question, row=row) -> list[int]:
            return kept_context(wire, "llama", mode, columns["id"][row], context, question, budget)

        assert kept("truncated") == context[:5]
        assert kept("closed_book") == [] and kept("text") == context
        window = kept("window")
        assert window == kept("window") and any(context[i : i + 5] == window for i in range(len(context)))
        surprise_T = self_information(wire, "llama", context, question)
        assert kept("selected") == [
            context[i] for i in range(len(context)) if surprise_T[i] >= surprise_T.topk(5).values[-1]
        ]
        assert kept("selected", budget=99) == context


def test_scores_come_with_their_intervals(wire: LatentWire, rows: pa.Table) -> None:
    row = summarise(list(predict(wire, rows, "truncated")))["llama"]
    assert row["em_low"] < row["em"] < row["em_high"]
    assert row["em_high"] - row["em_low"] == pytest.approx(
        2 * 1.96 * (row["em"] * (1 - row["em"]) / 64) ** 0.5, rel=0.25
    )
    assert interval([1.0, 1.0]) == (1.0, 1.0) and interval([0.0, 1.0, 1.0]) == interval([0.0, 1.0, 1.0])


def test_every_budget_has_its_messages_and_baselines_as_short(rows: pa.Table) -> None:
    run = with_values(RunConfig(), SMALL | {"encoder.latent_len": 16, "encoder.tokens_per_latent": 4})
    wire = LatentWire(run)
    chosen = settings(run, MODES, [4, 8])
    assert [s.key for s in chosen] == [
        "text", *(f"{mode} at {n} tokens per latent" for n in (4, 8) for mode in BUDGET_MODES), "embeddings", "closed_book",
    ]  # fmt: skip
    positions = {s.key: [p.positions for p in predict(wire, rows.slice(0, 8), s)] for s in chosen}
    for n in (4, 8):
        own = positions[f"latent at {n} tokens per latent"]
        assert all(positions[f"{mode} at {n} tokens per latent"] == own for mode in ("truncated", "window", "selected"))
        assert sum(positions[f"shuffled at {n} tokens per latent"]) == sum(own)  # another row's, as long as that is
    assert positions["latent at 4 tokens per latent"] == [
        p.positions for p in predict(wire, rows.slice(0, 8), "latent")
    ]
    assert sum(positions["latent at 8 tokens per latent"]) < sum(positions["latent at 4 tokens per latent"])
    assert label("latent at 4 tokens per latent") == "latents at 4 tokens per latent"


def test_messages_of_a_fixed_length_have_other_fixed_lengths(wire: LatentWire, rows: pa.Table) -> None:
    found = {}
    for setting in settings(wire.run, ["latent", "truncated"], latent_len=[6, 3]):
        found[setting.key] = list(predict(wire, rows.slice(0, 4), setting))
    own, shorter = found["latent at 6 latents"], found["latent at 3 latents"]
    assert [p.text for p in own] == [p.text for p in predict(wire, rows.slice(0, 4), "latent")]
    assert [p.positions for p in shorter] == [p.positions - 3 for p in own]
    assert [p.bytes for p in shorter] == [p.bytes // 2 for p in own]
    assert [p.positions for p in shorter] == [p.positions for p in found["truncated at 3 latents"]]


@pytest.mark.parametrize(
    ("values", "budgets", "message"),
    [
        ({}, {"tokens_per_latent": [4]}, "--tokens_per_latent needs an encoder whose message grows with the text"),
        ({"encoder.tokens_per_latent": 4}, {"latent_len": [8]}, "--latent_len needs an encoder whose messages have a"),
        (
            {"adapter.slot_positions": True},
            {"latent_len": [8]},
            "--latent_len needs adapters without a vector per slot",
        ),
        ({}, {"latent_len": [0]}, "budgets must be ≥ 1, got 0"),
    ],
)
def test_budgets_that_a_wire_does_not_have_are_refused(values: dict, budgets: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(with_values(RunConfig(), values), MODES, **budgets)
