"""The doctor names what is missing and how to mend it."""

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentwire.cli import doctor, main


def test_a_machine_that_has_everything_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("Python", "torch", "memory", "CPU cores", "Ray cluster")
    )


def test_a_missing_package_and_a_full_disk_are_named_with_their_remedies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = importlib.metadata.version

    def without_optuna(name: str) -> str:
        if name == "optuna":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_optuna)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "pip install optuna" in printed and "LATENTWIRE_HOME" in printed
    assert "pip install 'latentwire[gguf]'" in printed


def test_a_narrow_terminal_has_every_command_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "80")
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "torchao (optional): pip install 'latentwire[quantization]'" in printed.splitlines()
    assert "…" not in printed


def test_a_cluster_that_does_not_answer_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (finding,) = doctor.ray_cluster()
    assert finding.state == "missing" and "ray start --head" in finding.remedy


def test_outputs_that_cannot_be_written_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LATENTWIRE_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)
    assert [finding.state for finding in doctor.memory_and_storage()][-1] == "missing"


def test_a_home_that_is_not_there_yet_is_looked_at_by_its_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LATENTWIRE_HOME", str(tmp_path / "new" / "home"))
    *_, outputs = doctor.memory_and_storage()
    assert (outputs.state, outputs.value) == ("ok", str(tmp_path / "new" / "home"))
