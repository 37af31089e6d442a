"""A wire is trained with several seeds, each run in a directory of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

import latentwire
from latentwire import RunConfig
from latentwire.api import train as api
from latentwire.cli import main
from latentwire.config import SweepConfig
from latentwire.config.places import with_home
from latentwire.config.resolve import ConfigError, with_values
from latentwire.planning import planner
from latentwire.storage import Place
from tests.reports.test_seeds import of_latents, trained


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Seed and ``resume`` of every run that began; a run leaves what a real one leaves."""
    runs: list[tuple[int, bool]] = []

    def run(space: SweepConfig, output: Place, *, resume: bool, **_: Any) -> api.TrainResult:
        seed, checkpoint = space.run.training.seed, output / "checkpoints" / "step"
        assert isinstance(output, Path) and isinstance(checkpoint, Path)
        runs.append((seed, resume))
        trained(output, seed, of_latents(seed / 10, 1.0))
        checkpoint.mkdir(parents=True)
        planned = planner.alone(with_home(space)).run
        (checkpoint / "config.json").write_text(planned.model_dump_json())
        results = json.loads((output / "results.json").read_text()) | {"best": str(checkpoint)}
        (output / "results.json").write_text(json.dumps(results))
        return api.TrainResult(output, checkpoint, results["validation"])

    monkeypatch.setattr(api, "run", run)
    return runs


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "dataset custom needs the directory of its files, got none; name it by --data_dir"),
        (["--data_dir", "nowhere"], "data_dir must be an existing directory, got"),
        (["--data_dir", "mine"], "must hold validation, valid, val or dev files"),
    ],
)
@pytest.mark.parametrize("command", [["train", "--output", "one"], ["tune", "--dry_run"]])
def test_data_that_are_not_there_are_told_before_receivers_are_looked_at(
    command: list[str],
    given: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("{}")
    monkeypatch.setattr(planner, "plan", None)  # it would load tokenizers, and convert weights
    assert main([*command, "--dataset", "custom", *given]) == 2
    assert expected in capsys.readouterr().err


def test_every_seed_is_a_run_of_its_own_and_their_range_is_printed(
    begun: list[tuple[int, bool]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = latentwire.train_seeds(RunConfig(), seeds=[3, 1, 2], output=tmp_path / "runs")
    assert begun == [(3, False), (1, False), (2, False)]
    assert [result.output.name for result in results] == ["seed-3", "seed-1", "seed-2"]
    assert [result.scores["latent"]["llama"]["em"] for result in results] == [0.3, 0.1, 0.2]
    assert "20.0 (10.0 to 30.0)" in capsys.readouterr().out


def test_what_has_ended_is_read_and_what_has_not_goes_on(
    begun: list[tuple[int, bool]], tmp_path: Path
) -> None:
    output = tmp_path / "runs"
    first = latentwire.train_seeds(RunConfig(), seeds=[0, 1], output=output)
    (output / "seed-2").mkdir()  # a run that was stopped
    again = latentwire.train_seeds(RunConfig(), seeds=[0, 1, 2, 5], output=output, resume=True)
    assert begun[2:] == [(2, True), (5, False)] and again[:2] == first


def test_a_finished_run_of_another_configuration_is_refused(
    begun: list[tuple[int, bool]], tmp_path: Path
) -> None:
    latentwire.train_seeds(RunConfig(), seeds=[0, 1], output=tmp_path / "runs")
    other = with_values(RunConfig(), {"encoder.d_z": 32})
    with pytest.raises(ConfigError, match=r"keeps its configuration, .*seed-0 .*encoder.d_z"):
        latentwire.train_seeds(other, seeds=[0, 1], output=tmp_path / "runs", resume=True)
    assert len(begun) == 2


@pytest.mark.parametrize("seeds", [[], [3], [1, 1], [0, 1, 0]])
def test_seeds_are_several_and_differ(
    seeds: list[int], begun: list[tuple[int, bool]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="seeds must be two or more, all different, got"):
        latentwire.train_seeds(RunConfig(), seeds=seeds, output=tmp_path / "runs")
    assert not begun


def test_the_command_trains_each_seed(
    begun: list[tuple[int, bool]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", "toy", "--output", str(tmp_path / "runs"), "--seeds", "0", "4"]
    assert main(words) == 0 and begun == [(0, False), (4, False)]
    assert "seeds 0, 4: mean (least to greatest)" in capsys.readouterr().out
    assert main(words) == 2 and "output must not exist yet" in capsys.readouterr().err
    assert main([*words, "--seed", "3"]) == 2
    assert "--seeds names the seeds of whole runs" in capsys.readouterr().err
    assert main(["train", "--output", str(tmp_path / "one"), "--seeds", "3"]) == 2
    assert "seeds must be two or more" in capsys.readouterr().err


def test_a_directory_is_one_runs_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output, refused = tmp_path / "runs" / "one", []

    def second_run(*_: Any) -> SweepConfig:
        """Begin another run while the first one is being prepared, then fail."""
        if not refused:
            refused.append("")
            with pytest.raises(
                ConfigError, match=r"is for one run at a time, another one trains in .*one; wait"
            ):
                api.run(SweepConfig(), output, command="")
        raise ConfigError("the first run fails here")

    monkeypatch.setattr(api, "prepared", second_run)
    for _ in range(2):  # a run that has failed leaves the directory free, and nothing behind
        with pytest.raises(ConfigError, match="the first run fails here"):
            api.run(SweepConfig(), output, command="")
        assert refused == [""] and not list(output.parent.iterdir())


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for below in ("one", "deep/one"):
        with pytest.raises(
            ConfigError, match=rf"output must be writable, got .*file/{below}: .*; n"
        ):
            api.run(SweepConfig(), tmp_path / "file" / below, command="")
