"""``experiments/closed_form_width.py``: more numbers a token leave less of the answers' loss."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from latentwire.closed_form.regression import solve
from latentwire.config.resolve import ConfigError
from tests.closed_form.test_begin import begin_ranked, gathered, rows_of
from tests.conftest import flags_of

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "closed_form_width.py"))


def test_a_line_for_each_width_and_receiver(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = SCRIPT["main"].__globals__
    solutions: dict[int, Any] = {}
    wires: list[Any] = []

    class Noted(names["LatentWire"]):  # type: ignore[misc]
        """A wire that the test looks at afterwards."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            wires.append(self)

    def codes_of(run: Any) -> int:
        return run.encoder.d_z // run.encoder.tokens_per_latent

    def begun(wire: Any, _: object) -> None:
        begin_ranked(wire)
        count = codes_of(wire.run)
        solutions[count] = solve(gathered(wire, 192, 48), count)
        names["begin"].fill(wire, solutions[count])

    monkeypatch.setitem(names, "LatentWire", Noted)
    monkeypatch.setitem(names, "local_shards", lambda run: {"dev": run, "train": None})
    # A wire tokenises rows as its shards would hold them.
    monkeypatch.setattr(names["shards"], "read_table", lambda run: rows_of(Noted(run), 16, seed=5))
    monkeypatch.setattr(names["begin"], "begin", begun)
    monkeypatch.setattr(names["begin"], "solved", lambda run, _: solutions[codes_of(run)])
    SCRIPT["main"](codes=[4, 48])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == ["4", "4", "48", "48"]
    for name in wires[0].receivers:
        few, many = (float(nll) for _, receiver, nll, _ in cells if receiver == name)
        assert many < few - 0.1


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--config", "toy"], "must have a closed form"),
        (["--set", "training.init_from=runs/x/best"], "fresh wire here, got training.init_from"),
        (["--set", "tune.trials=3"], "searches nothing, got --set tune.trials"),
    ],
)
def test_what_it_has_no_use_for_is_refused_before_anything_is_made(
    given: list[str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCRIPT["main"].__globals__, "local_shards", lambda _: pytest.fail("made"))
    flags, _ = flags_of(*given)
    with pytest.raises(ConfigError, match=error):
        SCRIPT["main"](flags=flags, codes=[4])
