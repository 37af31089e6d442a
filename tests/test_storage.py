"""Places: the same calls on a disk and on an S3, and what is said when the store goes wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire import exports, storage
from latentwire.cli.flags import input_path, input_place, output_place
from latentwire.config import SweepConfig
from latentwire.config.places import with_home
from latentwire.config.resolve import ConfigError
from latentwire.model import LatentWire
from latentwire.storage import Place, Remote, StorageError
from latentwire.training import checkpoints, step_checkpoints
from latentwire.training.loop import Trainer
from latentwire.tuning import study as studies
from tests.s3 import answering, bucket, free_port, point_to


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with bucket() as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "disk":
        return tmp_path
    point_to(monkeypatch, request.getfixturevalue("port"))
    return storage.place(f"s3://bucket/{tmp_path.name}")


def test_files_and_directories_on_a_disk_and_in_a_store(root: Place, tmp_path: Path) -> None:
    place = root / "sweep" / "results.json"
    assert not place.exists() and place.name == "results.json" and place.parent == root / "sweep"
    storage.write_text(place, "ö")
    assert (
        place.read_text() == "ö"
        and place.is_file()
        and place.parent.is_dir()
        and storage.size(place) == 2
    )

    table = pa.table({"x": [1, 2, 3], "y": ["a", "b", "c"]})
    storage.write(root / "rows.parquet", lambda file: pq.write_table(table, file))
    assert storage.read_parquet(root / "rows.parquet", ["x"]).to_pydict() == {"x": [1, 2, 3]}
    assert storage.read_footer(root / "rows.parquet").num_rows == 3

    with storage.directory(root / "best", last="manifest.json") as folder:
        (folder / "adapters").mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "adapters" / "llama").write_text("weights")
    storage.rename(root / "best", "best-until")
    assert not (root / "best").exists()
    with storage.local(root / "best-until") as folder:
        assert (folder / "adapters" / "llama").read_text() == "weights" and (
            folder / "manifest.json"
        ).exists()


def test_a_writer_that_fails_leaves_nothing(root: Place) -> None:
    def fail(file: Path) -> None:
        file.write_text("half")
        raise RuntimeError("planted")

    storage.write_text(root / "kept", "before")
    for name in ("new", "kept"):
        with pytest.raises(RuntimeError, match="planted"):
            storage.write(root / name, fail)
    assert not (root / "new").exists() and (root / "kept").read_text() == "before"


def test_a_files_directory_is_made(root: Place) -> None:
    storage.write(root / "no" / "such" / "file", lambda file: file.write_text("whole"))
    assert (root / "no" / "such" / "file").read_text() == "whole"


def test_a_query_stays_at_the_end() -> None:
    place = storage.place("s3://bucket/runs?region=eu-west-1") / "sweep"
    assert str(place) == "s3://bucket/runs/sweep?region=eu-west-1" and place.name == "sweep"
    assert str(place.parent) == "s3://bucket/runs?region=eu-west-1"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "access is denied: give every node's"),
        (404, "there is no such bucket or file: make it"),
    ],
)
def test_what_is_said_when_the_store_refuses(
    status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status) as port:
        point_to(monkeypatch, port)
        with pytest.raises(StorageError, match=message) as caught:
            storage.place("s3://bucket/shards/manifest.json").read_text()
    assert "s3://bucket/shards/manifest.json" in str(caught.value) and "--resume" in str(
        caught.value
    )


def test_a_slow_store_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, b"text", delay=1.5) as port:
        point_to(monkeypatch, port)
        assert storage.place("s3://bucket/report.md").read_text() == "text"


def test_a_server_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, free_port())
    with pytest.raises(
        StorageError, match="it does not answer: check the network and AWS_ENDPOINT_URL"
    ):
        storage.write_text(storage.place("s3://bucket/report.md"), "text")


def test_a_journal_goes_on_from_what_the_store_holds(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(monkeypatch, port)
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "one"))
    journal = storage.place("s3://bucket/sweep/study.journal")
    first = studies.open_study(journal, "sweep", {"dev_f1": "max"})
    first.tell(first.ask(), 0.5)
    studies.keep_journal(journal)
    first.tell(first.ask(), 0.6)  # not copied: the driver died

    assert (
        len(studies.open_study(journal, "sweep", {"dev_f1": "max"}).trials) == 2
    )  # this machine knows more
    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "another"))
    other = studies.open_study(journal, "sweep", {"dev_f1": "max"})
    assert [trial.value for trial in other.trials] == [0.5]
    other.tell(other.ask(), 0.7)
    studies.keep_journal(journal)

    monkeypatch.setenv("LATENTWIRE_CACHE", str(tmp_path / "one"))
    again = studies.open_study(journal, "sweep", {"dev_f1": "max"})
    assert [trial.value for trial in again.trials] == [0.5, 0.7]  # what went on elsewhere counts
    assert (
        len(list((tmp_path / "one").rglob("study.journal-until-*"))) >= 1
    )  # and nothing is thrown away


def test_outputs_go_to_a_bucket_that_is_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTWIRE_HOME", "s3://bucket/latentwire")
    space = with_home(SweepConfig())
    assert space.run.data.shard_dir == "s3://bucket/latentwire/shards"
    assert space.tune.storage_path == "s3://bucket/latentwire/runs"
    assert with_home(space) == space


def test_models_directories_are_absolute_for_workers_that_run_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    models = {"type": "categorical", "choices": ["mini", "org/hub-id"]}
    rate = {"type": "float", "low": 0.1, "high": 0.2, "when": {"encoder.model": ["mini"]}}
    tree = {
        "run": {"encoder": {"kind": "st", "model": "mini"}},
        "search": {"encoder.model": models, "training.encoder_lr": rate},
        "tune": {"start_with": [{"encoder.model": "mini"}]},
    }
    found = with_home(SweepConfig.model_validate(tree))
    assert found.run.encoder.model == str(tmp_path / "mini")
    assert found.search["encoder.model"].choices == (str(tmp_path / "mini"), "org/hub-id")
    assert found.search["training.encoder_lr"].when == {"encoder.model": (str(tmp_path / "mini"),)}
    assert found.tune.start_with == ({"encoder.model": str(tmp_path / "mini")},)


def test_searched_inputs_are_absolute_wherever_the_space_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wires = {"type": "categorical", "choices": ["one/best", "s3://bucket/two"]}
    steps = {"type": "int", "low": 1, "high": 2, "when": {"training.init_from": "one/best"}}
    tree = {
        "search": {"training.init_from": wires, "training.warmup_steps": steps},
        "tune": {"start_with": [{"training.init_from": "one/best"}]},
    }
    space, here = with_home(SweepConfig.model_validate(tree)), str(tmp_path / "one/best")
    assert space.search["training.init_from"].choices == (here, "s3://bucket/two")
    assert space.search["training.warmup_steps"].when == {"training.init_from": (here,)}
    assert space.tune.start_with == ({"training.init_from": here},)


def test_what_another_process_has_just_deleted_is_nothing_to_delete(root: Place) -> None:
    path = root / "step-00000001"
    assert step_checkpoints.metrics_of(path) == {}
    checkpoints.remove(path)
    storage.write_text(
        path / "manifest.json",
        json.dumps({"files": {"config.json": ""}, "metrics": {"dev_f1": 0.5}}),
    )
    storage.write_text(path / "config.json", "{}")
    assert step_checkpoints.metrics_of(path) == {"dev_f1": 0.5} and step_checkpoints.finished(
        root
    ) == [path]
    for _ in range(2):
        checkpoints.remove(path)
    assert not path.exists()


def test_a_part_of_a_checkpoint_in_a_store_is_written_again(wire: LatentWire, root: Place) -> None:
    """Its worker died while it was sent; the one that comes after reaches the same step."""
    trainer = Trainer(wire, 9)
    trainer.progress.step = 2
    if not isinstance(root, Path):  # on a disk it would have another name
        storage.write_text(root / "run" / "step-00000002" / "config.json", "{}")
    path = step_checkpoints.save_step(
        root / "run", wire, {"dev_f1": 0.5}, {}, trainer, "dev_f1", "max"
    )
    assert step_checkpoints.finished(root / "run") == [path]
    with storage.local(path) as folder:
        assert exports.read_manifest(folder)["metrics"] == {"dev_f1": 0.5}


def test_relative_outputs_of_flags_go_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert output_place("runs/one") == Path.cwd() / "runs" / "one"
    monkeypatch.setenv("LATENTWIRE_HOME", "s3://bucket/latentwire")
    assert output_place("runs/one") == Remote("s3://bucket/latentwire/runs/one")
    assert output_place(str(tmp_path)) == tmp_path and output_place("gs://x/y") == Remote(
        "gs://x/y"
    )
    with pytest.raises(ConfigError, match="a URI must not hold credentials") as caught:
        output_place("s3://key:sesame@bucket/x")
    assert "sesame" not in str(caught.value)


def test_a_jobs_inputs_are_sought_where_its_outputs_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What an earlier job wrote under a relative path, the next one names by the same; what was uploaded goes before."""
    upload, written = tmp_path / "_ray_pkg_1", tmp_path / "home"
    for folder in (
        upload / "spaces",
        written / "runs" / "best",
        written / "rows",
        written / "model",
    ):
        folder.mkdir(parents=True)
    monkeypatch.chdir(upload)
    monkeypatch.setenv("LATENTWIRE_HOME", str(written))
    assert input_place("runs/best") == input_path("runs/best") == written / "runs" / "best"
    assert input_place("spaces") == Path("spaces") and input_place("nowhere") == Path("nowhere")
    (upload / "runs" / "best").mkdir(parents=True)
    assert input_place("runs/best") == Path("runs/best")
    tree = {
        "run": {
            "data": {"dataset": "custom", "data_dir": "rows"},
            "training": {"init_from": "runs/best"},
            "receivers": [{"name": "own", "model": "model"}, {"name": "hub", "model": "org/name"}],
        },
        "tune": {"warm_start": "runs/best"},
    }
    space = with_home(SweepConfig.model_validate(tree))
    assert space.run.data.data_dir == str(written / "rows")
    assert space.run.training.init_from == space.tune.warm_start == str(upload / "runs" / "best")
    assert [receiver.model for receiver in space.run.receivers] == [
        str(written / "model"),
        "org/name",
    ]


def test_inputs_are_sought_in_a_bucket_too(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(monkeypatch, port)
    home = storage.place(f"s3://bucket/{tmp_path.name}")
    storage.write_text(home / "runs" / "best" / "manifest.json", "{}")
    monkeypatch.setenv("LATENTWIRE_HOME", str(home))
    assert input_place("runs/best") == home / "runs" / "best"
    with pytest.raises(ConfigError, match="must be a path on this machine, got s3://bucket/"):
        input_path("runs/best")
