"""Forecast of a whole sweep, from its nodes to its disk; ``--dry_run`` prints it."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentwire.config import ReceiverConfig, RunConfig, SweepConfig
from latentwire.data import shards, teachers
from latentwire.data.readers import is_reader
from latentwire.losses.bundles import state_depths
from latentwire.planning.autoscaler import addable_nodes, living_nodes
from latentwire.planning.calibrations import CalibrationForecast, forecast_calibrations
from latentwire.planning.devices import pieces, times
from latentwire.planning.planner import Plan, PlanError
from latentwire.planning.resolved import ResolvedSweep, resolve
from latentwire.planning.sharing import PROMPT_POSITIONS
from latentwire.planning.stages import StageForecast, forecast_stages
from latentwire.planning.variants import fills_by_positions, most_steps, total_steps
from latentwire.pretrained.weights import load_hf_config
from latentwire.storage import Place
from latentwire.threads import use_threads

BYTES_PER_PARAMETER = 12
"""Bytes of a trained parameter in a checkpoint: the weight and AdamW's two moments, in fp32. Muon
keeps one moment of a matrix."""
REACHED = (0.1, 0.5)
"""Share of a plain matrix product's rate that training reaches: the lower end by small models, the
upper by large ones."""
START_SECONDS = 20.0
"""Seconds from a trial's start to its first step on two cores (12 s alone, more where several start
at once)."""


def fit(plan: Plan, nodes: Iterable[Mapping[str, Any]]) -> tuple[Plan, list[str]]:
    """Return the plan with as many trials at once as the nodes hold, and lines for the terminal.

    There is a line for every node that could host a worker, and one for how many trials could start
    now where not all of them could. ``nodes``: as ``living_nodes`` and ``addable_nodes`` of
    :mod:`latentwire.planning.autoscaler` give them. Raises
    :class:`~latentwire.planning.planner.PlanError` where no node has enough for one worker, or the
    nodes together not enough for one trial's.
    """
    lines, places, places_now = [], 0, 0
    # An entry of a node type that may still be added stands for Count nodes.
    living = [node for node in nodes if node["Alive"]]
    gpus = sum(node["Resources"].get("GPU", 0.0) * node.get("Count", 1) for node in living)
    for node in living:
        has = node["Resources"]
        workers = _workers_on(plan, has, gpus)
        places += workers * node.get("Count", 1)
        line = f"node {node['NodeManagerAddress']} ({_sizes(has)}): {workers} worker(s)"
        if "Free" in node:  # a node that is there
            now = min(workers, _workers_on(plan, node["Free"], gpus))
            places_now += now
            line += f", {now} now ({_sizes(node['Free'])} free)"
        lines.append(line)
    need = f"{plan.num_workers} worker(s) of {plan.cpus_per_worker:g} CPU, {plan.worker_gpus:g} GPU"
    if places < plan.num_workers:
        raise PlanError(
            f"one trial needs {need}, {plan.worker_bytes / 1e9:.2f} GB, each on one node, and "
            f"there is room for {places} ({'; '.join(lines)}): ask for less per worker, or add "
            "larger nodes"
        )
    at_once = min(plan.max_concurrent_trials, places // plan.num_workers)
    if any("Free" in node for node in living):
        started = min(at_once, places_now // plan.num_workers)
        if started < at_once:
            lines.append(
                f"trials that can start now: {started} of {at_once}; the others wait for {need} each, "
                f"as long as it takes"
            )
    return dataclasses.replace(plan, max_concurrent_trials=at_once), lines


def _workers_on(plan: Plan, has: Mapping[str, float], gpus: float) -> int:
    """Count the workers that a node holds beside its share of the replicas.

    ``gpus``: of all nodes.
    """
    room = [times(has.get("CPU", 0.0), plan.cpus_per_worker)]
    if plan.worker_gpus:
        here, taken = has.get("GPU", 0.0), []
        if plan.sharing:
            # Replicas spread over the cluster: this node's part is that of its GPUs, rounded up.
            replicas = plan.sharing.replicas
            sets = min(replicas, math.ceil(replicas * here / max(gpus, 1.0)))
            taken = plan.sharing.gpus_of_replicas(sets)
        room.append(pieces(here, plan.worker_gpus, taken))
    else:
        # Without GPUs a node is planned to hold one replica of each receiver beside the workers.
        replica_bytes = sum(plan.sharing.bytes_per_replica.values()) if plan.sharing else 0
        # A node that does not say its memory has no limit; int() takes no infinity.
        free = has.get("memory", math.inf) - replica_bytes
        room.append(int(min(2**62, free // plan.worker_bytes)))
    return max(0, min(room))


def _sizes(has: Mapping[str, float]) -> str:
    return (
        f"{has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU, {has.get('memory', 0) / 1e9:.1f} GB"
    )


@dataclass(frozen=True)
class Forecast:
    """The size of a sweep before it starts."""

    runs: int
    """Trials, and the finalists' re-runs."""
    files: tuple[str, ...]
    """Shards and teachers' columns: there, or to be made."""
    steps_per_run: int | None
    """Most optimiser steps of a run: a scheduler stops some earlier. ``None``: the rows are not
    counted before shards are made."""
    flop_per_run: float | None
    """Floating-point operations of training and evaluation together."""
    checkpoint_bytes: int
    disk_bytes: int
    """Checkpoints kept at the busiest moment, and teachers' columns to be made."""
    free_bytes: int | None
    calibration: CalibrationForecast | None = None
    """What a wire into retrieval heads, or a tuned reader's prefix, begins from; ``None``: nothing."""
    stages: tuple[StageForecast, ...] = ()
    """Stages before the last one, each made once for all trials that agree in it."""
    stages_flop: float | None = 0.0
    """Floating-point operations of those that are to be made; ``None``: their rows are not counted."""

    def lines(self, plan: Plan, rate: float | None) -> list[str]:
        """Describe the forecast for the terminal.

        ``rate``: FLOP/s of a matrix product on one worker, where it was measured; then every file is
        named, too.
        """
        each = f"{plan.num_workers} × ({plan.cpus_per_worker:g} CPU, {plan.worker_gpus:g} GPU)"
        lines = [f"runs: {self.runs}, each {each}"]
        if rate is not None:
            lines += self.files
        else:
            missing = sum("to be made" in file for file in self.files)
            lines[0] += (
                f"; shards and teachers' columns: {missing} to be made, {len(self.files) - missing} there"
            )
        if self.calibration is not None:
            lines.append(self.calibration.line(plan, rate, REACHED))
        lines += [stage.line() for stage in self.stages]
        if self.steps_per_run is None:
            lines.append(
                "steps: known when the shards are made (data.samples is 0, or batches are filled by positions)"
            )
        else:
            lines.append(
                f"steps: at most {self.steps_per_run:,} in a run, {self.runs * self.steps_per_run:,} in all"
            )
        if rate is not None and self.flop_per_run is not None:
            kind = "GPU" if plan.gpus_per_worker else "CPU"
            devices = plan.num_workers * (plan.gpus_per_worker or plan.cpus_per_worker)
            flop_per_worker = self.flop_per_run / plan.num_workers
            stages_to_make = sum(stage.missing for stage in self.stages)
            of_stages = (self.stages_flop or 0.0) / plan.num_workers
            flop, starts = self.runs * flop_per_worker + of_stages, self.runs + stages_to_make
            # Workers of a trial compute side by side; the devices of all of them are paid for.
            seconds = [flop / (share * rate) + starts * START_SECONDS for share in REACHED]
            high, low = (devices * each / 3600 for each in seconds)
            lines.append(
                f"{kind}-hours: {low:.2g} to {high:.2g} if none is stopped early: "
                f"{self.flop_per_run / 1e12:.3g} TFLOP a run at {REACHED[0]:.0%} to "
                f"{REACHED[1]:.0%} of {rate / 1e9:,.0f} GFLOP/s (a matrix product on one worker, "
                f"just measured), and {START_SECONDS:.0f} s to start{self._with_stages()}"
            )
        free = "in an object store"
        if self.free_bytes is not None:
            free = f"{self.free_bytes / 1e9:,.1f} GB free"
        lines.append(
            f"disk: about {self.disk_bytes / 1e6:,.1f} MB at most (a checkpoint "
            f"{self.checkpoint_bytes / 1e6:,.2f} MB), {free}"
        )
        return lines

    def _with_stages(self) -> str:
        """Say what of the hours is that of earlier stages."""
        if not self.stages:
            return ""
        if self.stages_flop is None:
            return "; earlier stages, whose rows are not counted yet, come on top"
        return (
            f"; earlier stages that are to be made are in it, {self.stages_flop / 1e12:.3g} TFLOP"
        )


