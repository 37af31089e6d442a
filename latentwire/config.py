"""Every knob of LatentWire, once.

A :class:`RunConfig` says everything about one training run; a :class:`SpaceFile` (the YAML files in
``search_spaces/``) adds what a sweep varies and how it is searched. The tree of models here is the tree of objects
that the package builds: ``run.encoder`` is what ``models/encoders.py`` reads, ``run.losses`` what ``losses/`` reads.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors; instances do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


# ---------------------------------------------------------------------------------------------------- what one run is


class ReceiverConfig(Section):
    """One frozen causal LM that reads the soft prompt."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Short name used in metrics, columns and file names, e.g. ``llama``."""
    model: str
    """Hub id, local directory (safetensors, or one holding a ``.gguf`` file), or the embedded ``toy-llama``/``toy-qwen``."""
    revision: str | None = None
    """Hub revision (branch, tag or commit). ``None``: the default branch."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How the prompt is rendered: the tokenizer's chat template, a plain ``Passage/Question`` text, or ``auto``:
    chat where the tokenizer brings a template."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Whether BOS stands at position 0. ``auto``: where the chat template, or in plain the tokenizer itself, puts it."""
    instruction: str = ""
    """Text put before the passage (in chat: at the start of the user's turn). Empty: none."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' type. ``auto``: bfloat16 on CUDA, float32 elsewhere."""
    device: str = "auto"
    """``auto`` (CUDA, then MPS, then CPU), or a torch device such as ``cuda:0``."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel that transformers uses."""
    trust_remote_code: bool = False
    """Run code that comes with the weights. Off unless asked for, per receiver."""


def default_receivers() -> tuple[ReceiverConfig, ...]:
    """The embedded pair: reads the toy task, needs no network."""
    return (ReceiverConfig(name="llama", model="toy-llama", bos="yes"), ReceiverConfig(name="qwen", model="toy-qwen"))


class DataConfig(Section):
    """What is read, and how it is split. Everything here except ``shard_dir`` names the shards."""

    dataset: str = "toy"
    """``toy``, ``squad``, ``hotpotqa``, or ``custom`` (jsonl/parquet with ``context``, ``question``, ``answers``)."""
    data_dir: str | None = None
    """Directory with ``train.*`` and ``validation.*`` (parquet in the Hub's schema, official JSON, or jsonl).
    ``None``: the Hub (``squad``, ``hotpotqa``) or the generator (``toy``)."""
    samples: int = Field(20_000, ge=0)
    """Training rows, drawn by seed after the development split is taken out. 0: all."""
    dev_samples: int = Field(256, ge=1)
    """Development rows scored at each evaluation."""
    validation_samples: int = Field(512, ge=0)
    """Rows of the untouched validation split scored once at the end. 0: all."""
    dev_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the training *documents* (articles, not rows) that make the development split."""
    seed: int = Field(0, ge=0)
    """Seed of the splits, of the draw of rows, and of the toy generator."""
    send: Literal["context", "prompt"] = "context"
    """What is compressed: the context alone (the question travels as text), or context and question."""
    max_context_bytes: int = Field(4_096, ge=16)
    """Longest sender text in UTF-8 bytes; longer rows follow ``overflow``."""
    overflow: Literal["reject", "truncate"] = "reject"
    """What happens to a longer row: into the rejects file, or cut at the end (counted)."""
    toy_people: int = Field(3, ge=1, le=4)
    """People in a toy context."""
    toy_kinds: int = Field(2, ge=1, le=4)
    """Facts about each of them."""
    shard_rows: int = Field(4_096, ge=1)
    """Rows per Parquet shard."""
    shard_dir: str = "shards"
    """Where shards live, in directories named by the hash of what made them."""


class EncoderConfig(Section):
    """Text to latents."""

    kind: Literal["byte"] = "byte"
    """Encoder family. ``byte``: from scratch, on UTF-8 bytes."""
    latent_len: int = Field(16, ge=1, le=4096)
    """Latent vectors in one message."""
    d_z: int = Field(128, ge=1, le=8192)
    """Width of one latent vector."""
    d_model: int = Field(192, ge=8, le=8192)
    """Width inside the encoder; a multiple of ``heads``."""
    layers: int = Field(3, ge=1, le=64)
    """Self-attention layers over the bytes."""
    heads: int = Field(4, ge=1, le=128)
    """Attention heads; ``d_model / heads`` must be even (rotary positions)."""
    bytes_per_patch: int = Field(8, ge=1, le=64)
    """Longest patch in bytes; a patch also ends after white space."""
    latent_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of latents' entries zeroed in training."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> EncoderConfig:
        if self.d_model % (2 * self.heads):
            raise ValueError(f"d_model must be a multiple of 2 × heads, got d_model {self.d_model}, heads {self.heads}")
        return self


class AdapterConfig(Section):
    """Latents to the soft prompt of one receiver: a 2-layer MLP with a linear skip and a learned gain."""

    hidden_multiple: float = Field(2.0, gt=0, le=64)
    """Hidden width of the MLP as a multiple of ``d_z``."""
    learned_gain: bool = True
    """Let the gain that starts at the receiver's embedding RMS be trained (clamping it hurts: 2026.acl-long.1717)."""


