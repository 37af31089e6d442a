"""The main job through real Ray workers, its plan, and what it refuses."""

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from ray.cluster_utils import Cluster
from tensorboardX.proto import event_pb2

from latentwire import exports
from latentwire.card import AGAINST_TEXT
from latentwire.config.resolve import load_space
from latentwire.evaluation import scoring
from latentwire.tuning.lease import LEASE_FILE
from latentwire.tuning.study import JOURNAL, open_study, read_study
from tests.conftest import untimed
from tests.ray_jobs.conftest import ONE_VARIANT, REPOSITORY, TINY, Job, log_of

pytestmark = pytest.mark.slow


@pytest.fixture
def another_ray() -> Iterator[None]:
    """A second Ray on this machine, which Train's own actors must not take for theirs."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    yield
    cluster.shutdown()


@pytest.mark.usefixtures("another_ray")
def test_a_small_sweep_from_space_to_export(job: Job, tmp_path: Path) -> None:
    """One of its trials ends before its first evaluation, which is no more than its own failure."""
    output, space = tmp_path / "sweep", load_space("search_spaces/toy.yaml")
    shards = tmp_path / "shards"
    tree = space.model_dump(mode="json", exclude_unset=True)
    weight = "losses.first_token_ce_weight"
    tree["search"][weight] = {
        "type": "categorical",
        "choices": [0.5, 1e39],
    }  # fp32 has no such number
    tree["tune"]["start_with"] = [{weight: 1e39}, {weight: 0.5}, {weight: 0.5}]
    tree["run"]["training"]["max_bad_steps"] = 1
    (tmp_path / "space.json").write_text(json.dumps(tree))
    steps = ("--max_steps=6", "--set", "training.evaluate_every=3", "--set", "tune.grace_steps=3")
    seen = (
        "--set",
        "tune.trackers=[mlflow]",
        "--set",
        "tune.keep_checkpoints=2",
        "--set",
        "tune.trials=3",
    )
    named = ("--space", str(tmp_path / "space.json"), "--output_dir", str(output))
    readers = ("--set", "evaluation.tuned_text={steps: 2, trials: 1, batch_size: 4}")
    process = job("ray_jobs/tune.py", *named, *TINY, *steps, *seen, *readers, shards=shards)
    assert process.wait(600) == 0, log_of(tmp_path)
    document = json.loads((output / "results.json").read_text())
    assert 1 <= len(list(output.glob("trials/*/step-*"))) <= 2 and "checkpoints kept: " in log_of(
        tmp_path
    )
    check_console(output, log_of(tmp_path))
    check_progress(output)
    *rows, failed = document["trials"]
    assert len(rows) == 2 and all(
        (row["state"], row["step"]) in {("done", 6), ("stopped", 3)} for row in rows
    )
    assert (failed["trial"], failed["state"], "step" in failed) == (0, "failed", False)
    assert failed["error"].startswith("gradients must be finite, got norm ")
    study = open_study(output / JOURNAL, output.name, {"dev_f1": "max"})
    told = {t.number: (t.state.name, t.value) for t in study.trials}
    states = {
        row["trial"]: ("COMPLETE" if row["state"] == "done" else "PRUNED", row["dev_f1"])
        for row in rows
    }
    assert told == states | {0: ("FAIL", None)}
    assert all(set(row["values"]) == set(space.search) for row in document["trials"])
    assert rows[0]["dev_f1"] == max(row["dev_f1"] for row in rows)
    # A stopped trial's worker may have replaced the checkpoint of its best before it heard: the next best wins then.
    assert document["best"]["score"] in {row["dev_f1"] for row in rows}
    assert document["best"]["score"] >= max(row["dev_f1"] for row in rows if row["state"] == "done")

    # The export holds no training state, is whole, and scores again what it scored.
    manifest = exports.read_manifest(output / "best")
    assert not any("training_state" in name for name in manifest["files"])
    (validation,) = [path for path in shards.glob("toy-validation-*")
                     if json.loads((path / "manifest.json").read_text())["key"] == manifest["pins"]["validation"]["shards"]]  # fmt: skip
    scores = scoring.score(output / "best", validation)
    untuned = {key: row for key, row in document["validation"].items() if key in scores}
    assert by_themselves(scores) == by_themselves(untuned)
    assert [setting.key for setting in scoring.FINAL_CONDITIONS] == list(scores)
    # Each row of text has a tuned twin, whose readers say what they were given.
    twins = {key for key in document["validation"] if key.endswith(" tuned")}
    assert twins == {"text tuned", "truncated tuned", "closed_book tuned"}
    reports = [report for key in twins for report in document["text_readers"][key].values()]
    assert {(report["steps"], report["batch_size"]) for report in reports} == {(2, 4)}
    assert len(list((tmp_path / "shards").glob("reader-*"))) == len(reports) == 6

    report = (output / "report.md").read_text()
    assert "full text" in report and "3 trials" in report and "1 trials failed" in report
    assert (output / "predictions.parquet").exists()
    assert "llama keeps" in (output / "report.html").read_text()

    # Its manifest repeats a trial to the last bit.
    written = json.loads((output / "manifest.json").read_text())
    assert (
        written["evaluation_pin"]
        == document["evaluation_pin"]
        == manifest["pins"]["evaluation_pin"]
    )
    assert written["receivers"] == manifest["pins"]["receivers"]
    beside = json.loads((output / "best" / "sweep.json").read_text())
    assert beside == written | {"trial": document["best"]["trial"]}
    number = next(
        int(key) for key, trial in written["trials"].items() if trial["state"] == "COMPLETE"
    )
    again = tmp_path / "again"
    process = job(
        "ray_jobs/tune.py",
        "--from_manifest",
        str(output),
        f"--trial={number}",
        "--output_dir",
        str(again),
        shards=shards,
    )
    assert process.wait(600) == 0, log_of(tmp_path)
    score = written["trials"][str(number)]["score"]
    assert f"repeated trial {number}: dev_f1 {score!r}, was {score!r}" in log_of(tmp_path)
    (trial,) = json.loads((again / "manifest.json").read_text())["trials"].values()
    assert trial == written["trials"][str(number)]


def by_themselves(scores: dict) -> dict:
    """Scores without times, and without what compares them with a text that one of the tables has not."""
    return {
        key: {
            name: {
                field: value
                for field, value in row.items()
                if not field.startswith(tuple(AGAINST_TEXT))
            }
            for name, row in receivers.items()
        }
        for key, receivers in untimed(scores).items()
    }


def check_console(output: Path, console: str) -> None:
    """A page for a person: what the trials came to, and where all else is."""
    lines = console.splitlines()
    assert len(lines) < 80, console
    ends = [line for line in lines if re.match(r"trial \d (done|stopped|failed)", line)]
    assert len(ends) == 3 and re.search(r"; 3 of 3 trials ended, 0 running", ends[-1])
    (failed,) = [
        line for line in ends if line.startswith("trial 0 failed: gradients must be finite")
    ]
    output_of_trial = output / "trials" / "trial-0" / "log.txt"
    assert (
        f"output: {output_of_trial};" in failed
        and "gradients must be finite" in output_of_trial.read_text()
    )
    assert "step 6/6 " in (output / "trials" / "trial-1" / "log.txt").read_text()
    assert not [
        line for line in lines if re.match(r"\d{4}-\d\d-\d\d |step \d|\(\w+ pid=|scored ", line)
    ]
    assert re.search(r"\(RayTrainWorker pid=\d+.*\) step 6/6 ", (output / "log.txt").read_text())


def check_progress(output: Path) -> None:
    """TensorBoard's files and MLflow's runs have what the trials reported; the first one nothing."""
    files = list(output.glob("tune/*/trial-*/events.out.tfevents*"))
    assert len(files) == 3
    for file in files:
        events = [event_pb2.Event.FromString(record) for record in records(file.read_bytes())]
        steps = [
            event.step
            for event in events
            for value in event.summary.value
            if value.tag == "ray/tune/dev_f1"
        ]
        assert steps in ([[]] if file.parent.name == "trial-0" else [[3], [3, 6]])
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(output.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted("dev_f1" in run.data.metrics for run in runs) == [False, True, True]


def records(content: bytes) -> Iterator[bytes]:
    """The records of a TensorBoard file: length, checksum, bytes, checksum."""
    place = 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        yield content[place + 12 : place + 12 + length]
        place += 16 + length


def test_ctrl_c_and_a_time_budget_stop_a_sweep_which_goes_on(
    tmp_path: Path, common_shards: Path
) -> None:
    """Nothing is scored, cut trials stay unfinished, and a second driver is refused meanwhile."""
    output = tmp_path / "sweep"
    steps = ("--max_steps=300", "--epochs=40", "--set", "training.evaluate_every=20")
    flags = (*ONE_VARIANT, *TINY, *steps, "--set", "tune.scheduler=none", "--set", "tune.trials=2")

    def command(*arguments: str) -> subprocess.Popen:
        """Start a command in a group of its own, as a terminal does."""
        with (tmp_path / "log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "ray_jobs/tune.py", *arguments],
                cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
        end = time.time() + 800
        while not condition():
            assert process.poll() is None and time.time() < end, log_of(tmp_path)
            time.sleep(0.2)

    def states() -> list[str]:
        with read_study(output / JOURNAL, output.name, {"dev_f1": "max"}) as study:
            return [trial.state.name for trial in study.trials]

    budget = (
        "--set",
        "tune.time_budget_minutes=0.05",
        "--set",
        f"data.shard_dir={common_shards}",
    )
    process = command(*flags, *budget, "--output_dir", str(output))
    try:
        assert process.wait(600) == 1, log_of(tmp_path)
        assert "stopped: tune.time_budget_minutes is over; 0 of 2" in log_of(tmp_path)
        assert "Traceback" not in log_of(tmp_path) and states() == ["RUNNING"] * 2

        process = command("--resume", str(output), "--set", "tune.time_budget_minutes=null")
        wait_for((output / LEASE_FILE).exists, process)
        second = subprocess.run(
            [sys.executable, "ray_jobs/tune.py", "--resume", str(output), "--force"],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert second.returncode == 2 and f"has process {process.pid} on" in second.stderr, (
            second.stderr
        )
        wait_for(lambda: list(output.glob("trials/trial-0/step-*/manifest.json")), process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(300) == 130, log_of(tmp_path)
        assert "stopped: Ctrl-C; 0 of 2 trials have ended" in log_of(tmp_path)
        assert f"go on: python ray_jobs/tune.py --resume {output}\n" in log_of(tmp_path)
        assert "Traceback" not in log_of(tmp_path) and "RUNNING" in states()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    kept = {path.name for path in output.iterdir()}
    assert not kept & {LEASE_FILE, "results.json", "best", "predictions.parquet"}


def test_dry_run_prints_the_plan_and_starts_nothing(job: Job, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    process = job(
        "ray_jobs/tune.py", "--dry_run", "--output_dir", str(tmp_path / "sweep"), shards=shards
    )
    assert process.wait(300) == 0, log_of(tmp_path)
    log = log_of(tmp_path)
    assert "trials at once: " in log and "receiver llama: " in log and '"latent_len"' in log
    for told in (
        r"node [\d.]+ \(",
        r"shards toy-dev-\w+: to be made",
        "steps: at most 900 in a run",
        "CPU-hours: ",
        "disk: about",
    ):
        assert re.search(told, log), told
    assert not (tmp_path / "sweep").exists() and not shards.exists()


def test_what_is_wrong_is_said_before_long_work_starts(job: Job, tmp_path: Path) -> None:
    flags = ("--data_dir=./nowhere", "--dataset=squad", "--output_dir", str(tmp_path / "sweep"))
    assert job("ray_jobs/tune.py", *flags).wait(300) == 2, log_of(tmp_path)
    assert "error: data_dir must be an existing directory, got /" in log_of(tmp_path)
    assert "Traceback" not in log_of(tmp_path)
