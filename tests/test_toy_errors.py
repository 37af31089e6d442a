"""The toy's mistakes are told by where the asked fact stands and by what shares its latent."""

from typing import Any

import pytest

from experiments.toy_errors import place_of, said_instead, sharing

CONTEXT = "Ada lives in Oslo. Ben lives in Rome. Ada works as baker. Cleo lives in Lima. Cleo works as pilot. Ben works as nurse."


def asked_for(gold: str, text: str = "Oslo") -> dict[str, Any]:
    return {"context": CONTEXT, "golds": [gold], "text": text}


@pytest.mark.parametrize(
    ("gold", "latents", "mate"),
    [
        ("Rome", 4, "another person's fact of that kind"),
        ("baker", 4, "nothing"),
        ("pilot", 4, "the same person's other fact"),
        ("nurse", 3, "another person's fact of that kind"),
        ("baker", 3, "another person's fact of another kind"),
        ("Oslo", 6, "nothing"),
    ],
)
def test_what_shares_a_latent(gold: str, latents: int, mate: str) -> None:
    assert sharing(asked_for(gold), latents) == mate


def test_places_and_wrong_answers() -> None:
    assert [place_of(asked_for(gold)) for gold in ("Oslo", "Rome", "nurse")] == [1, 2, 6]
    assert said_instead(asked_for("Rome")) == "another person's value of that kind"
    assert said_instead(asked_for("Rome", "Paris")) == "a value of that kind that nobody has"
    assert said_instead(asked_for("Rome", "baker")) == "a value of another kind"
