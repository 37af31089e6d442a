"""Intervals are as wide as theory says, differences are paired, and rows of one context count once."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import t

from latentwire.evaluation import statistics
from latentwire.evaluation.predictions import Prediction
from latentwire.evaluation.statistics import difference, interval, ratio
from latentwire.evaluation.summary import compare, summarise


def names(count: int, rows: int = 1) -> list[str]:
    """So many contexts, each of so many rows."""
    return [f"context {number}" for number in range(count) for _ in range(rows)]


def prediction(row: int, em: float, f1: float = 0.0, **values: object) -> Prediction:
    """One answer to one row, of its own context unless ``values`` names another."""
    known = Prediction(
        id=str(row), receiver="llama", condition="latent", mode="latent", text="red", golds=["red"], context="a",
        context_id=str(row), document=str(row), question="Why?", em=em, f1=f1, match=em, nll=1.0, first_1=1.0, first_5=1.0,
        positions=9, message_positions=4, bytes=64, context_bytes=50, context_tokens=12, forward_ms=1.0, encode_ms=1.0,
        prefill_ms=1.0, decode_ms=1.0,
    )  # fmt: skip
    return dataclasses.replace(known, **values)  # type: ignore[arg-type]


def test_an_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = interval(values.tolist(), names(400))
    half = 1.96 * values.std() / 400**0.5  # of 90 % it would be 1.645, of 99 % 2.576
    assert high - low == pytest.approx(2 * half, rel=0.06)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * half)
    assert interval(values.tolist(), names(400)) == (
        low,
        high,
    )  # the same scores have the same interval


def test_rows_that_share_a_context_count_as_one() -> None:
    of_context = np.random.default_rng(2).normal(0.0, 1.0, 60)
    values = np.repeat(of_context, 9).tolist()
    low, high = interval(values, names(60, rows=9))
    assert high - low == pytest.approx(2 * 1.96 * of_context.std() / 60**0.5, rel=0.06)
    as_rows = interval(values, names(540))
    assert high - low == pytest.approx(3 * (as_rows[1] - as_rows[0]), rel=0.1)


def test_a_resample_is_the_mean_of_its_rows() -> None:
    # Of two contexts with 9 rows and 1, both twice or each once: 1, 0 or 9 of 10 rows are right.
    low, high = interval([1.0] * 9 + [0.0], ["long"] * 9 + ["short"])
    assert (low, high) == (0.0, 1.0)
    assert interval([1.0, 0.0], ["one", "one"]) == (0.5, 0.5) and interval(
        [1.0, 1.0], names(2)
    ) == (1.0, 1.0)
    # The order of rows does not matter, nor whether those of a context stand together.
    apart = interval([1.0, 0.0, 0.0, 1.0], ["a", "b", "a", "b"])
    assert apart == interval([1.0, 0.0, 0.0, 1.0], ["a", "b", "a", "b"]) == (0.5, 0.5)
    with pytest.raises(
        ValueError, match="each value needs its context, got 2 values and 1 contexts"
    ):
        interval([1.0, 0.0], ["a"])


def test_a_ratio_is_paired_and_as_wide_as_theory_says() -> None:
    draw = np.random.default_rng(5)
    whole = draw.uniform(0.5, 1.5, 500)
    part = 0.4 * whole + draw.uniform(0.0, 0.1, 500)  # what is hard for one is hard for the other
    share, low, high = ratio(part.tolist(), whole.tolist(), names(500)) or (0.0, 0.0, 0.0)
    assert share == pytest.approx(part.sum() / whole.sum())
    half = 1.96 * (part - share * whole).std() / whole.mean() / 500**0.5  # by the delta method
    assert high - low == pytest.approx(2 * half, rel=0.06)
    apart = ratio(draw.permutation(part).tolist(), whole.tolist(), names(500)) or (0.0, 0.0, 0.0)
    assert apart[0] == pytest.approx(share) and apart[2] - apart[1] > 4 * half


def test_a_ratio_to_the_number_of_rows_is_their_mean() -> None:
    values = np.random.default_rng(7).random(90).tolist()
    contexts = names(30, rows=3)
    expected = (pytest.approx(np.mean(values)), *interval(values, contexts))
    assert ratio(values, [1.0] * 90, contexts) == expected


def test_a_ratio_to_nothing_is_none() -> None:
    assert ratio([1.0, 0.0], [0.0, 0.0], names(2)) is None
    # A quarter of the resamples hold the second context alone, where there is nothing to divide by.
    assert ratio([1.0, 1.0], [1.0, 0.0], names(2)) == (2.0, 1.0, 2.0)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    draw, held, held_by_rows = np.random.default_rng(3), 0, 0
    for _ in range(60):
        values = (np.repeat(draw.normal(0.0, 1.0, 40), 6) + draw.normal(0.0, 0.3, 240)).tolist()
        low, high = interval(values, names(40, rows=6))
        held += low <= 0 <= high
        low, high = interval(values, names(240))
        held_by_rows += low <= 0 <= high
    assert held / 60 >= 0.85 and held_by_rows / 60 < 0.75


def test_a_difference_is_paired() -> None:
    draw = np.random.default_rng(4)
    first = draw.normal(0.0, 1.0, 100)
    second = first - 0.1 + draw.normal(0.0, 0.05, 100)  # nearly the same rows are hard for both
    found = difference(first.tolist(), second.tolist(), names(100))
    gap = first - second
    half = t.ppf(0.975, 99) * gap.std(ddof=1) / 10
    assert found["difference"] == pytest.approx(gap.mean()) and found["p"] < 0.01
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)
    apart = difference(first.tolist(), draw.permutation(second).tolist(), names(100))
    assert (
        apart["difference"] == pytest.approx(gap.mean())
        and apart["high"] - apart["low"] > 10 * half
    )
    assert apart["p"] > 0.2


def test_compare_pairs_rows_and_gives_first_minus_second() -> None:
    draw = np.random.default_rng(5)
    em = (draw.random(80) < 0.5).astype(float)
    better = np.where(draw.random(80) < 0.1, 1.0, em)
    one = [prediction(row, float(value), float(value)) for row, value in enumerate(better)]
    other = [prediction(row, float(value), float(value)) for row, value in enumerate(em)]
    found = compare(one, other)["llama"]["em"]
    assert found["difference"] == pytest.approx((better - em).mean()) and found["difference"] > 0
    assert found["low"] >= 0 and found["high"] - found["low"] < 0.16  # apart it would be about 0.3
    assert compare(other, one)["llama"]["f1"]["difference"] == pytest.approx(-found["difference"])
    shifted = [dataclasses.replace(p, id=str((int(p.id) + 1) % 80)) for p in other]
    with pytest.raises(ValueError, match="of the same rows in the same order"):
        compare(one, shifted)


def test_a_context_swaps_all_of_its_rows_together() -> None:
    # Seven contexts of ten are better by 1 in all rows: by signs of contexts p is 2 · P(7 or more of 10), by rows next to 0.
    gaps = np.repeat([1.0] * 7 + [-1.0] * 3, 20)
    found = difference(gaps.tolist(), [0.0] * 200, names(10, rows=20))
    assert found["p"] == pytest.approx(0.34375) and found["difference"] == pytest.approx(0.4)
    assert found["low"] < 0 < found["high"]
    same = difference([1.0, 2.0], [1.0, 2.0], names(2))
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_scores_resample_contexts_and_count_them() -> None:
    right = np.random.default_rng(6).random(30) < 0.5
    shared = [
        prediction(4 * number + part, float(value), float(value), context_id=str(number))
        for number, value in enumerate(right)
        for part in range(4)
    ]
    alone = [dataclasses.replace(p, context_id=p.id) for p in shared]
    by_context, by_row = summarise(shared)["llama"], summarise(alone)["llama"]
    assert (by_context["rows"], by_context["contexts"], by_row["contexts"]) == (120, 30, 120)
    for field in ("em", "f1", "match"):
        assert by_context[field] == by_row[field] == pytest.approx(right.mean())
        width, narrow = (row[f"{field}_high"] - row[f"{field}_low"] for row in (by_context, by_row))
        assert width == pytest.approx(2 * narrow, rel=0.15)
    pair = [
        dataclasses.replace(p, receiver="qwen", text="blue", em=1 - p.em, joint_logp=-2.0)
        for p in shared
    ]
    first = [dataclasses.replace(p, joint_logp=-1.0) for p in shared]
    joint = summarise([*first, *pair])["mean"]
    assert joint["joint_em"] == by_context["em"] and joint["joint_em_low"] == by_context["em_low"]
    assert (
        compare(shared, pair[:0] + [dataclasses.replace(p, em=0.0) for p in shared])["llama"]["em"][
            "low"
        ]
        == by_context["em_low"]
    )


def test_an_interval_is_of_as_many_resamples_as_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """In portions, of which the last may be smaller; each resample has as many groups as the data."""
    drawn: list[tuple[int, int]] = []

    class Drawing:
        def integers(self, groups: int, size: tuple[int, int]) -> np.ndarray:
            drawn.append(size)
            return np.zeros(size, np.int64)

    monkeypatch.setattr(statistics, "RESAMPLES", 7)
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", 3)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Drawing())
    assert interval([1.0, 0.0, 0.0], names(3)) == (1.0, 1.0)  # always the first
    assert drawn == [(3, 3), (3, 3), (1, 3)]


def test_a_difference_of_what_is_no_number_has_no_p_value() -> None:
    found = difference([float("nan"), 1.0], [0.0, 1.0], ["a", "b"])
    assert math.isnan(found["difference"]) and math.isnan(found["p"])