def forecast(space: SweepConfig | ResolvedSweep, plan: Plan, output: Place) -> Forecast:
    """Estimate what a sweep will take.

    Raises :class:`~latentwire.planning.planner.PlanError` where its checkpoints would not fit the
    disk.
    """
    sweep = resolve(space)
    tune = sweep.space.tune
    reruns = tune.finalists * tune.final_seeds
    files, columns_bytes, rows = _files(sweep)
    steps = flop = None
    lasts = [variant for variant in sweep.variants if variant.is_last]
    trains = {variant.key: variant.shards["train"] for variant in lasts}
    if rows is not None and not fills_by_positions(sweep.space):
        steps = total_steps(sweep.longest, rows)
        # The most costly run, with its own steps: the longest one may be a small model.
        flop = _flop(sweep.largest, plan, total_steps(sweep.largest, rows))
    elif rows is not None and all(map(shards.complete, trains.values())):
        steps = most_steps(sweep.space, rows, trains)
        flop = _flop(sweep.longest, plan, steps)
    stages = forecast_stages(sweep, tune.trials + reruns)
    counted = []
    for stage in stages:
        if stage.steps is not None:
            counted.append(stage.missing * _flop(stage.run, plan, stage.steps))
    checkpoint = BYTES_PER_PARAMETER * plan.trainable_parameters
    # The sweep's best, one of each re-run, the best and the last of every trial that runs, and one
    # to spare.
    checkpoints = tune.keep_checkpoints + reruns + 2 * plan.max_concurrent_trials + 1
    checkpoints += sum(stage.missing for stage in stages)
    disk_bytes = checkpoints * checkpoint + columns_bytes
    disk = _existing_folder(output)
    free_bytes = None if disk is None else shutil.disk_usage(disk).free
    if free_bytes is not None and disk_bytes > free_bytes:
        raise PlanError(
            f"a sweep needs about {disk_bytes / 1e9:.2f} GB ({checkpoints} checkpoints of "
            f"{checkpoint / 1e9:.2f} GB, teachers' columns {columns_bytes / 1e9:.2f} GB), {disk} "
            f"has {free_bytes / 1e9:.2f} GB free: lower tune.keep_checkpoints (now "
            f"{tune.keep_checkpoints}), or set tune.storage_path"
        )
    return Forecast(
        runs=tune.trials + reruns,
        files=tuple(files),
        steps_per_run=steps,
        flop_per_run=flop,
        checkpoint_bytes=checkpoint,
        disk_bytes=disk_bytes,
        free_bytes=free_bytes,
        calibration=forecast_calibrations(sweep, plan, rows),
        stages=stages,
        stages_flop=sum(counted) if len(counted) == len(stages) else None,
    )


