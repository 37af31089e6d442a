"""The rungs of ``experiments/capacity.py``: vectors of a context's own are learned, and readers stay as they are."""

import argparse
import runpy
from pathlib import Path

import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.model import LatentWire
from latentwire.pretrained.weights import fingerprint

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "capacity.py"))


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, list[list[float]]]:
    """Rung → steps, nats and exact matches of each of its lines."""
    found: dict[str, list[list[float]]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("| "):
            rung, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(rung, []).append([float(cell) for cell in cells])
    return found


def test_slots_hold_a_context_that_they_are_optimised_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCRIPT["climb"].__globals__, "TOLD_AT", (0, 60))
    SCRIPT["slots_rung"](argparse.Namespace(contexts=2, slots=[2]))
    found = lines(capsys)
    assert list(found) == ["2 slots, embeddings", "2 slots, keys and values too"]
    for start, end in found.values():
        assert start[0] == 0 and end[0] == 60 and end[1] < start[1]
    assert found["2 slots, keys and values too"][1][2:] == [1.0, 1.0]


def test_latents_and_encoder_learn_while_readers_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_values(RunConfig(), {"prompt.anchor": "A: ", "encoder.latent_len": 4})
    LatentWire(run).save_pretrained(tmp_path / "wire")
    monkeypatch.setitem(SCRIPT["climb"].__globals__, "TOLD_AT", (0, 5))
    loaded: list[LatentWire] = []
    monkeypatch.setattr(
        SCRIPT["LatentWire"],
        "from_pretrained",
        lambda path, load=LatentWire.from_pretrained: loaded.append(load(path)) or loaded[-1],
    )
    options = argparse.Namespace(wire=tmp_path / "wire", contexts=2, seen=2, steps=5, tell_every=5)
    SCRIPT["latents_rung"](options)
    SCRIPT["encoder_rung"](options)
    found = lines(capsys)
    assert set(found) == {"latents", "encoder, 2 seen", "encoder, fresh"}
    assert found["latents"][1][1] < found["latents"][0][1]
    assert found["encoder, 2 seen"][1][1] < found["encoder, 2 seen"][0][1]
    first, second = loaded
    assert fingerprint(first.interlingua.adapters) == fingerprint(second.interlingua.adapters)
    assert fingerprint(first.interlingua.encoder) != fingerprint(second.interlingua.encoder)
