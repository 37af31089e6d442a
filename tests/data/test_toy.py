"""The synthetic task: told by its seed, answerable from the context alone."""

from latentwire.data.toy import toy_rows


def test_the_seed_decides() -> None:
    assert list(toy_rows(20, seed=3)) == list(toy_rows(20, seed=3))
    assert {row["context"] for row in toy_rows(50, seed=1)}.isdisjoint(row["context"] for row in toy_rows(50, seed=2))


def test_the_context_answers_exactly_one_way() -> None:
    for row in toy_rows(200, seed=4, people=4, kinds=3):
        (answer,) = row["answers"]
        name = row["question"].rstrip("?").split()[-1]
        facts = row["context"].split(". ")
        assert len(facts) == 12
        assert sum(fact.startswith(f"{name} ") and fact.rstrip(".").endswith(f" {answer}") for fact in facts) == 1
