"""Tables from predictions that were written by hand: no wire, no receiver."""

import dataclasses

import numpy as np
import pytest
import torch

from latentwire.evaluation.conditions import Budget, Condition, label
from latentwire.evaluation.diagnostics import _cosine, probe
from latentwire.evaluation.predictions import Prediction
from latentwire.evaluation.summary import (
    against_text,
    baseline_pairs,
    breakdown,
    by_document,
    compare,
    details,
    pairs,
    summarise,
    together,
    wider_by_document,
)
from tests.evaluation.test_statistics import prediction


def answer(
    row: int,
    receiver: str,
    text: str,
    em: float,
    f1: float,
    joint_logp: float | None = None,
    **values: object,
) -> Prediction:
    return prediction(row, em, f1, receiver=receiver, text=text, joint_logp=joint_logp, **values)


def test_receivers_together_are_as_good_as_their_best_and_as_the_likeliest_answer() -> None:
    rows = [
        answer(0, "llama", "red", 1.0, 1.0, -1.0),
        answer(1, "llama", "blue", 0.0, 0.5, -3.0),
        answer(2, "llama", "tin", 0.0, 0.0, -1.0),
        answer(0, "qwen", "a red", 0.0, 0.6, -2.0),
        answer(1, "qwen", "green", 0.0, 0.2, -2.0),
        answer(2, "qwen", "tin", 0.0, 0.0, -1.0),
    ]
    scores = together(rows)
    assert scores["agreement"] == pytest.approx(
        1 / 3
    )  # both are wrong on the second row, and do not say the same
    assert scores["oracle_em"] == pytest.approx(1 / 3) and scores["oracle_f1"] == pytest.approx(
        1.5 / 3
    )
    assert scores["joint_em"] == pytest.approx(1 / 3) and scores["joint_f1"] == pytest.approx(
        1.2 / 3
    )
    unasked = [answer(0, "llama", "red", 1.0, 1.0), answer(0, "qwen", "blue", 0.0, 0.0)]
    assert "joint_em" not in together(unasked) and together(unasked[:1]) == {}
    mean = summarise(rows)["mean"]
    assert (
        mean["em"] == pytest.approx((1 / 3 + 0) / 2) and "em_low" not in mean and mean["rows"] == 3
    )


def test_a_difference_of_the_mean_is_the_mean_over_receivers() -> None:
    one = [
        answer(row, name, "x", em, em)
        for name, em in (("llama", 1.0), ("qwen", 0.0))
        for row in range(6)
    ]
    other = [answer(row, name, "x", 0.0, 0.0) for name in ("llama", "qwen") for row in range(6)]
    differences = compare(one, other)
    assert (differences["llama"]["em"]["difference"], differences["qwen"]["em"]["difference"]) == (
        1.0,
        0.0,
    )
    assert differences["mean"]["em"] == {
        "difference": 0.5,
        "low": 0.5,
        "high": 0.5,
        "p": pytest.approx(2 / 2**6),
    }


TUNED = [(1.0, 1.0), (1.0, 1.0), (0.0, 0.5), (0.0, 0.0)]
"""EM and F1 of tuned full text, a row each: two of four are right."""


def answers(scored: list[tuple[float, float]], receiver: str = "llama") -> list[Prediction]:
    return [answer(row, receiver, "x", em, f1) for row, (em, f1) in enumerate(scored)]


def test_retention_resilience_and_boost_are_shares_of_tuned_full_text() -> None:
    latent = answers([(1.0, 1.0), (0.0, 0.25), (1.0, 1.0), (0.0, 0.0)])
    untuned = answers([(1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)])
    against = against_text({"text": untuned, "text tuned": answers(TUNED), "latent": latent})
    assert against.keys() == {"text", "latent"}
    row = against["latent"]["llama"]
    assert row["retention_em"] == 1.0 and row["retention_f1"] == pytest.approx(2.25 / 2.5)
    assert (row["resilience_tuned_text"], row["boost_tuned_text"]) == (0.5, 0.5)
    assert against["text"]["llama"]["retention_em"] == 0.5
    assert against["text"]["llama"]["boost_tuned_text"] == 0.0
    for field in ("retention_em", "retention_f1", "resilience_tuned_text", "boost_tuned_text"):
        assert row[f"{field}_low"] <= row[field] <= row[f"{field}_high"]
        assert against["latent"]["mean"][field] == row[field]
    assert not [name for name in row if "untuned" in name]
    assert not [name for name in against["latent"]["mean"] if name.endswith("_low")]