class PromptConfig(Section):
    """The literal text around the message."""

    anchor: str = "Answer: "
    """Text between prompt and answer. Its trailing white space is tokenised with the answer, as the LLM learned it."""


class LossConfig(Section):
    """Weights of the cross-entropy terms; all of them read the logits of one forward per receiver."""

    answer_ce_weight: float = Field(1.0, ge=0)
    """Whole answer and its stop token, mean over tokens."""
    first_k_ce_weight: float = Field(0.0, ge=0)
    """First ``k`` answer tokens, mean over tokens."""
    first_token_ce_weight: float = Field(0.0, ge=0)
    """First answer token."""
    reconstruction_ce_weight: float = Field(0.0, ge=0)
    """The message's own text, said again by the receiver from its soft prompt; mean over tokens. Dense where answers
    are short: it teaches the encoder to carry the text before questions teach it what matters (arXiv 2510.20535)."""
    k: int = Field(4, ge=1)
    """Tokens that ``first_k_ce_weight`` weighs."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossConfig:
        if not any(getattr(self, name) > 0 for name in type(self).model_fields if name.endswith("_weight")):
            raise ValueError("at least one loss weight must be > 0, got all 0")
        return self


class TrainingConfig(Section):
    """The optimisation loop."""

    epochs: int = Field(1, ge=1)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps after which training ends, whatever the epochs say. ``None``: the epochs decide."""
    batch_size: int = Field(32, ge=1)
    """Examples per optimiser step, over all workers together."""
    encoder_lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of the encoder."""
    adapter_lr: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of the adapters."""
    alignment_steps: int = Field(0, ge=0)
    """Steps at the start that fit the soft prompts to the receivers' own token embeddings, averaged over as many spans
    of the text as there are latents. No receiver runs in them, so they cost little; without them a frozen receiver gives
    a random prompt next to no gradient, since it cannot read it yet. They count as steps."""
    warmup_steps: int = Field(50, ge=0)
    """Steps over which the rates rise from 0."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled decay on matrices; vectors and gains have none."""
    clip_norm: float = Field(1.0, gt=0)
    """Global gradient norm that a step is clipped to."""
    max_bad_steps: int = Field(10, ge=1)
    """Steps with a loss or gradient that is not finite are skipped and counted; this many in a row end the run."""
    sequential_models: bool = False
    """Forward and backward one receiver after the other: peak memory is the largest receiver's graph, not the sum."""
    evaluate_every: int = Field(200, ge=1)
    """Steps between evaluations; each one writes a checkpoint and reports to Tune."""
    log_every: int = Field(20, ge=1)
    """Steps between progress lines."""
    seed: int = Field(0, ge=0)
    """Seed of initial weights, dropout and the order of rows."""
    num_workers: int = Field(1, ge=1)
    """Data-parallel workers of one run (Ray only)."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs that one worker asks Ray for; also its torch threads."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs that one worker asks Ray for. ``None``: 1 where the cluster has any, else 0."""
    max_failures: int = Field(2, ge=0)
    """Worker deaths that one trial survives, each time from its last checkpoint."""


