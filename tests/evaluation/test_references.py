"""What a table says, computed another way: by hand, from the receiver's own logits."""

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from latentwire import exports, messaging
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.evaluation import evaluator, inputs
from latentwire.evaluation.baselines import kept_context, self_information
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.diagnostics import diagnose
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.metrics import em_f1
from latentwire.evaluation.predictions import context_id
from latentwire.evaluation.summary import summarise
from latentwire.model import LatentWire
from latentwire.models import decoding
from latentwire.reports.tables import scores_table, together_table, weights_table
from tests.conftest import SMALL, shard_table, wire_of


@pytest.fixture(scope="module")
def rows(run: RunConfig) -> pa.Table:
    return shard_table(run, 12, seed=23)


def log_p(wire: LatentWire, name: str, ids: list[int]) -> torch.Tensor:
    """log p of each token of a row but the first, given those before it, ``[S − 1]``; one forward of the bare model."""
    lm = wire.local_receiver(name).lm
    logits_SV = lm(input_ids=torch.tensor([ids])).logits[0].float()
    return logits_SV.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
def test_nll_is_that_of_the_first_answer_and_its_stop_token_per_token(
    wire: LatentWire, rows: pa.Table
) -> None:
    predictions = {(p.id, p.receiver): p for p in predict(wire, rows, "text")}
    for row in rows.to_pylist():
        for name, builder in wire.builders.items():
            answer = [*row[f"{name}_answer_ids"], builder.stop_id]
            prompt = builder.text(row[f"{name}_context_ids"], row[f"{name}_question_ids"]).ids
            by_hand = -log_p(wire, name, [*prompt, *answer])[-len(answer) :].sum() / len(answer)
            prediction = predictions[row["id"], name]
            assert prediction.nll == pytest.approx(float(by_hand), rel=1e-4)
            logits_V = wire.local_receiver(name).lm(input_ids=torch.tensor([prompt])).logits[0, -1]
            likelier = int((logits_V > logits_V[answer[0]]).sum())
            assert (prediction.first_1, prediction.first_5) == (
                float(likelier < 1),
                float(likelier < 5),
            )
            assert prediction.positions == len(prompt) and prediction.message_positions == len(
                row[f"{name}_context_ids"]
            )


def test_each_row_is_scored_by_its_own_answers(wire: LatentWire, rows: pa.Table) -> None:
    for p, row in zip(
        predict(wire, rows.slice(0, 8), "text"), rows.slice(0, 8).to_pylist() * 2, strict=True
    ):
        assert (p.id, p.golds, p.context, p.question) == (
            row["id"],
            row["answers"],
            row["context"],
            row["question"],
        )
        assert (p.em, p.f1) == em_f1(p.text, row["answers"], wire.run.data.dataset)
        assert p.context_id == context_id(row["context"]) and p.context_bytes == len(
            row["context"].encode()
        )
        assert p.bytes == p.context_bytes and p.context_tokens == len(
            row[f"{p.receiver}_context_ids"]
        )
    assert context_id("a") != context_id("b") and len(context_id("a")) == 16


@torch.no_grad()
def test_self_information_is_of_each_token_given_those_before_it(
    wire: LatentWire, rows: pa.Table
) -> None:
    for name, builder in wire.builders.items():
        row = rows.to_pylist()[3]
        context, question = row[f"{name}_context_ids"], row[f"{name}_question_ids"]
        prompt = builder.text(context, question)
        by_hand = -log_p(wire, name, prompt.ids)[prompt.message.start - 1 :][: len(context)]
        found_T = self_information(wire, name, context, question)
        assert torch.allclose(found_T, by_hand, atol=1e-4)
        budget = len(context) // 2
        shown = kept_context(wire, name, "selected", row["id"], context, question, budget)
        chosen = sorted(range(len(context)), key=lambda position: -float(by_hand[position]))[
            :budget
        ]
        assert shown == [context[position] for position in sorted(chosen)]


def test_a_closed_book_sees_nothing_of_the_context(wire: LatentWire, rows: pa.Table) -> None:
    others = rows.set_column(
        rows.column_names.index("context"), "context", rows["context"].take([*range(1, 12), 0])
    )
    for name in wire.receivers:
        column = f"{name}_context_ids"
        turned = others[column].take([*range(1, 12), 0])
        others = others.set_column(others.column_names.index(column), column, turned)
    closed, elsewhere = (list(predict(wire, table, "closed_book")) for table in (rows, others))
    assert [(p.text, p.nll, p.positions) for p in closed] == [
        (p.text, p.nll, p.positions) for p in elsewhere
    ]
    assert all(p.message_positions == 0 and p.bytes == 0 for p in closed)
    whole = {(p.id, p.receiver): p for p in predict(wire, rows, "text")}
    for p in closed:
        assert (
            p.positions
            == whole[p.id, p.receiver].positions - whole[p.id, p.receiver].message_positions
        )


