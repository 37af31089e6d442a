"""What a sweep will take, and whether this cluster can give it, before anything long starts."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from latentwire.config import RunConfig, SpaceFile
from latentwire.data import pipeline, shards, teachers
from latentwire.features import registry
from latentwire.models.interlingua import Interlingua, ReceiverShape
from latentwire.models.lm import load_hf_config, pick_device, pick_dtype
from latentwire.storage import Place, local, place
from latentwire.training import checkpoints
from latentwire.tuning.autoscaler import cluster_resources
from latentwire.tuning.space import largest_run

WORKER_BASE_BYTES = 700e6
"""Resident memory of a Train worker that has imported torch, transformers and Ray, measured at about 0.65 GB."""

WORDS_PER_ACTIVATION = 18
"""Numbers kept per position, layer and unit of width for a backward pass to the inputs (attention and gated MLP)."""


class PlanError(RuntimeError):
    """A sweep that this cluster cannot hold; the message quotes what is needed and what is there."""


@dataclass(frozen=True)
class ReceiverEstimate:
    """Size of one frozen receiver, from its configuration alone."""

    name: str
    parameters: int
    bytes_weights: int
    bytes_step: int
    """Activations of one training step, and the logits."""


@dataclass(frozen=True)
class Plan:
    """Resources of one trial and of the sweep."""

    receivers: tuple[ReceiverEstimate, ...]
    trainable_parameters: int
    bytes_per_worker: int
    cpus_per_worker: float
    gpus_per_worker: float
    num_workers: int
    max_concurrent_trials: int

    def __str__(self) -> str:
        lines = [
            f"receiver {r.name}: {r.parameters / 1e6:,.1f} M parameters, {r.bytes_weights / 1e9:.2f} GB frozen, "
            f"about {r.bytes_step / 1e9:.2f} GB for a step"
            for r in self.receivers
        ]
        lines.append(
            f"one trial: {self.trainable_parameters / 1e6:.2f} M trainable parameters at most, {self.num_workers} worker(s) "
            f"of {self.cpus_per_worker:g} CPU, {self.gpus_per_worker:g} GPU, about {self.bytes_per_worker / 1e9:.2f} GB"
        )
        lines.append(f"trials at once: {self.max_concurrent_trials}")
        return "\n".join(lines)


def plan(space: SpaceFile, resources: dict[str, float], memory_bytes: float) -> Plan:
    """Estimate a trial and count how many fit at once.

    ``resources``: Ray's cluster resources; ``memory_bytes``: what one node can give to workers on the CPU, or one GPU
    where workers use GPUs. Raises :class:`PlanError` where not even one trial fits, and
    :class:`~latentwire.models.weights.ReceiverError` for receivers whose configuration cannot be had, and
    :class:`~latentwire.training.checkpoints.CheckpointError` for an ``init_from`` that is not whole.
    """
    run = largest_run(space)
    training = run.training
    gpus, gpus_per_worker = resources.get("GPU", 0.0), gpus_each(run, resources)
    if training.init_from is not None:
        with local(place(training.init_from)) as start:
            checkpoints.read_manifest(start)
    if training.batch_size % training.num_workers:
        raise PlanError(
            f"batch_size must be a multiple of num_workers, got {training.batch_size} and {training.num_workers}"
        )
    receivers = tuple(_estimate(run, index, gpus_per_worker > 0) for index in range(len(run.receivers)))
    trainable = _trainable(run)
    steps = [r.bytes_step for r in receivers]
    step = max(steps) if training.sequential_models else sum(steps)
    needed = sum(r.bytes_weights for r in receivers) + step + 16 * trainable + WORKER_BASE_BYTES
    reading = 0.0 if run.data.in_memory else run.data.stream_cpus  # or the trials' workers would starve what feeds them
    fits = [
        _share("CPUs", resources.get("CPU", 0.0), training.cpus_per_worker * training.num_workers + reading),
        _share("GPUs", gpus, gpus_per_worker * training.num_workers),
        *(
            _share(name, resources.get(name, 0.0), amount * training.num_workers)
            for name, amount in training.worker_resources.items()
        ),
    ]
    if needed > memory_bytes:
        where = "GPU" if gpus_per_worker else "node"
        raise PlanError(
            f"one worker needs about {needed / 1e9:.1f} GB and the {where} has {memory_bytes / 1e9:.1f} GB: lower "
            f"training.batch_size (now {training.batch_size}), set training.sequential_models, receivers' dtype bfloat16, "
            f"or use smaller receivers"
        )
    if not gpus_per_worker:
        fits.append(max(1, int(memory_bytes / needed)) / training.num_workers)
    limit = space.tune.max_concurrent_trials or math.inf
    return Plan(
        receivers=receivers,
        trainable_parameters=trainable,
        bytes_per_worker=int(needed),
        cpus_per_worker=training.cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        num_workers=training.num_workers,
        max_concurrent_trials=int(max(1, min(*fits, limit, space.tune.trials))),
    )


def plan_on_cluster(space: SpaceFile) -> Plan:
    """:func:`plan` for the cluster that Ray is connected to."""
    resources = cluster_resources()
    return plan(space, resources, node_memory(gpus_each(space.run, resources)))


def gpus_each(run: RunConfig, resources: dict[str, float]) -> float:
    """GPUs that one worker of a run asks this cluster for."""
    wanted = run.training.gpus_per_worker
    return wanted if wanted is not None else (1.0 if resources.get("GPU") else 0.0)


def on_cuda() -> bool:
    """Whether this process has a CUDA device."""
    return torch.cuda.is_available()


def local_shards(
    run: RunConfig, splits: tuple[shards.ShardSplit, ...] = shards.SPLITS
) -> dict[shards.ShardSplit, Place]:
    """Shards of a run that trains in this process, and with them the teachers' columns.

    Ray is started only where some are missing, and stopped again.
    """
    paths = {split: shards.shard_path(run, split) for split in splits}
    complete = all(shards.complete(path) for path in paths.values())
    if complete and ("train" not in paths or teachers.complete(run, paths["train"])):
        return paths
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        paths = {split: pipeline.ensure_shards(run, split) for split in splits}
        if "train" in paths:
            teachers.ensure_teachers(run, paths["train"], gpus_each(run, cluster_resources()))
        return paths
    finally:
        ray.shutdown()


def node_memory(gpus_per_worker: float | None = None) -> float:
    """Bytes that workers may use on this node: a GPU's memory where there is one, else nine tenths of what is free.

    Where workers use GPUs and this node has none, theirs is not known before they start: infinite.
    """
    if gpus_per_worker != 0 and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    if gpus_per_worker:
        return math.inf
    return 0.9 * min(psutil.virtual_memory().available, _cgroup_limit())


def _cgroup_limit() -> float:
    """The container's memory limit in bytes; infinite where none is set."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(file) as stream:
            return float(stream.read())
    return math.inf


