"""How tokens may be drawn."""

import pytest

from latentwire.errors import UserError
from latentwire.models.decoded import Sampling


def test_the_bounds_of_what_can_be_drawn() -> None:
    """A temperature above 0, a probability in (0, 1] and at least one token."""
    for drawn in (
        Sampling(),
        Sampling(temperature=1e-3),
        Sampling(temperature=5.0, top_p=0.01),
        Sampling(top_p=1.0, top_k=1),
        Sampling(seed=0),
    ):
        assert drawn.seed == 0
    assert (Sampling().temperature, Sampling().top_p, Sampling().top_k) == (1.0, 1.0, None)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"temperature": 0.0}, r"temperature > 0 .* got 0\.0 and 1\.0"),
        ({"temperature": -1.0}, r"temperature > 0 .* got -1\.0 and 1\.0"),
        ({"temperature": float("nan")}, "temperature > 0 .* got nan"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\], got 1\.0 and 0\.0"),
        ({"top_p": 1.01}, r"top_p in \(0, 1\], got 1\.0 and 1\.01"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"seed": 2**64}, "seed must be a whole number .* got 18446744073709551616; choose"),
        ({"seed": 0.5}, r"seed must be a whole number .* got 0\.5; choose"),
    ],
)
def test_what_draws_nothing_is_refused(wrong: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as caught:
        Sampling(**wrong)
    assert isinstance(caught.value, UserError)