@pytest.mark.parametrize("mode", ["truncated", "window", "selected"])
def test_baselines_read_as_many_tokens_as_the_message_has_positions(
    wire: LatentWire, rows: pa.Table, mode: str
) -> None:
    for name in wire.receivers:
        for row in rows.slice(0, 4).to_pylist():
            context, question = row[f"{name}_context_ids"], row[f"{name}_question_ids"]
            for budget in (1, 6, len(context)):
                shown = kept_context(wire, name, mode, row["id"], context, question, budget)
                assert len(shown) == budget
            left = iter(context)
            assert all(
                token in left
                for token in kept_context(wire, name, mode, row["id"], context, question, 6)
            )


def test_windows_begin_anywhere(wire: LatentWire, rows: pa.Table) -> None:
    context = list(range(100, 130))
    starts = {
        kept_context(wire, "llama", "window", f"row {row}", context, [], 5)[0] for row in range(300)
    }
    assert starts == set(range(100, 126))  # the last window ends with the text


def test_latents_cost_two_bytes_an_entry_and_a_packet_its_own(
    wire: LatentWire, rows: pa.Table
) -> None:
    encoder = wire.run.encoder
    bare = list(predict(wire, rows.slice(0, 2), "latent"))
    assert [p.bytes for p in bare] == [2 * encoder.d_z * encoder.latent_len] * 4
    assert all(p.message_positions == encoder.latent_len for p in bare)
    row = summarise(bare)["llama"]
    sizes = [len(context.encode()) for context in rows.slice(0, 2)["context"].to_pylist()]
    assert row["compression_bytes"] == pytest.approx(
        sum(sizes) / (2 * 2 * encoder.d_z * encoder.latent_len)
    )
    tokens = [len(ids) for ids in rows.slice(0, 2)["llama_context_ids"].to_pylist()]
    assert row["compression_tokens"] == pytest.approx(sum(tokens) / (2 * encoder.latent_len))


def test_times_are_of_the_whole_way_to_the_first_token(
    wire: LatentWire, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower(function: object, seconds: float) -> object:
        def waiting(*arguments: object, **named: object) -> object:
            time.sleep(seconds)
            return function(*arguments, **named)  # type: ignore[operator]

        return waiting

    monkeypatch.setattr(wire.interlingua, "encode", slower(wire.interlingua.encode, 0.8))
    monkeypatch.setattr(
        wire.interlingua, "soft_rows", slower(wire.interlingua.soft_rows, 0.4)
    )  # the adapter's part
    latent, text = (
        next(iter(predict(wire, rows.slice(0, 2), mode))) for mode in ("latent", "text")
    )
    assert (
        400 <= latent.encode_ms < 800
        and 200 <= latent.prefill_ms < 400
        and latent.forward_ms >= 200
    )
    assert latent.first_token_ms == latent.encode_ms + latent.prefill_ms >= 600
    assert (
        text.encode_ms == 0
        and 0 < text.first_token_ms == text.prefill_ms < 200
        and text.forward_ms < 200
    )
    assert latent.decode_ms < 200 and text.decode_ms < 200
    scores = {
        mode: summarise(list(predict(wire, rows.slice(0, 2), mode))) for mode in ("latent", "text")
    }
    for row in (scores["latent"]["llama"], scores["text"]["llama"]):
        assert row["first_token_ms"] == pytest.approx(row["encode_ms"] + row["prefill_ms"])
        assert row["examples_per_s"] == pytest.approx(
            1000 / (row["first_token_ms"] + row["decode_ms"])
        )
    _, header, body = together_table(scores)
    assert float(body[0][header.index("first token ms")]) == pytest.approx(
        scores["latent"]["mean"]["first_token_ms"], rel=0.02
    )


def test_batches_of_any_size_and_order_give_a_row_the_same_scores(
    wire: LatentWire, rows: pa.Table
) -> None:
    backwards = rows.take(list(range(rows.num_rows))[::-1])
    for mode in ("text", "latent", "truncated", "selected"):
        one, other = (
            {(p.id, p.receiver): p for p in predict(wire, table, mode)}
            for table in (rows, backwards)
        )
        assert one.keys() == other.keys()
        for key, p in one.items():
            assert (p.text, p.golds, p.em, p.f1, p.bytes) == (
                other[key].text, other[key].golds, other[key].em, other[key].f1, other[key].bytes,
            )  # fmt: skip
            assert p.nll == pytest.approx(other[key].nll, rel=1e-3)


@torch.no_grad()
def test_cosines_are_of_each_rows_own_latents(rows: pa.Table) -> None:
    wire = wire_of(
        with_values(RunConfig(), SMALL | {"encoder.latent_len": 16, "encoder.tokens_per_latent": 1})
    )
    texts = rows["context"].to_pylist()
    lengths = {wire.encode([text]).z_BLZ.shape[1] for text in texts}
    assert len(lengths) > 1 and len(set(texts)) == len(
        texts
    )  # so that a batch has padding, which is no latent
    mean_NZ = torch.stack([wire.encode([text]).z_BLZ[0].double().mean(0) for text in texts])
    measures = diagnose(wire, rows)
    for name, x_NZ in (("cosine", mean_NZ), ("cosine_centred", mean_NZ - mean_NZ.mean(0))):
        pairs = [
            torch.cosine_similarity(x_NZ[i], x_NZ[j], dim=0)
            for i in range(12)
            for j in range(12)
            if i != j
        ]
        assert measures[name] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-4)


