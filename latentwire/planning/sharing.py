"""Sharing of frozen receivers among the trials of a sweep: whether it can be, and what it takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from latentwire.config import RunConfig, SweepConfig
from latentwire.config.knobs import knob_of, paths_with
from latentwire.config.resolve import stages_of
from latentwire.features.registry import FEATURES
from latentwire.models.senders import sender_sources
from latentwire.planning.devices import pieces, times
from latentwire.pretrained.weights import backbone_source, load_hf_config

PROMPT_POSITIONS = 64
"""Positions of template, question and answer beside the slots."""
CUDA_CONTEXT_BYTES = 600e6
"""Bytes of a process on a GPU before it holds anything."""
ENCODER_WORDS = 25
"""Numbers kept per position, layer and unit of width for the backward pass of an encoder that is
trained. Autograd held 23 for ``byte`` and 25 for a Llama of four layers."""
BYTES_PER_TOKEN = 4
"""Bytes of the sender's text per token, about."""


@dataclass(frozen=True)
class Sharing:
    """Replicas of a sweep's receivers, and what is left for its trials."""

    replicas: int
    """Replicas of each receiver."""
    bytes_per_replica: dict[str, int]
    """Receiver → weights, and the activations of its largest pass."""
    gpus_per_replica: dict[str, float]
    most_positions: int
    """Rows times positions of a pass that answers several trials; 0: every trial is answered
    alone."""
    threads: int
    """Threads of a replica without a GPU: all cores where one trial runs at a time, else the
    replicas share them."""
    bytes_per_worker: int
    gpus_per_worker: float

    def gpus_of_replicas(self, sets: int) -> list[float]:
        """Return the GPU shares of so many sets of replicas, in the order in which they begin."""
        return list(self.gpus_per_replica.values()) * sets

    def __str__(self) -> str:
        parts = []
        for name, size in self.bytes_per_replica.items():
            gpus = self.gpus_per_replica[name]
            parts.append(f"{name} {size / 1e9:.2f} GB" + (f" ({gpus:g} GPU)" if gpus else ""))
        worker_gpus = f", {self.gpus_per_worker:g} GPU" if self.gpus_per_worker else ""
        return (
            f"{self.replicas} replica(s) each of {', '.join(parts)}; a trial's worker then needs "
            f"{self.bytes_per_worker / 1e9:.2f} GB{worker_gpus}"
        )


def obstacles(space: SweepConfig) -> list[str]:
    """List the knobs of a space that need the receivers' weights in each trial's own process."""
    searched = [knob_of(path) for path in space.search]
    stages = [stage.run for stage in stages_of(space.run)]
    reasons: dict[str, None] = {}  # in order, each once
    for run in stages:
        reasons |= dict.fromkeys(_obstacles(run, searched))
    for path in paths_with("changes_receivers"):
        if path in searched:
            reasons[f"{path} is searched"] = None
            continue
        values = {functools.reduce(getattr, path.split("."), run) for run in stages}
        if len(values) > 1:
            reasons[f"{path} differs between stages"] = None
    return list(reasons)


def _obstacles(run: RunConfig, searched: Collection[str]) -> Iterator[str]:
    """Yield the reasons of one stage. ``searched``: paths of knobs."""
    for name, feature in FEATURES.items():
        varied = any(path.startswith(f"features.{name}") for path in searched)
        if feature.needs_weights and (getattr(run.features, name) is not None or varied):
            yield f"features.{name} acts on the receivers' own layers"
    if run.prefix is not None and run.prefix.layers:
        yield "prefix.layers acts on the receivers' own layers"
    if run.adapter.kind == "keys_values":
        yield "adapter.kind keys_values acts on the receivers' own layers"
    if run.losses.slot_kd_weight or "losses.slot_kd_weight" in searched:
        yield "losses.slot_kd_weight looks into the receivers' own layers"
    if run.training.log_gradient_norms:
        yield "training.log_gradient_norms takes a backward pass per term"
    for receiver in run.receivers:
        if receiver.device_map != "none":
            yield f"{receiver.name} lies on several devices"