def test_untuned_full_text_gives_no_retention() -> None:
    latent = answers([(0.0, 0.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0)])
    row = against_text({"text": answers(TUNED), "latent": latent})["latent"]["llama"]
    assert not [name for name in row if "retention" in name or "_tuned" in name]
    assert (row["resilience_untuned_text"], row["boost_untuned_text"]) == (0.5, 0.5)
    assert against_text({"latent": latent, "truncated tuned": latent}) == {}


def test_a_share_without_a_divisor_is_left_out() -> None:
    wrong = answers([(0.0, 0.5), (0.0, 0.5)])
    row = against_text({"text tuned": wrong, "latent": wrong})["latent"]["llama"]
    assert row["retention_f1"] == 1.0 and row["boost_tuned_text"] == 0.0
    assert not {"retention_em", "retention_match", "resilience_tuned_text"} & row.keys()
    right = answers([(1.0, 1.0), (1.0, 1.0)])
    row = against_text({"text tuned": right, "latent": wrong})["latent"]["llama"]
    assert row["resilience_tuned_text"] == 0.0 and "boost_tuned_text" not in row


def test_shares_resample_the_same_contexts_for_both() -> None:
    """A wire that keeps all that full text gets right has a retention without any spread."""
    right = np.random.default_rng(8).random(40) < 0.5
    both = [
        answer(row, "llama", "x", float(em), float(em), context_id=str(row // 4))
        for row, em in enumerate(right)
    ]
    row = against_text({"text tuned": both, "latent": both})["latent"]["llama"]
    assert (row["retention_em_low"], row["retention_em_high"]) == (1.0, 1.0)


def test_receivers_are_each_set_against_their_own_text() -> None:
    # A reader of text has one receiver: its answers may stand receiver by receiver.
    text = [*answers(TUNED), *answers([(1.0, 1.0)] * 4, "qwen")]
    latent = [p for pair in zip(answers(TUNED), answers(TUNED, "qwen"), strict=True) for p in pair]
    against = against_text({"text tuned": text, "latent": latent})["latent"]
    assert against["llama"]["retention_em"] == 1.0 and against["qwen"]["retention_em"] == 0.5
    assert against["mean"]["retention_em"] == 0.75
    assert compare(latent, text)["qwen"]["em"]["difference"] == -0.5
    with pytest.raises(ValueError, match="must be of the same rows"):
        against_text({"text tuned": text[1:], "latent": latent})


def test_intervals_by_document_are_as_wide_as_theory_says() -> None:
    """All rows of a document are right or wrong together: each counts as one."""
    right = np.random.default_rng(9).random(30) < 0.5
    rows = [
        answer(
            16 * number + part,
            "llama",
            "x",
            float(em),
            float(em),
            document=f"article {number}",
            context_id=f"{number} {part // 4}",  # four contexts of four rows each
        )
        for number, em in enumerate(right)
        for part in range(16)
    ]
    (by,) = by_document({"latent": rows})["latent"].values()
    alone = summarise([dataclasses.replace(p, context_id=p.document) for p in rows])["llama"]
    assert by["documents"] == 30
    assert (by["em_low"], by["em_high"]) == (alone["em_low"], alone["em_high"])
    assert by["em_wider"] == by["match_wider"] == pytest.approx(4**0.5, rel=0.15)
    said = wider_by_document(by_document({"latent": rows, "text": rows}))
    assert said is not None and said.startswith("the rows are of 30 documents; ")
    assert f"{by['em_wider']:.1f} times as wide as over contexts (median; at most" in said


def test_documents_say_nothing_where_there_is_one_or_each_is_a_context() -> None:
    rows = answers(TUNED)
    assert by_document({"latent": rows}) == {}  # every row is of its own context and document
    one = [dataclasses.replace(p, document="article") for p in rows]
    assert by_document({"latent": one}) == {} and wider_by_document({}) is None
    # Where all answers are wrong neither interval has a width.
    wrong = [answer(row, "llama", "x", 0.0, 0.0, document=str(row // 2)) for row in range(4)]
    (by,) = by_document({"latent": wrong})["latent"].values()
    assert (by["em_low"], by["em_high"]) == (0.0, 0.0) and "em_wider" not in by


def test_tuned_rows_say_so() -> None:
    row = Condition("truncated", Budget("tokens_per_latent", 4), tuned=True)
    assert row.key == "truncated at 4 tokens per latent tuned"
    assert label(row.key) == "text cut to as many tokens at 4 tokens per latent, tuned"
    assert label(Condition("text", tuned=True).key) == "full text, tuned"


AT_4, AT_8 = Budget("latent_len", 4), Budget("latent_len", 8)
ROWS = [
    Condition("text"),
    Condition("text", tuned=True),
    *(Condition("latent", budget) for budget in (AT_8, AT_4)),
    *(Condition("truncated", budget) for budget in (AT_8, AT_4)),
    *(Condition("truncated", budget, tuned=True) for budget in (AT_8, AT_4)),
    Condition("closed_book", tuned=True),
]


def test_tuned_cut_text_of_the_same_budget_is_the_first_baseline() -> None:
    compared = baseline_pairs(ROWS)
    assert compared[:2] == [
        ("latent at 8 latents", "truncated at 8 latents tuned"),
        ("latent at 4 latents", "truncated at 4 latents tuned"),
    ]
    assert len(compared) == len(set(compared)) == 2 * 5
    untuned = [row for row in ROWS if not row.tuned]
    assert baseline_pairs(untuned) == [pair for pair in compared if "tuned" not in pair[1]]


def test_a_mode_names_its_untuned_rows() -> None:
    assert pairs(ROWS, "latent", "truncated") == [
        ("latent at 8 latents", "truncated at 8 latents"),
        ("latent at 4 latents", "truncated at 4 latents"),
    ]
    assert pairs(ROWS, "truncated tuned", "truncated") == [
        ("truncated at 8 latents tuned", "truncated at 8 latents"),
        ("truncated at 4 latents tuned", "truncated at 4 latents"),
    ]
    assert pairs(ROWS, "latent", "truncated at 4 latents tuned") == [
        ("latent at 4 latents", "truncated at 4 latents tuned")
    ]
    assert pairs(ROWS, "text", "text tuned") == [("text", "text tuned")]
    assert pairs(ROWS, "latent", "closed_book") == []


def test_parts_by_length_question_and_type_have_their_own_rows() -> None:
    sizes, words = (10, 20, 30, 40, 50, 60), ("Who?", "who is", "Where?", "Where to", "", "Who")
    rows = [
        answer(row, name, f"{row}", float(row < 2), 0.1 * row, context_bytes=size, question=word)
        for name in ("llama", "qwen")
        for row, (size, word) in enumerate(zip(sizes, words, strict=True))
    ]
    groups = breakdown(rows, {"0": "bridge", "5": "bridge"})
    assert [(part["rows"], part["em"], part["f1"]) for part in groups["length"].values()] == [
        (2, 1.0, pytest.approx(0.05)), (2, 0.0, pytest.approx(0.25)), (2, 0.0, pytest.approx(0.45)),
    ]  # fmt: skip
    edge = breakdown(
        [
            answer(row, "llama", "", 0.0, 0.0, context_bytes=size)
            for row, size in enumerate((10, 20, 30, 40))
        ]
    )
    assert [part["rows"] for part in edge["length"].values()] == [
        2,
        1,
        1,
    ]  # 20 is the first third's end
    assert {kind: part["rows"] for kind, part in groups["question"].items()} == {
        "who": 3,
        "where": 2,
        "": 1,
    }
    assert {kind: part["f1"] for kind, part in groups["type"].items()} == {
        "other": pytest.approx(0.25), "bridge": pytest.approx(0.25),
    }  # fmt: skip
    assert {kind: part["rows"] for kind, part in groups["type"].items()} == {
        "other": 4,
        "bridge": 2,
    }
    same = [answer(row, "llama", "x" if row else "y", 0.0, 0.0) for row in range(4)]
    assert details({"latent": same})["distinct"]["latent"] == {"llama": 0.5}


def test_a_probe_is_judged_on_contexts_that_it_has_not_seen() -> None:
    torch.manual_seed(0)
    # Random features, more of them than rows: whatever is fitted is remembered, and tells nothing of other rows.
    label_N = torch.arange(80) % 2
    right, _ = probe(torch.randn(80, 200).double(), label_N, [str(row) for row in range(80)])
    assert right < 0.75
    # The commonest class of what was fitted, whatever the rest has.
    rare_N = (torch.arange(200) % 10 == 0).long()
    _, majority = probe(torch.randn(200, 4).double(), rare_N, [str(row) for row in range(200)])
    assert majority == pytest.approx(0.9, abs=0.06)


def test_cosines_are_of_different_contexts() -> None:
    x_NZ = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    assert _cosine(x_NZ, ["a", "a", "b"]) == 0.0 and _cosine(
        x_NZ, ["a", "b", "c"]
    ) == pytest.approx(1 / 3)
    assert np.isnan(_cosine(x_NZ, ["a", "a", "a"]))
