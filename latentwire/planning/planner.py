"""Plan of a sweep: what a trial takes, and how many of them the cluster holds at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from latentwire.config import ReceiverConfig, RunConfig, SweepConfig
from latentwire.data.shards import builders
from latentwire.errors import UserError
from latentwire.features import registry
from latentwire.models.interlingua import Interlingua, ReceiverShape
from latentwire.models.senders import SenderStates
from latentwire.planning.autoscaler import cluster_resources
from latentwire.planning.devices import pieces, times
from latentwire.planning.resolved import ResolvedSweep, resolve
from latentwire.planning.sharing import (
    Sharing,
    at_once,
    encoder_bytes,
    obstacles,
    positions_of,
    rows_of,
    share,
    slots_of,
)
from latentwire.pretrained.weights import load_hf_config, pick_device, pick_dtype, skeleton

WORKER_BASE_BYTES = 700e6
"""Resident memory of a Train worker that has imported torch, transformers and Ray; measured at
about 0.65 GB."""

WORDS_PER_ACTIVATION = 18
"""Numbers kept per position, layer and unit of width for a backward pass to the inputs (attention
and gated MLP)."""


QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5625}
"""Bytes per weight; NF4's include a 32-bit scale for each 64 weights."""


class PlanError(UserError):
    """A sweep that this cluster cannot hold; the message quotes what is needed and what is had."""


@dataclass(frozen=True)
class ReceiverEstimate:
    """Size of one frozen receiver, from its configuration alone."""

    name: str
    parameters: int
    multiplied: int
    """Parameters used in matrix products at every position (without embeddings and output head)."""
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
    sharing: Sharing | None = None
    """Replicas that the trials share; ``None``: each worker holds its own receivers."""

    @property
    def worker_bytes(self) -> int:
        """Bytes of memory of one worker of a trial."""
        return self.sharing.bytes_per_worker if self.sharing else self.bytes_per_worker

    @property
    def bytes_with_replicas(self) -> int:
        """Bytes of memory of one worker of a trial and of one replica of each shared receiver."""
        replicas = self.sharing.bytes_per_replica.values() if self.sharing else ()
        return self.worker_bytes + sum(replicas)

    @property
    def worker_gpus(self) -> float:
        """Share of a GPU of one worker of a trial."""
        return self.sharing.gpus_per_worker if self.sharing else self.gpus_per_worker

    def __str__(self) -> str:
        lines = []
        for r in self.receivers:
            size = f"{r.parameters / 1e6:,.1f} M parameters, {r.bytes_weights / 1e9:.2f} GB frozen"
            lines.append(f"receiver {r.name}: {size}, about {r.bytes_step / 1e9:.2f} GB for a step")
        lines.append(
            f"one trial: {self.trainable_parameters / 1e6:.2f} M trainable parameters at most, "
            f"{self.num_workers} worker(s) of {self.cpus_per_worker:g} CPU, "
            f"{self.gpus_per_worker:g} GPU, about {self.bytes_per_worker / 1e9:.2f} GB"
        )
        shared = f"shared, {self.sharing}" if self.sharing else "own, in every worker"
        lines.append(f"trials at once: {self.max_concurrent_trials}; receivers: {shared}")
        return "\n".join(lines)