class EvaluationConfig(Section):
    """Free-running greedy decoding and its metrics."""

    batch_size: int = Field(64, ge=1)
    """Examples decoded together."""
    max_answer_tokens: int = Field(16, ge=1)
    """Decoding limit in tokens, the same for every example: nothing is derived from the gold answer."""


class RunConfig(Section):
    """One training run."""

    receivers: tuple[ReceiverConfig, ...] = Field(default_factory=default_receivers, min_length=1)
    """The frozen LLMs, two by default."""
    data: DataConfig = DataConfig()
    """Data and splits."""
    prompt: PromptConfig = PromptConfig()
    """Literal text around the message."""
    encoder: EncoderConfig = EncoderConfig()
    """Text to latents."""
    adapter: AdapterConfig = AdapterConfig()
    """Latents to soft prompts."""
    losses: LossConfig = LossConfig()
    """Loss weights."""
    training: TrainingConfig = TrainingConfig()
    """Optimisation."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Decoding and metrics."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> RunConfig:
        names = [receiver.name for receiver in self.receivers]
        if len(set(names)) < len(names):
            raise ValueError(f"receiver names must differ, got {', '.join(names)}")
        return self


# ----------------------------------------------------------------------------------------------- what a sweep varies


class FloatDimension(Section):
    """A real number, in the terms of ``optuna.distributions.FloatDistribution``."""

    type: Literal["float"]
    """Kind of dimension."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = False
    """Search the logarithm; needs ``low`` > 0 and no ``step``."""
    step: float | None = Field(None, gt=0)
    """Grid width."""


class IntDimension(Section):
    """A whole number, in the terms of ``optuna.distributions.IntDistribution``."""

    type: Literal["int"]
    """Kind of dimension."""
    low: int
    """Smallest value."""
    high: int
    """Largest value."""
    log: bool = False
    """Search the logarithm; needs ``low`` ≥ 1 and ``step`` 1."""
    step: int = Field(1, ge=1)
    """Grid width."""


class CategoricalDimension(Section):
    """One of a list, in the terms of ``optuna.distributions.CategoricalDistribution``."""

    type: Literal["categorical"]
    """Kind of dimension."""
    choices: tuple[bool | int | float | str, ...] = Field(min_length=1)
    """The values."""


Dimension = Annotated[FloatDimension | IntDimension | CategoricalDimension, Field(discriminator="type")]


class TuneConfig(Section):
    """How the space is searched."""

    trials: int = Field(8, ge=1)
    """Trials in the sweep."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Upper limit of trials at once. ``None``: as many as the cluster's CPUs and GPUs hold."""
    scheduler: Literal["asha", "none"] = "asha"
    """``asha`` stops trials that lag at the rungs; ``none`` runs all to the end."""
    grace_steps: int = Field(200, ge=1)
    """ASHA's first rung, in training steps."""
    reduction_factor: int = Field(3, ge=2)
    """ASHA keeps one of this many at each rung."""
    metric: str = "dev_f1"
    """Metric to search by: ``dev_f1`` (mean over receivers), ``dev_em``, ``dev_loss``, or one receiver's, ``dev_f1_<name>``."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of the metric is better."""
    seed: int = Field(0, ge=0)
    """Seed of Optuna's sampler."""
    time_budget_minutes: float | None = Field(None, gt=0)
    """Wall-clock limit of the search in minutes. ``None``: none."""
    storage_path: str = "runs"
    """Directory (local, NFS) that holds the sweep's output directories."""


class SpaceFile(Section):
    """A YAML file in ``search_spaces/``."""

    run: RunConfig = RunConfig()
    """What all trials share."""
    search: dict[str, Dimension] = Field(default_factory=dict)
    """What varies: a dotted path into ``run`` to a dimension, e.g. ``encoder.latent_len``."""
    tune: TuneConfig = TuneConfig()
    """How it is searched."""
