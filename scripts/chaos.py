"""Kill a small sweep again and again, and check that nothing is lost and nothing counts twice.

    python scripts/chaos.py --deaths 50 --seed 0 --pause 3 30 --steps 480 --output_dir runs/chaos
    python scripts/chaos.py --deaths 10 --receivers shared --output_dir runs/shared-chaos

A sweep of the toy pair runs on a cluster of its own, which outlives its driver. After delays drawn by the seed one of them is
killed with -9: the sweep's driver, a Train worker, a trial's driver ("trial actor"), or the raylet, and with it the whole
machine; where trials share their receivers, also a replica. The training rows lie in several files, so that a resumed trial
that got them in another order would end with another value. ``ray_jobs/tune.py --resume`` goes on each time. ``--spread`` has
deaths wait for the sweep to get on, so that they meet trials that have ended and trials with checkpoints, not only the first
ones as they start. In the end every trial's value must be what the same configuration gives in one process that nobody killed;
the table of deaths and the checks are printed and kept in ``chaos.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
import pyarrow as pa
import ray
import ray.data
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.cluster_utils import Cluster
from ray.util.state import list_actors, list_placement_groups

from latentwire import exports
from latentwire.config.resolve import load_space, with_values
from latentwire.data import shards, streams
from latentwire.distributed import sweep_files
from latentwire.model import LatentWire
from latentwire.planning.resolved import objectives
from latentwire.planning.variants import variant_key
from latentwire.training.loop import Trainer
from latentwire.tuning.space_file import SPACE_FILE
from latentwire.tuning.study import JOURNAL, open_study, own_trials

REPOSITORY = Path(__file__).parent.parent
EVALUATIONS = 4
"""Of each trial, with a checkpoint at each."""
SPACE = """
run:
  data: {dataset: toy, samples: 200, dev_samples: 8, validation_samples: 8, dev_fraction: 0.1, shard_mib: 0.01}
  encoder: {latent_len: 4, d_z: 16, d_model: 32, layers: 1, heads: 2}
  training: {batch_size: 8, alignment_steps: 2, max_failures: 100}
  evaluation: {max_answer_tokens: 4}
search:
  training.encoder_lr: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}
tune:
  sampler: {name: random}
  scheduler: none
  metric: dev_loss
  mode: min
  max_failures: 100
  max_concurrent_trials: 2
"""
VICTIMS = ("driver", "worker", "trial actor", "raylet")
NAMES = {
    "worker": "ray::RayTrainWorker",
    "trial actor": "ray::ImplicitFunc",
    "replica": "ray::ReplicaActor",
}
"""What Ray calls the processes of a Train worker, of a trial's driver and of a shared receiver."""
SHARED_TOLERANCE = 1e-3
"""Relative, of values where receivers are shared: a replica computes with all cores, a trial's worker with one, and sums differ."""
START_SECONDS = 600.0
"""How long a victim may take to appear, and what a kill leaves to go away."""
HEAD = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": 0, "object_store_memory": 2**28}
"""Of every cluster; the State API asks the dashboard."""
LOOK_SECONDS = 0.5
"""Between looks at how far the sweep is."""
NOTICE_SECONDS = 10.0
"""How long a driver has to notice that the raylet is gone before it is killed too, as on a machine that dies."""


@dataclass
class Death:
    """One kill."""

    victim: str
    seconds: float
    """Since the first command."""
    finished: int
    """Trials that had ended by then."""
    steps: dict[int, int]
    """Running trial → step of its last checkpoint."""


