"""A manifest holds what repeats a run and no secret; a trial is repeated from it, or refused with the reason."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from latentwire.config import SweepConfig
from latentwire.config.resolve import ConfigError
from latentwire.distributed.sweep_files import Files
from latentwire.distributed.trial import trial_path
from latentwire.tuning import manifest
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import JOURNAL

SPACE = {
    "run": {"data": {"dataset": "custom", "data_dir": "s3://bucket/rows"}, "training": {"seed": 7}},
    "search": {"encoder.latent_len": {"type": "int", "low": 4, "high": 16}},
    "tune": {"trials": 3, "finalists": 2, "seed": 5, "warm_start": "runs/earlier"},
}


class Made(Files):
    """Files of which only the keys are asked."""

    @property
    def keys(self) -> dict[str, str]:
        return {"train": "aaa", "dev": "bbb"}


FILES = {"one": Made({}, {}, ())}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of three trials: scores 0.3, 0.9, and one that failed."""
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    space = SweepConfig.model_validate(SPACE)
    unwarmed = space.model_copy(update={"tune": space.tune.model_copy(update={"warm_start": None})})
    search = StudySearch(
        unwarmed, journal=tmp_path / JOURNAL, name="sweep", trial_dir=tmp_path / "trials"
    )
    for number, score in enumerate((0.3, 0.9, None)):
        search.suggest(str(number))
        report = {"step": 6, "total_steps": 6} | ({} if score is None else {"dev_f1": score})
        search.on_trial_complete(str(number), report)
    saved = trial_path(tmp_path / "trials", 1) / "step-00000006"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text(json.dumps({"pins": {"receivers": {"llama": "123"}}}))
    command = "python ray_jobs/tune.py --data_dir s3://key:secret@bucket/rows"
    document = manifest.describe(space, FILES, "hash", tmp_path, command, search.study)
    manifest.write(tmp_path / manifest.MANIFEST, document)
    return tmp_path


def test_it_holds_what_repeats_a_run_and_no_secret(written: Path) -> None:
    text = (written / manifest.MANIFEST).read_text()
    document = json.loads(text)
    assert "secret" not in text and document["commands"][0].endswith("s3://bucket/rows")
    again = manifest.describe(
        SweepConfig.model_validate(SPACE),
        FILES,
        "hash",
        written,
        "python ray_jobs/tune.py --resume x",
    )
    assert again["commands"] == [*document["commands"], "python ray_jobs/tune.py --resume x"]
    assert again["trials"] == document["trials"]
    assert document["seeds"] == {"sampler": 5, "data": 0, "training": 7}
    assert document["data"] == [{"train": "aaa", "dev": "bbb"}] and document["receivers"] == {
        "llama": "123"
    }
    assert document["evaluation_pin"] == "hash" and {"torch", "ray", "optuna"} <= set(
        document["packages"]
    )
    assert document["hardware"]["cores"] >= 1 and document["hardware"]["memory_bytes"] > 1e8
    assert [trial["score"] for trial in document["trials"].values()] == [0.3, 0.9, None]


@pytest.mark.parametrize(("named", "number"), [(0, 0), (1, 1), (None, 1)])
def test_a_trial_is_repeated_with_its_own_values(
    written: Path, named: int | None, number: int
) -> None:
    free = ["data.shard_dir=elsewhere", "tune.storage_path=there"]
    space, document = manifest.one_trial(written / manifest.MANIFEST, named, free)
    assert document["trial"] == number
    assert space.tune.start_with == (document["trials"][str(number)]["values"],)
    assert (
        space.tune.trials,
        space.tune.finalists,
        space.tune.warm_start,
        space.run.training.seed,
    ) == (1, 0, None, 7)
    assert (space.run.data.shard_dir, space.tune.storage_path) == ("elsewhere", "there")
    manifest.check_data(document, FILES, "hash")


@pytest.mark.parametrize(
    ("number", "changes", "assignments", "message"),
    [
        (2, {}, [], r"trial must be one with a score in .*, got 2; there are 0, 1"),
        (
            0,
            {},
            ["training.seed=8"],
            r"keeps its configuration; only run\.data\.data_dir.* can change, got run\.training\.seed",
        ),
        (0, {"manifest_version": 9}, [], r"manifest_version must be 1, got 9"),
        (0, {"receivers": {}}, [], "trial must be one with a score"),
    ],
)
def test_what_cannot_be_repeated_is_refused(
    written: Path, number: int, changes: dict[str, Any], assignments: list[str], message: str
) -> None:
    file = written / manifest.MANIFEST
    manifest.write(file, json.loads(file.read_text()) | changes)
    with pytest.raises(ConfigError, match=message):
        manifest.one_trial(file, number, assignments)
    with pytest.raises(
        ConfigError, match=r"must name the manifest\.json of a sweep, got .*nowhere"
    ):
        manifest.one_trial(written / "nowhere", None, [])


def test_other_rows_are_refused(written: Path) -> None:
    _, document = manifest.one_trial(written, None, [])
    with pytest.raises(
        ConfigError, match=r"needs the shards that its manifest names .*'aaa'.*, these are"
    ):
        manifest.check_data(document | {"data": [{"train": "aaa", "dev": "other"}]}, FILES, "hash")
    with pytest.raises(
        ConfigError, match="protocol hash must be hash as in the manifest, got other"
    ):
        manifest.check_data(document, FILES, "other")


def test_the_state_of_a_checkout_and_none_outside(tmp_path: Path) -> None:
    (tmp_path / "manifest.py").write_text("")
    assert manifest.git_state(tmp_path) is None
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    state = manifest.git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "new").write_text("")
    assert manifest.git_state(tmp_path) == state | {"dirty": True}


def test_a_system_that_names_no_processor_has_its_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(*_: object, **__: object) -> str:
        raise FileNotFoundError

    assert manifest.hardware()["cpu"]
    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(manifest.platform, "processor", lambda: "")
    monkeypatch.setattr(manifest.platform, "machine", lambda: "arm64")
    assert manifest.hardware()["cpu"] == "arm64"
