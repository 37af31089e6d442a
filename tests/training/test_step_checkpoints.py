"""A process that dies at any moment leaves whole checkpoints, and debris that the next one clears away."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from latentwire import exports
from latentwire.model import LatentWire
from latentwire.training import step_checkpoints
from latentwire.training.loop import Trainer


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


def dying(monkeypatch: pytest.MonkeyPatch, where: list[tuple[Any, str]], after: int) -> None:
    """The call number ``after`` to any of these functions ends the process instead."""
    calls = 0

    def wrap(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Killed
            return function(*arguments, **named)

        return call

    for owner, name in where:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


WRITES = [
    (exports, "save_file"),
    (Path, "touch"),
    (Path, "chmod"),
    (Path, "write_text"),
    (Path, "write_bytes"),
    (exports.os, "rename"),
]
DELETES = [(Path, "unlink"), (Path, "rmdir"), (Path, "rename")]


def test_a_death_at_any_moment_leaves_no_half_checkpoint(wire: LatentWire, tmp_path: Path) -> None:
    trainer, moments = Trainer(wire, 9), 0
    for where in (WRITES, DELETES):
        for after in range(40):
            trainer.progress.step = 2
            folder = tmp_path / f"run-{len(where[0][1])}-{after}"
            for step, score in ((1, 0.9), (2, 0.1)):
                trainer.progress.step = step
                step_checkpoints.save_step(
                    folder, wire, {"dev_f1": score}, {}, trainer, "dev_f1", "max"
                )
            trainer.progress.step = 3  # saves step 3, deletes step 2
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    exports.shutil, "rmtree", lambda *_, **__: None
                )  # a dead process tidies nothing up
                dying(patch, where, after)
                try:
                    step_checkpoints.save_step(
                        folder, wire, {"dev_f1": 0.5}, {}, trainer, "dev_f1", "max"
                    )
                    survived = True
                except Killed:
                    survived = False
            whole = step_checkpoints.finished(folder)
            assert (
                all(exports.read_manifest(path) for path in whole)
                and folder / "step-00000001" in whole
            )
            assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
                p.name for p in whole
            }
            step_checkpoints.save_step(folder, wire, {"dev_f1": 0.5}, {}, trainer, "dev_f1", "max")
            step_checkpoints.clear_debris(folder)
            assert {path.name for path in folder.iterdir()} == {"step-00000001", "step-00000003"}
            shutil.rmtree(folder)
            moments += 1
            if survived:
                break
    assert moments > 15


def test_debris_of_others_stays(wire: LatentWire, tmp_path: Path) -> None:
    aside = tmp_path / ".step-00000001.part-0123abcd"
    aside.mkdir()
    (aside / "notes.txt").write_text("mine")
    (aside / "config.json").write_text("{}")
    assert step_checkpoints.clear_debris(tmp_path) == 1
    assert [file.name for file in aside.iterdir()] == ["notes.txt"]


def test_the_best_is_kept_by_the_metric_that_is_asked_for(wire: LatentWire, tmp_path: Path) -> None:
    trainer = Trainer(wire, 9)
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), start=1):
        trainer.progress.step = step
        step_checkpoints.save_step(
            tmp_path, wire, {"dev_loss": loss}, {}, trainer, "dev_loss", "min"
        )
    assert [path.name for path in step_checkpoints.finished(tmp_path)] == [
        "step-00000002",
        "step-00000004",
    ]
    trainer.progress.step = 5  # saved because the run was stopped: it has no score
    step_checkpoints.save_step(tmp_path, wire, {}, {}, trainer, "dev_loss", "min")
    assert (
        step_checkpoints.best_of(step_checkpoints.finished(tmp_path), "dev_loss", "min").name
        == "step-00000002"
    )


def test_a_score_that_is_no_number_is_never_the_best(wire: LatentWire, tmp_path: Path) -> None:
    """It may come first, and nothing is greater than it."""
    trainer = Trainer(wire, 9)
    for step, loss in ((1, float("nan")), (2, 2.0), (3, 1.0), (4, 1.5)):
        trainer.progress.step = step
        metrics = {"dev_loss": loss}
        step_checkpoints.save_step(tmp_path, wire, metrics, {}, trainer, "dev_loss", "min")
    paths = step_checkpoints.finished(tmp_path)
    assert [path.name for path in paths] == ["step-00000003", "step-00000004"]
    assert step_checkpoints.best_of(paths, "dev_loss", "min") == paths[0]
