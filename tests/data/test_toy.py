"""The synthetic task: told by its seed, answerable from the context alone."""

import itertools

from latentwire.dataset.toy import toy_rows


def test_the_seed_decides() -> None:
    assert list(toy_rows(20, seed=3)) == list(toy_rows(20, seed=3))
    assert {row["context"] for row in toy_rows(50, seed=1)}.isdisjoint(
        row["context"] for row in toy_rows(50, seed=2)
    )


def test_a_context_is_asked_about_different_facts() -> None:
    rows = list(toy_rows(20, seed=3, questions=6))
    assert len({row["id"] for row in rows}) == 20
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["document"])]
    assert [len(group) for group in groups] == [6, 6, 6, 2]
    for group in groups:
        assert len({row["context"] for row in group}) == 1
        assert len({row["question"] for row in group}) == len(group)


def test_the_context_answers_exactly_one_way() -> None:
    for row in toy_rows(200, seed=4, people=4, kinds=3):
        (answer,) = row["answers"]
        name = row["question"].rstrip("?").split()[-1]
        facts = row["context"].split(". ")
        assert len(facts) == 12
        assert (
            sum(
                fact.startswith(f"{name} ") and fact.rstrip(".").endswith(f" {answer}")
                for fact in facts
            )
            == 1
        )