def _existing_folder(output: Place) -> Path | None:
    """Return the nearest directory that exists; ``None`` for an object store, which has no end."""
    if not isinstance(output, Path):
        return None
    return next((folder for folder in (output, *output.parents) if folder.exists()), None)


def matrix_product_rate(cpus: float) -> float:
    """Measure FLOP/s of a matrix product in this process."""
    use_threads(cpus)
    cuda = torch.cuda.is_available()
    size, kind = (4096, torch.bfloat16) if cuda else (768, torch.float32)
    matrix = torch.randn(size, size, dtype=kind, device="cuda" if cuda else "cpu")
    count, began = 0, 0.0
    for count in range(-3, 20):
        if count == 0:  # the first few warm up
            began = _now(cuda)
        matrix @ matrix  # 2 size³ FLOP
    return (count + 1) * 2 * size**3 / (_now(cuda) - began)


def _now(cuda: bool) -> float:
    if cuda:  # products are queued there, and run after the call has returned
        torch.cuda.synchronize()
    return time.perf_counter()


def _flop(run: RunConfig, plan: Plan, steps: int) -> float:
    """Estimate the floating-point operations of a run.

    A frozen parameter takes two per position forward and two backward to the inputs. A trained one
    takes two more, for its own gradient. In the alignment no receiver is read; with
    ``receivers_per_step: one`` a step reads one of them.
    """
    frozen = sum(receiver.multiplied for receiver in plan.receivers)
    trainable = plan.trainable_parameters
    reading_steps = max(0, steps - run.training.alignment_steps)
    share = 1 / len(plan.receivers) if run.training.receivers_per_step == "one" else 1
    # A row is a message and its prompt; where batches are filled by positions, a step has so many.
    row_positions = run.encoder.latent_len + PROMPT_POSITIONS
    positions = run.training.positions_per_batch or run.training.rows_per_batch * row_positions
    training = positions * (reading_steps * share * 4 * frozen + steps * 6 * trainable)
    evaluations = steps // run.training.evaluate_every + 1  # one more at the end
    evaluated = run.data.dev_samples * (row_positions + run.evaluation.max_answer_tokens)
    # Every row is read twice: to be answered, and with its gold answer.
    return float(training + evaluations * evaluated * 2 * (2 * frozen + trainable))