def test_scoring_switches_dropout_off(rows: pa.Table) -> None:
    wire = wire_of(
        with_values(RunConfig(), SMALL | {"encoder.latent_dropout": 0.5, "encoder.latent_len": 16})
    )
    wire.interlingua.train()
    first = [p.nll for p in predict(wire, rows.slice(0, 4), "latent")]
    wire.interlingua.train()
    assert [p.nll for p in predict(wire, rows.slice(0, 4), Condition("latent"))] == first


def test_a_table_says_what_was_trained_and_what_intervals_resample(
    run: RunConfig, rows: pa.Table, tmp_path: Path
) -> None:
    wire = LatentWire(with_values(run, {"features.deep_prefix": {}}))
    sizes = exports.sizes(exports.save(tmp_path / "wire", wire, {}, {}))
    parts = wire.interlingua
    for name in wire.receivers:
        modules = [p for key, p in parts.features.named_parameters() if name in key.split(".")]
        counted = sum(p.numel() for p in (*parts.adapters[name].parameters(), *modules))
        assert sizes[name] == {"parameters": counted, "bytes": 4 * counted} and modules
    assert sizes["encoder"]["parameters"] == sum(p.numel() for p in parts.encoder.parameters())
    _, header, body = weights_table(sizes)
    total = sum(p.numel() for p in parts.parameters())
    assert header == ["part", "parameters", "MB"] and body[-1][:2] == [
        "all of the wire",
        f"{total:,}",
    ]
    assert [row[0] for row in body] == ["encoder", "llama", "qwen", "all of the wire"]
    title, header, body = scores_table(
        {"text": summarise(list(predict(wire, rows, "text")))}, "toy", run
    )
    assert title == "toy; 95 % intervals by resampling 12 contexts" and header[-2:] == [
        "rows",
        "contexts",
    ]
    assert body[0][-2:] == ["12", "12"]


@pytest.mark.parametrize(
    ("mode", "encode_ticks", "prefill_ticks", "forward_ticks"),
    [("latent", 1, 1, 2), ("text", 0, 1, 2), ("embeddings", 0, 0, 1), ("own_cache", 1, 0, 1)],
)
def test_each_stretch_of_time_is_counted_once_and_shared_out_over_its_batch(
    run: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    encode_ticks: int,
    prefill_ticks: int,
    forward_ticks: int,
) -> None:
    """On a clock that goes on by a second whenever it is read; decoding has its own, which stands still here."""
    wire, seconds = wire_of(run), itertools.count()
    ticking = SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    for module in (evaluator, inputs):
        monkeypatch.setattr(module, "time", ticking)
    for module in (messaging, decoding):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    for prediction in predict(wire, shard_table(run, 4, questions=2), mode):
        assert prediction.encode_ms == 1000 * encode_ticks / 4
        assert prediction.prefill_ms == 1000 * prefill_ticks / 4
        assert prediction.forward_ms == 1000 * forward_ticks / 4
        assert prediction.decode_ms == 0