def plan(
    space: SweepConfig | ResolvedSweep,
    resources: dict[str, float],
    memory_bytes: float,
    *,
    files: bool = True,
) -> Plan:
    """Estimate a trial and count how many fit at once.

    ``space``: a configuration, or what was resolved from it. ``resources``: Ray's cluster
    resources. ``memory_bytes``: what one node can give to workers on the CPU, or one GPU where
    workers use GPUs. ``files``: whether receivers' weights and tokenizers are looked at; a plan for
    configurations alone has none.

    Raises :class:`PlanError` where not even one trial fits. Raises
    :class:`~latentwire.pretrained.weights.ReceiverError` or
    :class:`~latentwire.prompts.sequences.PromptError` for receivers that are not there, whose
    weights are not whole, or whose tokenizers cannot build a prompt.
    """
    sweep = resolve(space)
    cluster = resources, memory_bytes, files
    plans = [_plan(sweep.space, run, *cluster) for run in sweep.largest_stages]
    # A stage that cannot share comes before any that can; among alike the largest counts.
    largest = max(plans, key=lambda each: (each.sharing is None, each.bytes_with_replicas))
    if largest.sharing is None and any(each.sharing is not None for each in plans):
        # In some stage more trials fit with shared receivers; a trial goes through all with one kind.
        tune = sweep.space.tune.model_copy(update={"receivers": "own"})
        return plan(
            sweep.space.model_copy(update={"tune": tune}), resources, memory_bytes, files=files
        )
    return dataclasses.replace(
        largest,
        trainable_parameters=max(each.trainable_parameters for each in plans),
        max_concurrent_trials=min(each.max_concurrent_trials for each in plans),
    )


def _plan(
    space: SweepConfig,
    run: RunConfig,
    resources: dict[str, float],
    memory_bytes: float,
    files: bool,
) -> Plan:
    """Plan one stage of a space's trials. ``run``: the largest of them."""
    tune, training = space.tune, run.training
    gpus, gpus_per_worker = resources.get("GPU", 0.0), run.training.gpus_each(resources)
    if training.batch_size is not None and training.batch_size % training.num_workers:
        raise PlanError(
            f"batch_size must be a multiple of num_workers, got {training.batch_size} and {training.num_workers}"
        )
    receivers = estimates(run, gpus_per_worker > 0, files=files)
    if files:
        builders(run)  # raises for a tokenizer that cannot build a prompt, before shards are made
    trainable, fixed, lent = _encoder_and_adapters(run)
    # In fp32, a trained parameter has a weight, a gradient and AdamW's two moments.
    held = 16 * trainable + 4 * fixed
    steps = [r.bytes_step for r in receivers]
    by_turns = training.sequential_models or training.receivers_per_step == "one"
    step = max(steps) if by_turns else sum(steps)
    # Beside its receivers a worker holds what they lend to the encoder once, not twice.
    encoder = held - 4 * lent + encoder_bytes(run)
    needed = sum(r.bytes_weights for r in receivers) + step + encoder + WORKER_BASE_BYTES
    # Streamed rows need CPUs of their own, or the trials' workers would starve what feeds them.
    reading = 0.0 if run.data.in_memory else run.data.stream_cpus
    cpus = resources.get("CPU", 0.0), training.cpus_per_worker * training.num_workers + reading
    limit = min(tune.max_concurrent_trials or math.inf, tune.trials)
    fits = [_share("CPUs", *cpus)]
    for name, amount in training.worker_resources.items():
        fits.append(_share(name, resources.get(name, 0.0), amount * training.num_workers))
    estimate = Plan(
        receivers=receivers,
        trainable_parameters=trainable,
        bytes_per_worker=int(needed),
        cpus_per_worker=training.cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        num_workers=training.num_workers,
        max_concurrent_trials=0,
    )
    if not gpus:  # raises where workers need some
        _share("GPUs", gpus, gpus_per_worker)
    sharing = _sharing(space, run, estimate, held, resources, memory_bytes)
    beside = 0
    if sharing is not None:
        beside = at_once(sharing, *cpus, gpus, memory_bytes, training.num_workers)
    with_shared = int(min(beside, limit, *fits))
    if tune.receivers == "shared":
        if with_shared < 1:
            raise PlanError(
                f"tune.receivers: shared needs room for one trial beside the replicas, got "
                f"{memory_bytes / 1e9:.1f} GB for {sharing}; set tune.joined_trials: 1, lower "
                f"training.{training.measure.split()[0]}, or set tune.receivers: own"
            )
        return _together(estimate, sharing, with_shared)
    try:
        with_own = _own_at_once(estimate, run, gpus, memory_bytes)
    except PlanError:
        if with_shared < 1:
            raise
        with_own = 0
    with_own = int(max(1, min(*fits, with_own, limit))) if with_own else 0
    if with_shared > with_own:
        return _together(estimate, sharing, with_shared)
    return dataclasses.replace(estimate, max_concurrent_trials=with_own)