def rows_of(run: RunConfig) -> int:
    """Count the rows that one worker of a trial has in hand at once.

    Of batches that are filled by positions these are as many as fit with messages of their full
    length, or, where questions share them, with as good as none.
    """
    training = run.training
    if training.batch_size is not None:
        return max(1, training.batch_size // _pieces(run))
    message = 0 if training.questions_together else _before_question(run, final_slots(run))
    # A micro-batch's positions over those of one row.
    return max(1, _part(run) // (message + PROMPT_POSITIONS))


def messages_of(run: RunConfig) -> int:
    """Count the messages that one worker of a trial has in hand at once: at most one for each row."""
    if run.training.batch_size is not None:
        return rows_of(run)
    return max(1, _part(run) // (_before_question(run, final_slots(run)) + PROMPT_POSITIONS))


def _pieces(run: RunConfig) -> int:
    """Count the micro-batches of all workers in a step."""
    return run.training.num_workers * run.training.accumulation


def _part(run: RunConfig) -> int:
    """Return a micro-batch's part of a batch that is filled by positions."""
    assert run.training.positions_per_batch is not None, "batches are filled by rows"
    return run.training.positions_per_batch // _pieces(run)


def _before_question(run: RunConfig, slots: int) -> int:
    return (0 if run.prefix is None else run.prefix.tokens) + slots


def final_slots(run: RunConfig) -> int:
    """Count the positions of the longest message when the coarsening is over, or of a reader's text.

    Such a text is as long as it may be, and read at the shortest stride.
    """
    encoder = run.encoder
    if run.prompt.reads == "text":  # the text itself stands in the slots
        return math.ceil(run.data.max_context_bytes / BYTES_PER_TOKEN)
    if encoder.tokens_per_latent is None:
        return encoder.latent_len + encoder.private_len
    # A message has ceil(tokens / stride) latents.
    strides = run.training.tokens_per_latent or (encoder.tokens_per_latent,)
    if encoder.pooling == "tokens":  # each token of a latent has a position at the receiver
        strides = (1,)
    return math.ceil(run.data.max_context_bytes / BYTES_PER_TOKEN / min(strides))


def slots_of(run: RunConfig) -> int:
    """Count the soft slots of the longest message of any training step."""
    if not run.training.coarsening_steps:
        return final_slots(run)
    # A run that is coarsened begins with a latent for every coarsening_from tokens.
    first = math.ceil(run.data.max_context_bytes / BYTES_PER_TOKEN / run.training.coarsening_from)
    return max(first, final_slots(run))


def positions_of(run: RunConfig, slots: int) -> int:
    """Count rows times positions that a receiver reads at once for one worker of a trial.

    ``slots``: of each message.
    """
    row = _before_question(run, slots) + PROMPT_POSITIONS
    if run.training.batch_size is not None:
        return rows_of(run) * row
    # The budget counts messages at the length that they end with, and a context is never parted
    # among workers.
    longer = messages_of(run) * max(0, slots - final_slots(run))
    return max(_part(run) + longer, row)


def encoder_bytes(run: RunConfig) -> int:
    """Estimate the bytes of the encoder's activations for one step of the longest texts."""
    encoder = run.encoder
    layers, width = encoder.layers, encoder.d_model
    by_name = {receiver.name: receiver for receiver in run.receivers}
    # Tokens of all texts that the encoder reads in one micro-batch.
    positions = messages_of(run) * run.data.max_context_bytes // BYTES_PER_TOKEN
    if encoder.kind == "senders":
        sources = sender_sources(encoder, by_name)
        configs = [load_hf_config(source).get_text_config() for source in sources]
        widths = [config.hidden_size for config in configs]
        # No layer of a sender keeps anything for a gradient. The states are held as they are,
        # normalised, and side by side.
        words = ENCODER_WORDS * max(widths) + 3 * len(encoder.depths) * sum(widths)
        if encoder.pooling == "tokens":
            words += ENCODER_WORDS * encoder.code_blocks * encoder.code_width
        if encoder.sender_heads:
            # Keys and values of all layers, then those of the chosen heads as often as states.
            words += round((1 + 3 * run.cache_share) * sum(map(_cache_words, configs)))
        return 4 * positions * words
    if encoder.pretrained:
        config = load_hf_config(backbone_source(encoder, by_name)).get_text_config()
        layers, width = encoder.model_layers or config.num_hidden_layers, config.hidden_size
    if encoder.has_memory:  # memory tokens stand behind the text, in the same pass
        positions += messages_of(run) * slots_of(run)
    return 4 * ENCODER_WORDS * positions * layers * width


def _cache_words(config: Any) -> int:
    """Return the numbers that a model's cache holds for a position, of its text configuration."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # A key and a value in every head.
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width


def share(
    space: SweepConfig,
    run: RunConfig,
    weights_and_steps: Mapping[str, tuple[int, int]],
    held: int,
    resources: Mapping[str, float],
    memory_bytes: float,
    base_bytes: float,
) -> Sharing:
    """Return the replicas that a sweep would have.

    ``run``: the largest of the space. ``weights_and_steps``: receiver → bytes of its weights, and
    of one trial's step. ``held``: bytes of a worker's encoder and adapters, their gradients and
    optimiser states. ``memory_bytes``: of a GPU where workers use GPUs, else of a node.
    ``base_bytes``: of a process that has imported everything.
    """
    gpus = resources.get("GPU", 0.0) if run.training.gpus_per_worker != 0 else 0.0
    together = space.tune.joined_trials or (4 if gpus else 1)
    context = CUDA_CONTEXT_BYTES if gpus else base_bytes
    bytes_per_replica = {}
    for name, (weights, step) in weights_and_steps.items():
        # One pass may answer the steps of several trials, and holds the activations of them all.
        bytes_per_replica[name] = int(weights + together * step + context)
    worker = int(held + encoder_bytes(run) + context)
    asked_gpus = run.training.gpus_per_worker or 1.0  # a whole GPU is for receivers of one's own

    def share_of_gpu(size: float) -> float:
        # Rounded up to thousandths: Ray counts in ten-thousandths.
        return math.ceil(1000 * size / memory_bytes) / 1000 if gpus else 0.0

    return Sharing(
        replicas=space.tune.replicas or max(1, int(gpus)),
        bytes_per_replica=bytes_per_replica,
        gpus_per_replica={name: share_of_gpu(size) for name, size in bytes_per_replica.items()},
        # Not of the longer messages that a run begins with: so many short ones would be joined.
        most_positions=together * positions_of(run, final_slots(run)) if together > 1 else 0,
        threads=psutil.cpu_count(logical=False) or 1,
        bytes_per_worker=worker,
        gpus_per_worker=asked_gpus if gpus and asked_gpus < 1 else share_of_gpu(worker),
    )


def trials_in(memory_bytes: float, sharing: Sharing) -> int:
    """Count the trials whose workers fit beside one replica of each receiver.

    ``memory_bytes``: of a GPU, or of a node without GPUs.
    """
    free = memory_bytes - sum(sharing.bytes_per_replica.values())
    return max(0, int(free / sharing.bytes_per_worker))


def at_once(
    sharing: Sharing,
    cpus: float,
    cpus_per_trial: float,
    gpus: float,
    memory_bytes: float,
    workers: int,
) -> int:
    """Count the trials of so many workers that fit at once beside the replicas."""
    room = [times(cpus, cpus_per_trial)]
    if sharing.gpus_per_worker:
        taken = sharing.gpus_of_replicas(sharing.replicas)
        room.append(pieces(gpus, sharing.gpus_per_worker, taken) // workers)
    else:
        room.append(trials_in(memory_bytes, sharing) // workers)
    return max(0, int(min(room)))
