"""The baselines say what they should on receivers that can read."""

import dataclasses

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.evaluation import evaluator
from latentwire.evaluation.baselines import BUDGET_MODES, MODES, kept_context, self_information
from latentwire.evaluation.conditions import Budget, Condition, conditions, label
from latentwire.evaluation.diagnostics import diagnose, probe
from latentwire.evaluation.evaluator import donors, predict
from latentwire.evaluation.inputs import encode_rows, prompts_of
from latentwire.evaluation.summary import compare, details, summarise
from latentwire.losses.terms import token_ce
from latentwire.model import LatentWire
from latentwire.models.decoded import Decoded
from latentwire.prompts.batch import collate
from latentwire.reports import tables
from tests.conftest import SMALL, shard_table, untimed, wire_of


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
        changed = changed.set_column(
            column, f"{name}_answer_ids", pa.array(longer, pa.list_(pa.int32()))
        )
    assert [p.text for p in predict(wire, rows.slice(0, 8), "latent")] == [
        p.text for p in predict(wire, changed, "latent")
    ]


def test_token_embeddings_through_the_latent_path_say_what_the_text_says(
    wire: LatentWire, rows: pa.Table
) -> None:
    text, embedded = (list(predict(wire, rows, mode)) for mode in ("text", "embeddings"))
    assert [p.text for p in embedded] == [p.text for p in text]
    assert [p.nll for p in embedded] == pytest.approx([p.nll for p in text], abs=1e-4)
    assert [p.positions for p in embedded] == [p.positions for p in text]


@pytest.mark.parametrize("mode", ["truncated", "window", "selected"])
def test_baselines_of_the_same_budget_read_as_many_positions(
    wire: LatentWire, rows: pa.Table, mode: str
) -> None:
    latent = {(p.id, p.receiver): p for p in predict(wire, rows, "latent")}
    for prediction in predict(wire, rows, mode):
        assert prediction.positions == latent[prediction.id, prediction.receiver].positions


def test_baselines_of_messages_that_hold_the_question_read_as_many_positions_too() -> None:
    run = with_values(RunConfig(), SMALL | {"data.send": "prompt", "encoder.latent_len": 20})
    wire, rows = LatentWire(run), shard_table(run, 4)
    latent = [p.positions for p in predict(wire, rows, "latent")]
    for mode in ("truncated", "window", "selected"):
        predictions = list(predict(wire, rows, mode))
        assert [p.positions for p in predictions] == latent
        assert all(
            p.bytes > len(p.question.encode()) for p in predictions
        )  # the question had to be sent too
    with pytest.raises(
        ConfigError, match=r"messages hold the questions \(data\.send prompt\), got none"
    ):
        wire.encode(rows["context"].to_pylist())


def test_baselines_keep_what_they_say(wire: LatentWire, rows: pa.Table) -> None:
    columns = rows.slice(0, 4).to_pydict()
    for row in range(4):
        context, question = columns["llama_context_ids"][row], columns["llama_question_ids"][row]

        def shown(
            mode: str, budget: int = 5, context=context, question=question, row=row
        ) -> list[int]:
            return kept_context(wire, "llama", mode, columns["id"][row], context, question, budget)

        assert shown("truncated") == context[:5]
        assert shown("closed_book") == [] and shown("text") == context
        window = shown("window")
        assert window == shown("window") and any(
            context[i : i + 5] == window for i in range(len(context))
        )
        surprise_T = self_information(wire, "llama", context, question)
        assert shown("selected") == [
            context[i]
            for i in range(len(context))
            if surprise_T[i] >= surprise_T.topk(5).values[-1]
        ]
        assert shown("selected", budget=99) == context


def test_a_window_lies_anywhere_in_the_text(wire: LatentWire) -> None:
    """Every place is as likely as another: a window that began at the start would be the cut text once more."""
    context = list(range(20))
    starts = [
        kept_context(wire, "llama", "window", f"row {n}", context, [1], 5)[0] for n in range(1_600)
    ]
    assert set(starts) == set(range(16))
    counts = [starts.count(start) for start in range(16)]
    assert (
        min(counts) > 100 - 5 * 97**0.5 and max(counts) < 100 + 5 * 97**0.5
    )  # of a binomial, five standard deviations