def _share(what: str, have: float, need: float) -> float:
    if need <= 0:
        return math.inf
    if have < need:
        raise PlanError(
            f"one trial needs {need:g} {what} and the cluster has {have:g}: lower training.num_workers, cpus_per_worker, "
            f"gpus_per_worker or data.stream_cpus, or add nodes"
        )
    return have // need


def _estimate(run: RunConfig, index: int, on_gpu: bool) -> ReceiverEstimate:
    receiver = run.receivers[index]
    config = load_hf_config(receiver)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    device = torch.device("cuda") if on_gpu else pick_device(receiver.device)
    width_bytes = torch.empty((), dtype=pick_dtype(receiver.dtype, device)).element_size()
    text: Any = config.get_text_config()
    rows = run.training.batch_size // run.training.num_workers
    positions = rows * (run.encoder.latent_len + 64)  # template, question and answer beside the slots
    activations = positions * text.num_hidden_layers * text.hidden_size * WORDS_PER_ACTIVATION * width_bytes
    logits = rows * 8 * text.vocab_size * (width_bytes + 8)  # 8 supervised tokens; loss and gradient in fp32
    return ReceiverEstimate(receiver.name, parameters, parameters * width_bytes, activations + logits)


def _trainable(run: RunConfig) -> int:
    """Parameters that training changes, counted without loading any weight."""
    with torch.device("meta"):
        shapes = {}
        for receiver in run.receivers:
            config = load_hf_config(receiver)
            lm = AutoModelForCausalLM.from_config(config)
            shapes[receiver.name] = ReceiverShape(config.get_text_config().hidden_size, 1.0, lm)
        interlingua = Interlingua(run, shapes, registry.build, load_weights=False)
        interlingua.train_only(run.training.train_only)
    return sum(p.numel() for p in interlingua.parameters() if p.requires_grad)
