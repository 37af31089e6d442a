"""What a whole sweep will take, from its nodes to its disk: what ``--dry_run`` prints, and what refuses it."""

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

from latentwire.config import LossConfig, RunConfig, SweepConfig
from latentwire.data import shards, teachers
from latentwire.models.weights import load_hf_config
from latentwire.planning.autoscaler import addable_nodes, living_nodes
from latentwire.planning.devices import pieces, times
from latentwire.planning.planner import Plan, PlanError
from latentwire.planning.sharing import PROMPT_POSITIONS
from latentwire.planning.variants import data_variants, largest_run, longest_run, total_steps
from latentwire.storage import Place
from latentwire.threads import use_threads

BYTES_PER_PARAMETER = 12
"""Of a trained parameter in a checkpoint: the weight and AdamW's two moments, in fp32. Muon keeps one of a matrix."""
REACHED = (0.1, 0.5)
"""Share of a plain matrix product's rate that training reaches: small models the lower end, large ones the upper."""
START_SECONDS = 20.0
"""From a trial's start to its first step on two cores (12 s alone, more where several start at once)."""


def fit(plan: Plan, nodes: Iterable[Mapping[str, Any]]) -> tuple[Plan, list[str]]:
    """Return the plan with as many trials at once as the nodes really hold, and lines for the terminal.

    There is a line for every node that could host a worker, and one for how many trials could start
    now. ``nodes``: as ``living_nodes`` and ``addable_nodes`` of :mod:`latentwire.planning.autoscaler`
    give them. Raises :class:`~latentwire.planning.planner.PlanError` where the cluster has enough in
    all, but no node enough for one worker, or the nodes together not enough for one trial's.
    """
    lines, places, places_now = [], 0, 0
    living = [node for node in nodes if node["Alive"]]
    gpus = sum(node["Resources"].get("GPU", 0.0) * node.get("Count", 1) for node in living)
    for node in living:
        has = node["Resources"]
        workers = _workers_on(plan, has, gpus)
        places += workers * node.get("Count", 1)
        line = f"node {node['NodeManagerAddress']} ({_sizes(has)}): {workers} worker(s)"
        if "Free" in node:
            now = min(workers, _workers_on(plan, node["Free"], gpus))
            places_now += now
            line += f", {now} now ({_sizes(node['Free'])} free)"
        lines.append(line)
    need = f"{plan.num_workers} worker(s) of {plan.cpus_per_worker:g} CPU, {plan.worker_gpus:g} GPU"
    if places < plan.num_workers:
        raise PlanError(
            f"one trial needs {need}, {plan.worker_bytes / 1e9:.2f} GB, each on one node, and there is room for {places} "
            f"({'; '.join(lines)}): ask for less per worker, or add larger nodes"
        )
    at_once = min(plan.max_concurrent_trials, places // plan.num_workers)
    if any("Free" in node for node in living):
        started = min(at_once, places_now // plan.num_workers)
        waiting = f"; the others wait for {need} each, as long as it takes" if started < at_once else ""
        lines.append(f"trials that can start now: {started} of {at_once}{waiting}")
    return dataclasses.replace(plan, max_concurrent_trials=at_once), lines


def _workers_on(plan: Plan, has: Mapping[str, float], gpus: float) -> int:
    """Return how many workers a node holds beside its share of the replicas. ``gpus``: of all nodes."""
    room = [times(has.get("CPU", 0.0), plan.cpus_per_worker)]
    if plan.worker_gpus:
        here, taken = has.get("GPU", 0.0), []
        if plan.sharing:
            sets = min(plan.sharing.replicas, math.ceil(plan.sharing.replicas * here / max(gpus, 1.0)))
            taken = plan.sharing.gpus_of_replicas(sets)
        room.append(pieces(here, plan.worker_gpus, taken))
    else:
        replicas = sum(plan.sharing.bytes_per_replica.values()) if plan.sharing else 0
        room.append(int(min(2**62, (has.get("memory", math.inf) - replicas) // plan.worker_bytes)))
    return max(0, min(room))


def _sizes(has: Mapping[str, float]) -> str:
    return f"{has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU, {has.get('memory', 0) / 1e9:.1f} GB"


@dataclass(frozen=True)
class Forecast:
    """Size of a sweep before it starts."""

    runs: int
    """Trials, and the finalists' fresh runs."""
    files: tuple[str, ...]
    """Shards and teachers' columns: there, or to be made."""
    steps_per_run: int | None
    """At most: a scheduler stops some earlier. ``None``: the rows are not counted before shards are made."""
    flop_per_run: float | None
    """Of training and evaluation together."""
    checkpoint_bytes: int
    disk_bytes: int
    """Checkpoints kept at the busiest moment, and teachers' columns to be made."""
    free_bytes: int | None

    def lines(self, plan: Plan, rate: float | None) -> list[str]:
        """For the terminal. ``rate``: FLOP/s of a matrix product on one worker, where it was measured: then all is told."""
        each = f"{plan.num_workers} × ({plan.cpus_per_worker:g} CPU, {plan.worker_gpus:g} GPU)"
        lines = [f"runs: {self.runs}, each {each}; at once: {plan.max_concurrent_trials}"]
        if rate is not None:
            lines += self.files
        else:
            missing = sum("to be made" in file for file in self.files)
            lines.append(f"shards and teachers' columns: {missing} to be made, {len(self.files) - missing} there")
        if self.steps_per_run is None:
            lines.append("steps: known when the shards are made (data.samples is 0: all rows)")
        else:
            lines.append(f"steps: at most {self.steps_per_run:,} in a run, {self.runs * self.steps_per_run:,} in all")
        if rate is not None and self.flop_per_run is not None:
            kind = "GPU" if plan.gpus_per_worker else "CPU"
            devices = plan.num_workers * (plan.gpus_per_worker or plan.cpus_per_worker)
            low, high = (
                self.runs * devices * (self.flop_per_run / plan.num_workers / (share * rate) + START_SECONDS) / 3600
                for share in reversed(REACHED)
            )
            lines.append(
                f"{kind}-hours: {low:.2g} to {high:.2g} if none is stopped early: {self.flop_per_run / 1e12:.3g} TFLOP a run at "
                f"{REACHED[0]:.0%} to {REACHED[1]:.0%} of {rate / 1e9:,.0f} GFLOP/s (a matrix product on one worker, "
                f"just measured), and {START_SECONDS:.0f} s to start"
            )
        lines.append(
            f"disk: about {self.disk_bytes / 1e6:,.1f} MB at most (a checkpoint {self.checkpoint_bytes / 1e6:,.2f} MB), "
            + ("in an object store" if self.free_bytes is None else f"{self.free_bytes / 1e9:,.1f} GB free")
        )
        return lines


def forecast(space: SweepConfig, plan: Plan, output: Place) -> Forecast:
    """Estimate a sweep. Raises :class:`~latentwire.planning.planner.PlanError` where its checkpoints would not fit the disk."""
    tune, run = space.tune, largest_run(space)
    finals = tune.finalists * tune.final_seeds
    files, columns_bytes, rows = _files(space)
    steps = None if rows is None else total_steps(longest_run(space), rows)
    checkpoint = BYTES_PER_PARAMETER * plan.trainable_parameters
    held = tune.keep_checkpoints + finals + 2 * plan.max_concurrent_trials + 1
    where = (
        next((folder for folder in (output, *output.parents) if folder.exists()), None)
        if isinstance(output, Path)
        else None
    )
    found = Forecast(
        runs=tune.trials + finals,
        files=tuple(files),
        steps_per_run=steps,
        flop_per_run=None if rows is None else _flop(run, plan, total_steps(run, rows)),
        checkpoint_bytes=checkpoint,
        disk_bytes=held * checkpoint + columns_bytes,
        free_bytes=None if where is None else shutil.disk_usage(where).free,  # a bucket has no end
    )
    if found.free_bytes is not None and found.disk_bytes > found.free_bytes:
        raise PlanError(
            f"a sweep needs about {found.disk_bytes / 1e9:.2f} GB ({held} checkpoints of {checkpoint / 1e9:.2f} GB, teachers' "
            f"columns {columns_bytes / 1e9:.2f} GB), {where} has {found.free_bytes / 1e9:.2f} GB free: lower "
            f"tune.keep_checkpoints (now {tune.keep_checkpoints}), or set tune.storage_path"
        )
    return found


def matrix_product_rate(cpus: float) -> float:
    """Return FLOP/s of a matrix product in this process."""
    use_threads(cpus)
    cuda = torch.cuda.is_available()
    size, kind = (4096, torch.bfloat16) if cuda else (768, torch.float32)
    matrix = torch.randn(size, size, dtype=kind, device="cuda" if cuda else "cpu")
    count, began = 0, 0.0
    for count in range(-3, 20):
        if count == 0:  # the first few warm up
            began = _now(cuda)
        matrix @ matrix
    return (count + 1) * 2 * size**3 / (_now(cuda) - began)


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _flop(run: RunConfig, plan: Plan, steps: int) -> float:
    """Two per parameter and position forward, as many backward to the inputs; three times two for what is trained.

    In the alignment no receiver is read; of ``receivers_per_step: one`` a step reads one of them.
    """
    frozen = sum(receiver.multiplied for receiver in plan.receivers)
    read = max(0, steps - run.training.alignment_steps)
    share = 1 / len(plan.receivers) if run.training.receivers_per_step == "one" else 1
    positions = run.training.batch_size * (run.encoder.latent_len + PROMPT_POSITIONS)
    trained = positions * (read * share * 4 * frozen + steps * 6 * plan.trainable_parameters)
    evaluated = run.data.dev_samples * (run.encoder.latent_len + PROMPT_POSITIONS + run.evaluation.max_answer_tokens)
    evaluations = steps // run.training.evaluate_every + 1
    return float(trained + evaluations * evaluated * 2 * (2 * frozen + plan.trainable_parameters))


def _files(space: SweepConfig) -> tuple[list[str], int, int | None]:
    """A line for all shards and columns, bytes of columns to be made, and the training rows where they are known."""
    lines: dict[str, None] = {}
    missing, rows = 0, space.run.data.samples or None
    for run in data_variants(space):
        paths = {split: shards.shard_path(run, split) for split in shards.SPLITS}
        for path in paths.values():
            lines[f"shards {path.name}: {'there' if shards.complete(path) else 'to be made'}"] = None
        train = paths["train"]
        if shards.complete(train):
            rows = shards.read_manifest(train)["rows"]
        if not teachers.needed(run.losses):
            continue
        if not shards.complete(train):
            made = sum(
                _column_bytes(run.losses, load_hf_config(r).get_text_config().hidden_size) for r in run.receivers
            )
            missing += made * (rows or 0)
            lines[f"teachers' columns for {train.name}: to be made, {len(run.receivers)} receivers"] = None
        else:
            for name, path in teachers.paths(run, train).items():
                there = all((path / file).exists() for file in shards.read_manifest(train)["files"])
                lines[f"teacher {name} {path.name}: {'there' if there else 'to be made'}"] = None
    return list(lines), missing, rows


def _column_bytes(losses: LossConfig, width: int) -> int:
    """Of one row's columns for one receiver, uncompressed."""
    words = losses.kd_top_k * 6 + 2 if losses.kd_weight > 0 and losses.kd_top_k > 0 else 0
    states = 2 * width * len(losses.hidden_kd_depths) if losses.hidden_kd_weight > 0 else 0
    return teachers.most_tokens(losses) * (words + states)


def show(space: SweepConfig, plan: Plan, output: Place, rate: float | None = None) -> Plan:
    """Print plan and forecast, and return the plan that fits the cluster's nodes. Needs Ray.

    ``rate``: FLOP/s of a worker, where it was measured. Raises :class:`~latentwire.planning.planner.PlanError` for
    what cannot fit.
    """
    plan, hosts = fit(plan, [*living_nodes(), *addable_nodes()])
    print("\n".join([str(plan), *hosts, *forecast(space, plan, output).lines(plan, rate)]), flush=True)
    return plan
