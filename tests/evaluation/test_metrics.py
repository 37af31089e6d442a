"""EM and F1 by the official rules."""

import pytest

from latentwire.evaluation.metrics import em_f1


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("The Red House.", ["red house"], (1.0, 1.0)),
        ("red", ["red house"], (0.0, pytest.approx(2 / 3))),
        ("blue", ["red house", "Blue!"], (1.0, 1.0)),
        ("", ["red"], (0.0, 0.0)),
        ("a b c", ["b c d"], (0.0, pytest.approx(0.8))),  # the article goes: b c against b c d
    ],
)
def test_squad_rules(prediction: str, golds: list[str], expected: tuple[float, float]) -> None:
    assert em_f1(prediction, golds) == expected


def test_hotpotqa_gives_no_credit_for_half_a_yes() -> None:
    assert em_f1("yes it is", ["yes"], "squad")[1] > 0
    assert em_f1("yes it is", ["yes"], "hotpotqa") == (0.0, 0.0)
    assert em_f1("Yes.", ["yes"], "hotpotqa") == (1.0, 1.0)
    assert em_f1("no", ["no smoking"], "hotpotqa") == (0.0, 0.0)
    assert em_f1("red", ["red house"], "hotpotqa")[1] == pytest.approx(2 / 3)