def _files(sweep: ResolvedSweep) -> tuple[list[str], int, int | None]:
    """Describe all shards and teachers' columns.

    Returns a line for each, the bytes of columns to be made, and the training rows where they are
    known.
    """
    lines: dict[str, None] = {}  # variants share some of their files
    missing_bytes, rows = 0, sweep.longest.data.samples or None
    counted: set[str] = set()
    for variant in sweep.variants:
        run, train = sweep.taught(variant), variant.shards["train"]
        for path in variant.shards.values():
            lines[f"shards {path.name}: {_state(shards.complete(path))}"] = None
        train_manifest = shards.read_manifest(train) if shards.complete(train) else None
        if train_manifest is not None and variant.is_last:
            rows = train_manifest["rows"]
        if not teachers.needed(run.losses):
            continue
        row_bytes = {receiver.name: _column_bytes(run, receiver) for receiver in run.receivers}
        to_make = 0
        if train_manifest is None:  # the columns' names hang on the shards, so they have none yet
            to_make = (rows or 0) * sum(row_bytes.values())
            line = f"teachers' columns for {train.name}: to be made, {len(row_bytes)} receivers"
            lines[line] = None
        else:
            files = train_manifest["files"]
            for name, path in teachers.paths(run, train).items():
                missing = sum(not (path / file).exists() for file in files)
                lines[f"teacher {name} {path.name}: {_state(not missing)}"] = None
                # Files of shards are about alike in rows.
                row_share = train_manifest["rows"] * missing / max(1, len(files))
                to_make += math.ceil(row_share * row_bytes[name])
            for path in teachers.readers(run, train).values():
                lines[f"text reader {path.name}: {_state(is_reader(path))}"] = None
        # Stages that share their columns need them once.
        if variant.key not in counted:
            missing_bytes += to_make
        counted.add(variant.key)
    return list(lines), missing_bytes, rows


def _state(complete: bool) -> str:
    return "there" if complete else "to be made"


def _column_bytes(run: RunConfig, receiver: ReceiverConfig) -> int:
    """Return the bytes of one row's columns for one receiver, uncompressed."""
    losses, width = run.losses, load_hf_config(receiver).get_text_config().hidden_size
    # Per token an id (int32) and a log-probability (fp16) for each of the top k, and one fp16 tail.
    words = losses.kd_top_k * 6 + 2 if teachers.compares_top_k(losses) else 0
    # The hidden states of every chosen depth, fp16.
    states = 2 * width * len(state_depths(losses))
    return teachers.most_tokens(losses) * (words + states)


def show(
    space: SweepConfig | ResolvedSweep, plan: Plan, output: Place, rate: float | None = None
) -> Plan:
    """Print plan and forecast, and return the plan that fits the cluster's nodes. Needs Ray.

    ``rate``: FLOP/s of a worker, where it was measured. Raises
    :class:`~latentwire.planning.planner.PlanError` for what cannot fit.
    """
    plan, hosts = fit(plan, [*living_nodes(), *addable_nodes()])
    lines = forecast(space, plan, output).lines(plan, rate)
    print("\n".join([str(plan), *hosts, *lines]), flush=True)
    return plan