def test_a_plain_answer_is_its_first_line(
    wire: LatentWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base model goes on with a question of its own; what it says after its answer must not count as a part of it."""
    lm, builder = wire.receivers["llama"], wire.builders["llama"]
    outputs = [" red house\nWhere is Ben?", "\n red house \n\nred house", "red house", ""]
    rows = [lm.tokenizer(text, add_special_tokens=False).input_ids for text in outputs]
    monkeypatch.setattr(lm, "generate", lambda *_: Decoded(rows, 0.0, 0.0), raising=False)
    texts, _ = wire.decode("llama", [builder.text([1, 2], [3])] * len(outputs))
    assert texts == ["red house", "red house", "red house", ""]


def test_scores_come_with_their_intervals(wire: LatentWire, rows: pa.Table) -> None:
    row = summarise(list(predict(wire, rows, "truncated")))["llama"]
    assert row["em_low"] < row["em"] < row["em_high"]
    assert row["em_high"] - row["em_low"] == pytest.approx(
        2 * 1.96 * (row["em"] * (1 - row["em"]) / 64) ** 0.5, rel=0.25
    )


def test_every_budget_has_its_messages_and_baselines_as_short(rows: pa.Table) -> None:
    run = with_values(
        RunConfig(), SMALL | {"encoder.latent_len": 16, "encoder.tokens_per_latent": 4}
    )
    wire = LatentWire(run)
    modes = [mode for mode in MODES if mode != "own_heads"]  # of other wires
    chosen = conditions(run, modes, [4, 8])
    assert [s.key for s in chosen] == [
        "text", *(f"{mode} at {n} tokens per latent" for n in (4, 8) for mode in BUDGET_MODES), "embeddings", "closed_book",
    ]  # fmt: skip
    positions = {s.key: [p.positions for p in predict(wire, rows.slice(0, 8), s)] for s in chosen}
    for n in (4, 8):
        latent = positions[f"latent at {n} tokens per latent"]
        assert all(
            positions[f"{mode} at {n} tokens per latent"] == latent
            for mode in ("truncated", "window", "selected")
        )
    assert positions["latent at 4 tokens per latent"] == [
        p.positions for p in predict(wire, rows.slice(0, 8), "latent")
    ]
    assert sum(positions["latent at 8 tokens per latent"]) < sum(
        positions["latent at 4 tokens per latent"]
    )
    assert label("latent at 4 tokens per latent") == "latents at 4 tokens per latent"


def test_messages_of_a_fixed_length_have_other_fixed_lengths(
    wire: LatentWire, rows: pa.Table
) -> None:
    by_key = {}
    for condition in conditions(wire.run, ["latent", "truncated"], latent_len=[6, 3]):
        by_key[condition.key] = list(predict(wire, rows.slice(0, 4), condition))
    full, shorter = by_key["latent at 6 latents"], by_key["latent at 3 latents"]
    assert [p.text for p in full] == [p.text for p in predict(wire, rows.slice(0, 4), "latent")]
    assert [p.positions for p in shorter] == [p.positions - 3 for p in full]
    assert [p.bytes for p in shorter] == [p.bytes // 2 for p in full]
    assert [p.positions for p in shorter] == [p.positions for p in by_key["truncated at 3 latents"]]


@pytest.mark.parametrize(
    ("values", "budgets", "message"),
    [
        (
            {},
            {"tokens_per_latent": [4]},
            "--tokens_per_latent needs an encoder whose message grows with the text",
        ),
        (
            {"encoder.tokens_per_latent": 4},
            {"latent_len": [8]},
            "--latent_len needs an encoder whose messages have a",
        ),
        (
            {"adapter.slot_positions": True},
            {"latent_len": [8]},
            "--latent_len needs adapter.slot_positions false",
        ),
        ({}, {"latent_len": [0]}, "budgets must be ≥ 1, got 0"),
    ],
)
def test_budgets_that_a_wire_does_not_have_are_refused(
    values: dict, budgets: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        conditions(with_values(RunConfig(), values), MODES, **budgets)


def test_parts_of_a_table_give_what_the_whole_gives(wire: LatentWire, rows: pa.Table) -> None:
    for mode in ("latent", "shuffled", "window"):
        whole = [untimed(vars(p)) for p in predict(wire, rows, mode, joint=True)]
        parts = [untimed(vars(p)) for start in (0, 24) for p in
                 predict(wire, rows, mode, range(start, min(start + 24, 48)), joint=True)]  # fmt: skip
        assert parts == whole[: len(parts)]


def test_shuffled_messages_are_of_another_context(wire: LatentWire, rows: pa.Table) -> None:
    assert donors(["a", "a", "b", "b", "a"]) == [3, 3, 1, 1, 3]
    assert donors(["a", "a"]) in ([0, 1], [1, 0])
    swapped = rows.slice(0, 16)
    others = donors(swapped["context"].to_pylist())
    shuffled = list(predict(wire, swapped, "shuffled"))
    moved = swapped.set_column(
        swapped.column_names.index("context"), "context", swapped["context"].take(others)
    )
    assert [p.text for p in shuffled] == [p.text for p in predict(wire, moved, "latent")]


def test_a_width_costs_what_its_packet_has(wire: LatentWire, rows: pa.Table) -> None:
    few, texts = rows.slice(0, 4), rows.slice(0, 4)["context"].to_pylist()
    by_key = {
        s.key: list(predict(wire, few, s))
        for s in conditions(wire.run, ["latent"], bits=[16, 8, 4])
    }
    for bits, key in ((16, "latent as fp16"), (8, "latent as int8"), (4, "latent as int4")):
        packets = [wire.encode([text]).to_bytes(bits=bits) for text in texts]
        assert [p.bytes for p in by_key[key]] == [len(packet) for packet in packets] * 2
    assert [p.nll for p in by_key["latent as fp16"]] == pytest.approx(
        [p.nll for p in by_key["latent"]], rel=1e-2
    )
    assert [p.nll for p in by_key["latent as int4"]] != [p.nll for p in by_key["latent as int8"]]
    assert label("latent as int4") == "latents as int4"


def test_the_pair_chooses_the_answer_that_both_find_likeliest(
    wire: LatentWire, rows: pa.Table
) -> None:
    predictions = list(predict(wire, rows.slice(0, 16), "truncated", joint=True))
    by_row = {p.id: [q for q in predictions if q.id == p.id] for p in predictions}
    disagreeing = [answers for answers in by_row.values() if answers[0].text != answers[1].text]
    assert disagreeing and all(
        p.joint_logp is not None and p.joint_logp < 0 for answers in disagreeing for p in answers
    )
    row = summarise(predictions)["mean"]
    assert (
        row["oracle_em"] >= max(row["joint_em"], row["em"])
        and row["joint_em_low"] <= row["joint_em"]
    )
    assert row["agreement"] == pytest.approx(1 - len(disagreeing) / len(by_row))
    one = disagreeing[0][0]
    ids = next(row for row in rows.to_pylist() if row["id"] == one.id)
    total = 0.0
    for name, lm in wire.receivers.items():
        builder = wire.builders[name]
        cut = ids[f"{name}_context_ids"][:6]
        answer = builder.tokenize([], [], [one.text])["answer_ids"][0]
        batch = collate([builder.text(cut, ids[f"{name}_question_ids"], answer)])
        total -= float(token_ce(lm.supervised_logits(batch), batch.target_N).sum())
    assert one.joint_logp == pytest.approx(total, rel=1e-4)


def test_who_answered_nothing_said_the_end_at_once(wire: LatentWire, rows: pa.Table) -> None:
    """And not the space that leads an answer."""
    one = rows.slice(0, 1)
    columns = one.to_pydict()
    inputs = encode_rows(wire, columns, columns, Condition("truncated"))
    prediction = next(iter(predict(wire, one, "truncated")))
    (scored,) = evaluator._score_answers(wire, inputs, [dataclasses.replace(prediction, text="")])
    total = 0.0
    for name, lm in wire.receivers.items():
        builder = wire.builders[name]
        batch = collate(prompts_of(wire, name, inputs, [[]]))
        assert batch.target_N.tolist()[0] in builder.stop_ids
        total -= float(token_ce(lm.supervised_logits(batch), batch.target_N).sum())
    assert scored.joint_logp == pytest.approx(total, rel=1e-4)


def test_logits_that_are_no_numbers_find_nothing_likely(run: RunConfig, rows: pa.Table) -> None:
    wire = LatentWire(run)
    for adapter in wire.interlingua.adapters.values():
        for parameter in adapter.parameters():
            parameter.data.fill_(float("nan"))
    for prediction in predict(wire, rows.slice(0, 4), "latent"):
        assert (prediction.first_1, prediction.first_5) == (0.0, 0.0)


def test_dropout_is_off_whatever_state_training_left(run: RunConfig, rows: pa.Table) -> None:
    wire = wire_of(with_values(run, {"encoder.latent_dropout": 0.5}))
    few = rows.slice(0, 4)
    texts = few["context"].to_pylist()
    calm = [untimed(vars(p)) for p in predict(wire, few, "latent")]
    z_BLZ = wire.encode(texts).z_BLZ
    wire.interlingua.train()
    assert [untimed(vars(p)) for p in predict(wire, few, "latent")] == calm
    wire.interlingua.train()
    assert torch.equal(wire.encode(texts).z_BLZ, z_BLZ)
    wire.interlingua.train()
    assert not torch.equal(wire.interlingua.encode(texts).z_BLZ, z_BLZ)  # training has it


def test_a_chats_answer_is_its_whole_turn_and_a_plain_ones_its_line(
    wire: LatentWire, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wire.builders["qwen"].chat and not wire.builders["llama"].chat
    for lm in wire.local_receivers():
        ids = lm.tokenizer(" It is\nOslo.\n", add_special_tokens=False).input_ids
        answer = Decoded([ids, ids], 1.0, 1.0)
        monkeypatch.setattr(lm, "generate", lambda *_, answer=answer, **__: answer)
    answers = {p.receiver: p.text for p in predict(wire, rows.slice(0, 2), "latent")}
    assert answers == {"qwen": "It is\nOslo.", "llama": "It is"}


def test_first_tokens_and_times_are_counted(wire: LatentWire, rows: pa.Table) -> None:
    text = summarise(list(predict(wire, rows, "text")))["qwen"]
    closed = summarise(list(predict(wire, rows, "closed_book")))["qwen"]
    assert (
        0.95 <= text["em"] <= text["first_1"] <= text["first_5"] <= 1
        and closed["first_1"] < text["first_1"]
    )
    assert (
        text["compression_bytes"] == pytest.approx(1, abs=0.01) and text["compression_tokens"] == 1
    )
    assert "compression_bytes" not in closed
    assert text["prefill_ms"] > 0 and text["decode_ms"] > 0 and text["encode_ms"] == 0
    assert text["examples_per_s"] == pytest.approx(1000 / (text["prefill_ms"] + text["decode_ms"]))


def test_one_receiver_is_together_with_nobody(wire: LatentWire, rows: pa.Table) -> None:
    both = [list(predict(wire, rows.slice(start, 2), "closed_book")) for start in (0, 2)]
    alone = [[p for p in predictions if p.receiver == "qwen"] for predictions in both]
    assert (
        "agreement" in summarise(both[0])["mean"] and "agreement" not in summarise(alone[0])["mean"]
    )
    with pytest.raises(ValueError, match="of the same rows in the same order"):
        compare(*alone)


def test_details_compare_and_part(wire: LatentWire, rows: pa.Table) -> None:
    chosen = conditions(wire.run, ["text", "truncated", "closed_book"])
    by_key = {s.key: list(predict(wire, rows, s)) for s in chosen}
    (pair,) = details(by_key, [("text", "closed_book")])["comparisons"]
    gap = pair["receivers"]["qwen"]["em"]
    assert gap["low"] > 0.8 and gap["p"] < 0.01 and gap["difference"] == pytest.approx(
        summarise(by_key["text"])["qwen"]["em"] - summarise(by_key["closed_book"])["qwen"]["em"]
    )  # fmt: skip
    assert (
        pair["receivers"]["qwen"]["nll"]["high"] < 0
    )  # the gold answers are likelier from the text
    shown = tables.comparisons_table([pair])[2][1]
    assert (
        shown[2] == "qwen"
        and shown[3]
        == f"{100 * gap['difference']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
    )
    assert shown[7].startswith(f"{pair['receivers']['qwen']['nll']['difference']:+.2f} [-")
    same = compare(by_key["text"], by_key["text"])["mean"]["f1"]
    assert (same["difference"], same["p"]) == (0.0, 1.0)
    first = rows["id"][0].as_py()
    parts = details(by_key, types={first: "bridge"})["breakdown"]["text"]
    assert {kind: group["rows"] for kind, group in parts["type"].items()} == {
        "other": 63,
        "bridge": 1,
    }
    for groups in parts.values():
        assert sum(group["rows"] for group in groups.values()) == rows.num_rows


def test_a_probe_reads_what_is_there_and_nothing_else(wire: LatentWire, rows: pa.Table) -> None:
    torch.manual_seed(0)
    label_N = torch.arange(200) % 4
    alone = [str(row) for row in range(200)]
    seen, _ = probe(
        torch.nn.functional.one_hot(label_N).double() + 0.1 * torch.randn(200, 4), label_N, alone
    )
    blind, majority = probe(torch.randn(200, 4).double(), label_N, alone)
    assert seen == 1.0 and blind < 0.5 and majority < 0.5
    # Rows of one context are the same message: what one of them tells says nothing of another context.
    twins, _ = probe(torch.randn(100, 50).double().repeat(2, 1), label_N, 2 * alone[:100])
    assert twins < 0.5
    measures = diagnose(wire, rows)
    assert (
        -1 <= measures["cosine_centred"] <= measures["cosine"] <= 1
        and 0 <= measures["probe_word"] <= 1
    )


def test_a_prediction_says_what_it_was_read_from(wire: LatentWire, rows: pa.Table) -> None:
    """Its mode is a column of what is saved, by which a report picks texts and messages."""
    for condition in (Condition("text"), Condition("latent", Budget("latent_len", 3), bits=8)):
        said = {
            (p.receiver, p.condition, p.mode) for p in predict(wire, rows.slice(0, 2), condition)
        }
        assert said == {(name, condition.key, condition.mode) for name in wire.receivers}
