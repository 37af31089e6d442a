"""A checkpoint's wire as a directory to be passed on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from latentwire import exports
from latentwire.cli import main
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.model import LatentWire
from tests.conftest import HEADS, choose_some_heads, shaken, wire_of


def test_a_whole_export_is_the_same_wire(
    wire: LatentWire, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shaken(wire).save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert wire.encoder_id in capsys.readouterr().out
    first, second = (exports.read_manifest(tmp_path / name) for name in ("run", "out"))
    weights = exports.parts(wire).keys()
    assert {name: first["files"][name] for name in weights} == {
        name: second["files"][name] for name in weights
    }


@pytest.mark.parametrize("knobs", [{}, HEADS], ids=["soft prompts", "heads, lent senders"])
def test_half_of_the_bytes_hold_the_rounded_wire(
    run: RunConfig, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    wire = wire_of(with_values(run, knobs))
    if knobs:
        choose_some_heads(wire)
    shaken(wire).save_pretrained(tmp_path / "run")
    frozen = wire.fingerprints()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "half"), "--half"]) == 0
    sizes = [(tmp_path / name / exports.ENCODER).stat().st_size for name in ("run", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    loaded = LatentWire.from_pretrained(tmp_path / "half")
    assert loaded.encoder_id != wire.encoder_id
    assert loaded.fingerprints() == frozen
    pairs = zip(wire.interlingua.parameters(), loaded.interlingua.parameters(), strict=True)
    for before, after in pairs:
        if not before.requires_grad:
            continue
        assert after.dtype == torch.float32
        assert torch.equal(after, before.to(torch.bfloat16).float())


def test_no_directory_is_overwritten(
    wire: LatentWire, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wire.save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "run")]) == 2
    assert "must not overwrite" in capsys.readouterr().err


def test_where_nothing_can_be_written_is_told(
    wire: LatentWire,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for output in (".", str(tmp_path)):  # before anything is loaded
        assert main(["export", "no/such/wire", output]) == 2
        assert "must be a directory of its own" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(exports.CheckpointError, match=r"can be written, got file/out \(.*another"):
        wire.save_pretrained("file/out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nobody_learns_where_things_lay(run: RunConfig, tmp_path: Path) -> None:
    here = {
        "data.dataset": "squad",
        "data.data_dir": str(tmp_path),
        "data.shard_dir": str(tmp_path),
    }
    wire_of(with_values(run, here)).save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*.[jm]*"))
    assert str(tmp_path) not in written and '"dataset": "squad"' in written.replace('":"', '": "')