def _together(estimate: Plan, sharing: Sharing | None, trials: int) -> Plan:
    """Return the plan with so many trials at once beside replicas, which then work side by side."""
    if sharing is not None and trials > 1:
        threads = max(1, sharing.threads // len(estimate.receivers))
        sharing = dataclasses.replace(sharing, threads=threads)
    return dataclasses.replace(estimate, sharing=sharing, max_concurrent_trials=trials)


def _own_at_once(estimate: Plan, run: RunConfig, gpus: float, memory_bytes: float) -> float:
    """Count the trials that fit with receivers of their own.

    Raises :class:`PlanError` where not one does.
    """
    workers, gpus_per_worker = estimate.num_workers, estimate.gpus_per_worker
    by_gpus = _share("GPUs", gpus, gpus_per_worker * workers)
    if gpus_per_worker:
        shares = pieces(gpus, gpus_per_worker)
        by_gpus = shares // workers
        if not by_gpus:
            raise PlanError(
                f"each of a trial's {workers} worker(s) needs {gpus_per_worker:g} of one GPU, and "
                f"{gpus:g} GPUs hold {shares} of them: lower training.gpus_per_worker or "
                "num_workers"
            )
    if any(receiver.device_map != "none" for receiver in run.receivers):
        memory_bytes *= max(1, int(gpus_per_worker))  # its layers are on all of a worker's GPUs
    if estimate.bytes_per_worker > memory_bytes:
        knob, size = run.training.measure.split()
        where = "GPU" if gpus_per_worker else "node"
        raise PlanError(
            f"one worker needs about {estimate.bytes_per_worker / 1e9:.1f} GB and the {where} has "
            f"{memory_bytes / 1e9:.1f} GB: lower training.{knob} (now {size}), set training.sequential_models, receivers' dtype "
            "bfloat16, or use smaller receivers"
        )
    if gpus_per_worker:
        return by_gpus
    return max(1, int(memory_bytes / estimate.bytes_per_worker)) / workers


def _sharing(
    space: SweepConfig,
    run: RunConfig,
    estimate: Plan,
    held: int,
    resources: dict[str, float],
    memory_bytes: float,
) -> Sharing | None:
    """Return the replicas that the trials could share; ``None`` where they should not or cannot.

    ``held``: bytes of encoder and adapters, their gradients and optimiser states.
    """
    choice, against = space.tune.receivers, obstacles(space)
    if choice == "shared" and against:
        raise PlanError(
            f"tune.receivers: shared needs receivers that trials can reach from outside, but "
            f"{'; '.join(against)}: change that, or set tune.receivers: own"
        )
    if choice == "own" or against or (choice == "auto" and space.tune.trials == 1):
        return None
    if math.isinf(memory_bytes):
        if choice == "auto":
            return None
        raise PlanError(
            "tune.receivers: shared needs the memory of a GPU to plan with, and this machine has "
            "none to ask: set tune.gpu_memory_gb, or tune.receivers: own"
        )
    sizes = {r.name: (r.bytes_weights, r.bytes_step) for r in estimate.receivers}
    return share(space, run, sizes, held, resources, memory_bytes, WORKER_BASE_BYTES)


def alone(space: SweepConfig) -> SweepConfig:
    """Return the space of a run that is no trial of a sweep: no search, receivers of its own."""
    tune = space.tune.model_copy(update={"trials": 1, "receivers": "own"})
    return space.model_copy(update={"search": {}, "tune": tune})


def plan_on_cluster(space: SweepConfig | ResolvedSweep) -> Plan:
    """Plan for the cluster that Ray is connected to, as :func:`plan` does."""
    sweep, resources = resolve(space), cluster_resources()
    gpus = sweep.space.run.training.gpus_each(resources)
    gpu_memory_gb = sweep.space.tune.gpu_memory_gb
    if gpus and gpu_memory_gb is not None:
        return plan(sweep, resources, 1e9 * gpu_memory_gb)
    return plan(sweep, resources, node_memory(gpus))


def on_cuda() -> bool:
    """Return whether this process has a CUDA device."""
    return torch.cuda.is_available()


def node_memory(gpus_per_worker: float | None = None) -> float:
    """Return the bytes that workers may use on this node.

    They are a GPU's memory where there is one, else nine tenths of the free memory. Where workers
    use GPUs and this node has none, theirs is not known before they start: infinite.
    """
    if gpus_per_worker != 0 and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    if gpus_per_worker:
        return math.inf
    return 0.9 * min(psutil.virtual_memory().available, _cgroup_limit())


def _cgroup_limit() -> float:
    """Return the container's memory limit in bytes; infinite where none is set."""
    # cgroup v2, then v1. Where v2 has no limit its file says "max", which is no number.
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(file) as stream:
            return float(stream.read())
    return math.inf


def _share(what: str, have: float, need: float) -> float:
    if need <= 0:
        return math.inf
    if have < need:
        raise PlanError(
            f"one trial needs {need:g} {what} and the cluster has {have:g}: lower "
            "training.num_workers, cpus_per_worker, gpus_per_worker or data.stream_cpus, or add "
            "nodes"
        )
    return times(have, need)


def estimates(run: RunConfig, on_gpu: bool, *, files: bool) -> tuple[ReceiverEstimate, ...]:
    """Estimate a run's receivers; ``files``: whether their weights are looked at."""
    return tuple(_estimate(run, receiver, on_gpu, files) for receiver in run.receivers)


def _estimate(
    run: RunConfig, receiver: ReceiverConfig, on_gpu: bool, files: bool
) -> ReceiverEstimate:
    lm: Any = skeleton(receiver, check=files)
    parameters = sum(p.numel() for p in lm.parameters())
    device = torch.device("cuda") if on_gpu else pick_device(receiver.device)
    width_bytes = torch.empty((), dtype=pick_dtype(receiver.dtype, device)).element_size()
    text: Any = lm.config.get_text_config()
    rows, positions = rows_of(run), positions_of(run, slots_of(run))
    words = positions * text.num_hidden_layers * text.hidden_size * WORDS_PER_ACTIVATION
    activations = words * width_bytes
    # 8 supervised tokens a row; loss and gradient in fp32.
    logits = rows * 8 * text.vocab_size * (width_bytes + 8)
    # Quantisation leaves the embeddings, and an output head that is not tied to them, as they are.
    ends = lm.get_input_embeddings().weight.numel()
    if (head := lm.get_output_embeddings()) is not None and not lm.config.tie_word_embeddings:
        ends += head.weight.numel()
    multiplied = parameters - ends
    weights = ends * width_bytes
    weights += multiplied * QUANTIZED_BYTES.get(receiver.quantization, width_bytes)
    return ReceiverEstimate(
        receiver.name, parameters, multiplied, int(weights), activations + logits
    )


def _encoder_and_adapters(run: RunConfig) -> tuple[int, int, int]:
    """Count the parameters that training changes, those it leaves, and of these the receivers' own.

    The latter take no further room where a receiver is in the same process. No weight is loaded.
    """
    interlingua = on_meta(run)
    registry.check_training(interlingua.features)
    interlingua.train_only(run.training.train_only)
    trained = sum(p.numel() for p in interlingua.parameters() if p.requires_grad)
    left = sum(p.numel() for p in interlingua.parameters()) - trained
    states = getattr(interlingua.encoder, "states", None)  # a text reader has none
    return trained, left, states.lent_parameters if isinstance(states, SenderStates) else 0


def on_meta(run: RunConfig) -> Interlingua:
    """Build a run's encoder and adapters without weights."""
    with torch.device("meta"):
        shapes = {}
        for receiver in run.receivers:
            width = load_hf_config(receiver).get_text_config().hidden_size
            shapes[receiver.name] = ReceiverShape(
                width, 1.0, functools.partial(skeleton, receiver, check=False)
            )
        return Interlingua(run, shapes, registry.build, load_weights=False)