@dataclass
class Chaos:
    """A sweep on a cluster of its own, and who was killed."""

    output: Path
    victims: list[str]
    rng: random.Random
    pause: tuple[float, float]
    """Shortest and longest delay in seconds before a kill."""
    steps: int
    """Of each trial."""
    spread: float = 0.0
    """Share of all trials' steps over which the deaths are spread evenly; 0: none waits."""
    receivers: str = "own"
    """Whether trials share them."""
    trials: int = 12
    deaths: list[Death] = field(default_factory=list)
    began: float = field(default_factory=time.time)
    cluster: Cluster | None = None
    driver: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Kill and resume until the sweep is through."""
        process = self.start()
        while True:
            number = len(self.deaths)
            if number == len(self.victims):
                code = process.wait()
            else:
                code = self.wait_for_steps(self.spread * number / len(self.victims), process)
                if code is None:
                    code = self.wait(process, self.rng.uniform(*self.pause))
                if code is None:
                    code = self.kill(self.victims[number], process)
            # The sweep goes on by itself.
            if code is None:
                continue
            if code == 0:
                break
            process = self.start()
        self.connect()

    def start(self) -> subprocess.Popen[bytes]:
        """Begin the sweep or go on with it, on a new cluster where the machine has died."""
        if self.cluster is None:
            self.cluster = Cluster(initialize_head=True, head_node_args=dict(HEAD))
        command = [sys.executable, "ray_jobs/tune.py"]
        if (self.output / SPACE_FILE).exists():
            command += ["--resume", str(self.output)]
        else:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            file = self.output.parent / f"{self.output.name}.yaml"
            file.write_text(SPACE)
            values = {
                "tune.trials": self.trials,
                "tune.receivers": self.receivers,
                "training.max_steps": self.steps,
                "training.epochs": self.steps,
                "training.evaluate_every": max(1, self.steps // EVALUATIONS),
                "data.shard_dir": self.output.parent / "shards",
            }
            command += ["--space", str(file), "--output_dir", str(self.output)]
            for path, value in values.items():
                command += ["--set", f"{path}={value}"]
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address, "RAY_DEDUP_LOGS": "0"}
        with (self.output.parent / f"{self.output.name}.log").open("ab") as log:
            self.driver = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log
            )
        return self.driver

    def stop(self) -> None:
        """End what is still running: the driver, then the cluster."""
        if self.driver is not None:
            # Nothing to one that has ended.
            self.driver.kill()
            self.driver.wait()
        ray.shutdown()
        if self.cluster is not None:
            self.cluster.shutdown()

    def kill(self, victim: str, process: subprocess.Popen[bytes]) -> int | None:
        """Kill one of them; returns the driver's exit status where it does not go on by itself."""
        assert self.cluster is not None
        if victim in NAMES:
            candidates = self.wait_for(lambda: self.processes(NAMES[victim]), process)
            # The sweep has ended meanwhile.
            if not candidates:
                return process.poll()
            self.note(victim)
            self.rng.choice(candidates).kill()
            return None
        self.note(victim)
        if victim == "driver":
            process.kill()
            return process.wait()
        self.cluster.head_node.kill_raylet()
        if (code := self.wait(process, NOTICE_SECONDS)) is None:
            process.kill()
            code = process.wait()
        self.cluster.shutdown()
        self.cluster = None
        return code or 1

    def note(self, victim: str) -> None:
        """Write a death down as it happens."""
        self.deaths.append(Death(victim, time.time() - self.began, *self.standing()))
        print(row(len(self.deaths), self.deaths[-1]), flush=True)

    def standing(self) -> tuple[int, dict[int, int]]:
        """Return how many trials have ended, and running trial → step of its last checkpoint."""
        trials = self.known()
        running = [trial.number for trial in trials if not trial.state.is_finished()]
        steps = {}
        for number in running:
            steps[number] = max(map(_step, _checkpoints(self.output, number)), default=0)
        return len(trials) - len(running), steps

    def known(self) -> list[Any]:
        """The study's own trials; none before there is a study."""
        if not (self.output / JOURNAL).exists():
            return []
        # To read alone: open_study would write.
        storage = JournalStorage(JournalFileBackend(str(self.output / JOURNAL)))
        names = optuna.get_all_study_names(storage)
        return own_trials(optuna.load_study(study_name=names[0], storage=storage)) if names else []

    def processes(self, name: str) -> list[psutil.Process]:
        """The cluster's processes of that name."""
        assert self.cluster is not None
        alike = []
        for info in self.cluster.head_node.all_processes["raylet"]:
            for child in psutil.Process(info.process.pid).children(recursive=True):
                try:
                    if child.cmdline()[0].startswith(name):
                        alike.append(child)
                # It has ended since it was listed, or is ending and has no command line any more.
                except (psutil.Error, IndexError):
                    continue
        return alike

    def wait_for_steps(self, share: float, process: subprocess.Popen[bytes]) -> int | None:
        """Wait until trials have that share of all steps; return the status of a driver that ends."""
        while share > 0:
            ended, steps = self.standing()
            if ended * self.steps + sum(steps.values()) >= share * self.trials * self.steps:
                return None
            if (code := self.wait(process, LOOK_SECONDS)) is not None:
                return code
        return None

    def wait(self, process: subprocess.Popen[bytes], seconds: float) -> int | None:
        """The exit status of a driver that ends within so many seconds."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def wait_for(
        self, what: Callable[[], list[Any]], process: subprocess.Popen[bytes]
    ) -> list[Any]:
        """Return what appears while the driver runs, empty where that ends; raise after long."""
        end = time.time() + START_SECONDS
        while process.poll() is None:
            if there := what():
                return there
            if time.time() > end:
                raise RuntimeError(
                    f"a process to kill must appear within {START_SECONDS:.0f} s, none did"
                )
            time.sleep(0.1)
        return []

    def connect(self) -> None:
        """Join the cluster on which the sweep has ended."""
        assert self.cluster is not None
        # What the State API reads, whatever it is given.
        os.environ["RAY_ADDRESS"] = self.cluster.address
        ray.init(log_to_driver=False)


def row(number: int, death: Death) -> str:
    """A death as a row of the table."""
    steps = ", ".join(f"{trial} at step {step}" for trial, step in death.steps.items()) or "none"
    return f"| {number} | {death.victim} | {death.seconds:.0f} | {death.finished} | {steps} |"


def _checkpoints(output: Path, number: int) -> list[Path]:
    return list((output / "trials" / f"trial-{number}").glob("step-*"))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def checks(chaos: Chaos) -> dict[str, str]:
    """Return what must hold in the end → how it does; raise :class:`AssertionError` where one does not."""
    trials = chaos.known()
    assert [trial.number for trial in trials] == list(range(chaos.trials)), (
        f"{len(trials)} trials, not {chaos.trials}"
    )
    states = {trial.state for trial in trials}
    assert states == {TrialState.COMPLETE}, f"states {states}"
    right = undisturbed(chaos.output)
    values = {trial.number: float(trial.value) for trial in trials}
    shared, same = chaos.receivers == "shared", values == right
    if shared:
        pairs = [(values[number], right[number]) for number in right]
        same = all(math.isclose(*pair, rel_tol=SHARED_TOLERANCE) for pair in pairs)
    assert same, f"values {values}, undisturbed {right}"
    train = shards.shard_path(load_space(chaos.output / SPACE_FILE).run, "train")
    rows = shards.read_manifest(train)["file_rows"]
    assert len(rows) > 2, f"{len(rows)} files of rows, whose order nothing could change"
    half = [path for path in chaos.output.rglob(".*") if path.is_dir()]
    assert not half, f"half checkpoints {half}"
    whole = [path for path in chaos.output.rglob("step-*") if exports.read_manifest(path)]
    exports.read_manifest(chaos.output / "best")
    groups, actors = leaked()
    assert not groups, f"placement groups {groups}"
    assert not actors, f"actors {actors}"
    exactly = f"to {SHARED_TOLERANCE:g} of them" if shared else "to the last bit"
    return {
        "trials": f"{len(trials)}, all COMPLETE, none RUNNING",
        "values": f"those of the same configurations in one process, {exactly}",
        "training rows": f"in {len(rows)} files, read in one order by every driver",
        "checkpoints": f"{len(whole)} and the export, each whole; nothing half written or half deleted",
        "placement groups and actors left": "none",
    }


def leaked() -> tuple[list[str], list[str]]:
    """Placement groups and Train's actors that are still there; Ray's own cleaner has a while to take them away."""
    end = time.time() + START_SECONDS
    while True:
        left = [group for group in list_placement_groups() if group.state != "REMOVED"]
        groups = [group.placement_group_id for group in left]
        ours = ("RayTrainWorker", "TrainController", "ImplicitFunc", "ReplicaActor")
        alive = [actor.class_name for actor in list_actors(filters=[("state", "=", "ALIVE")])]
        actors = [name for name in alive if name in ours]
        if not (groups or actors) or time.time() > end:
            return groups, actors
        time.sleep(1)


def undisturbed(output: Path) -> dict[int, float]:
    """Trial → the value that its configuration gives in this process, on the same rows in the same order."""
    space = load_space(output / SPACE_FILE)
    files = sweep_files.prepare(space, 0.0)
    study = open_study(output / JOURNAL, output.name, objectives(space))
    values: dict[int, float] = {}
    for trial in own_trials(study):
        run = with_values(space.run, dict(trial.params))
        variant = files[variant_key(run)]
        datasets = sweep_files.load_datasets(variant, run.data.in_memory)
        rows = datasets["train"].iterator()
        dev = pa.concat_tables(
            datasets["dev"].iter_batches(batch_size=None, batch_format="pyarrow")
        )
        trainer = Trainer(LatentWire(run), max(1, variant.train_rows // run.training.batch_size))
        scores: list[float] = []

        # What is this trial's is bound as a default: a closure would see the last one's.
        def epochs(epoch: int, rows: Any = rows, run: Any = run) -> Iterator[pa.Table]:
            return streams.streamed_batches(
                rows, run.training, epoch, run.training.batch_size, keep_short=False
            )

        def keep(
            trainer: Trainer = trainer, dev: pa.Table = dev, scores: list[float] = scores
        ) -> None:
            scores.append(trainer.evaluate(dev)[space.tune.metric])

        trainer.train(epochs, keep)
        values[trial.number] = space.tune.best_of(scores)
    return values


def main() -> int:
    """Run, check, write ``chaos.md``; exit status 1 where a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--deaths", type=int, default=10, help="kills, as many of each kind as possible"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the order of the victims and of the delays"
    )
    parser.add_argument(
        "--pause",
        type=float,
        nargs=2,
        default=(2.0, 12.0),
        help="shortest and longest delay, seconds",
    )
    parser.add_argument(
        "--steps", type=int, default=24, help="of each trial: more, to outlive more deaths"
    )
    parser.add_argument(
        "--spread", type=float, default=0.0, help="deaths are spread over this share of all steps"
    )
    parser.add_argument("--trials", type=int, default=12, help="of the sweep")
    parser.add_argument(
        "--victims", nargs="+", choices=(*VICTIMS, "replica"), help="only these kinds"
    )
    parser.add_argument(
        "--receivers", choices=("own", "shared"), default="own", help="whether trials share them"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="the sweep's directory; must not exist yet"
    )
    options = parser.parse_args()
    if (output := options.output_dir.absolute()).exists():
        print(
            f"error: output_dir must not exist yet, got {output}; name another one", file=sys.stderr
        )
        return 2
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # As a worker of one CPU has: sums in another order would be other values.
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    kinds = options.victims or VICTIMS + (("replica",) if options.receivers == "shared" else ())
    victims = [kinds[number % len(kinds)] for number in range(options.deaths)]
    rng.shuffle(victims)
    bounds = tuple(options.pause), options.steps, options.spread, options.receivers, options.trials
    chaos = Chaos(output, victims, rng, *bounds)
    header = [
        "| death | killed | at second | trials ended | trials running |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(header), flush=True)
    # As Ctrl-C does: what runs is ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        chaos.run()
        findings = checks(chaos)
    except AssertionError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    finally:
        chaos.stop()
    lines = [
        *header,
        *(row(number, death) for number, death in enumerate(chaos.deaths, start=1)),
        "",
    ]
    lines += [f"- {what}: {how}" for what, how in findings.items()]
    lines.append(
        f"- deaths: {len(chaos.deaths)} of {options.deaths}, {time.time() - chaos.began:.0f} s in all"
    )
    (output / "chaos.md").write_text("\n".join(lines) + "\n")
    (output / "chaos.json").write_text(
        json.dumps([vars(death) for death in chaos.deaths], indent=1)
    )
    print("\n".join(lines[len(chaos.deaths) + 2 :]))
    return 0 if len(chaos.deaths) == options.deaths else 1


if __name__ == "__main__":
    sys.exit(main())
