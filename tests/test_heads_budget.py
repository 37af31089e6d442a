"""``experiments/heads_budget.py``: fewer heads leave more of the answers' loss, and the last line is the text itself."""

import runpy
from pathlib import Path

import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from tests.conftest import HEADS, choose_some_heads, shard_table, wire_of

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "heads_budget.py"))


def test_a_line_for_each_budget_ends_with_all_heads(
    run: RunConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"adapter": HEADS["adapter"] | {"cache_share": 0.2}}
    wire = choose_some_heads(wire_of(with_values(run, HEADS | values)))
    wire.save_pretrained(tmp_path / "wire")
    rows = shard_table(wire.run, 8, questions=2)
    names = SCRIPT["main"].__globals__
    monkeypatch.setitem(names, "local_shards", lambda *_, **__: {"dev": None})
    monkeypatch.setattr(names["shards"], "read_table", lambda _: rows)
    SCRIPT["main"](wire=str(tmp_path / "wire"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for name in wire.receivers:
        of_receiver = [row for row in cells if row[0] == name]
        counts = [int(count) for _, count, _, _ in of_receiver]
        losses = [float(nll) for *_, nll in of_receiver]
        every = wire.interlingua.adapters[name].score_LH.numel()
        assert counts == sorted(set(counts)) and counts[-1] == every
        assert of_receiver[-1][2] == "100 %" and min(losses) == losses[-1] < losses[0]
