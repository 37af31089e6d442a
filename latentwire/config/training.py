"""The optimisation loop and the evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latentwire.config.section import Address, Section, knob


class TrainingConfig(Section):
    """The optimisation loop."""

    epochs: int = knob(1, ge=1, steps="more", may_change=("resumed run",))
    """Passes over the training rows."""
    max_steps: int | None = knob(None, ge=1, steps="more", may_change=("resumed run",))
    """Optimiser steps after which training ends, whatever the epochs say. ``None``: the epochs decide."""
    batch_size: int | None = knob(32, ge=1, steps="fewer")
    """Examples per optimiser step, over all workers and micro-batches together. ``None``: ``positions_per_batch`` says how many."""
    positions_per_batch: int | None = knob(None, ge=1, steps="fewer")
    """Each optimiser step takes as many examples as fit so many positions, padding included, in place of ``batch_size``, which is
    null then: memory and time of a step hardly change with the length of texts and the number of questions. Counted is what a
    receiver reads of a batch, of several receivers the one that reads most: head, prefix and message once for all their rows
    where the receiver can read them once, and each row's question and answer, or the text that it recites or continues.
    Messages count at the length that evaluations use; teachers' texts do not count. With ``questions_together`` a context's
    rows stay together, unless they alone take more: then they are parted. A row that alone takes more is refused. An epoch
    reads every row once (docs/guides/batches.md)."""
    bucket_batches: int = Field(2, ge=1)
    """Batches that are drawn together, sorted by the length of their texts and then parted: less padding, but also
    batches that are less of a random sample. Where length tells what a text is about, many cost learning
    (docs/experiments/findings.md). 1: as drawn."""
    questions_together: bool = knob(False, shards="value")
    """Rows with one context are shuffled as one and stand in one batch, which encodes it once for all its questions: less
    work, and each message hears at once of all that was asked of it; but also fewer contexts in a batch. ``samples`` takes
    whole contexts then. It names the training shards, whose order it decides."""
    accumulation: int = knob(1, ge=1, smaller_costs_more=True)
    """Micro-batches that one step's examples are split into, one after the other: less memory, the same
    gradient of answers. What a whole message is asked for (alignment, recital, continuation) counts once in each part that it is in."""
    optimizer: Literal["adamw", "muon"] = knob("adamw", may_change=("cloned trial",))
    """``muon``: matrices are updated by Muon (arXiv 2502.16982), scaled to AdamW's steps so that rates can stay; vectors,
    gains, embeddings and queries by AdamW as ever. It learns sooner on the toy pair (docs/experiments/findings.md) and on small real
    receivers (docs/experiments/real_pair.md)."""
    encoder_lr: float = knob(1e-3, gt=0, le=1, may_change=("cloned trial",))
    """Peak learning rate of the encoder."""
    adapter_lr: float = knob(1e-3, gt=0, le=1, may_change=("cloned trial",))
    """Peak learning rate of the adapters."""
    prefix_lr: float = knob(3e-2, gt=0, le=10, may_change=("cloned trial",))
    """Peak learning rate of the constant prefix, whose entries are counted in units of the receiver's embedding RMS."""
    closed_form_lr_share: float = knob(1 / 3, gt=0, le=1, may_change=("cloned trial",))
    """Rate of the linear maps that a closed form begins (``adapter.kind: heads``), as a share of their part's: higher ones tear a
    good start apart."""
    alignment_steps: int = Field(0, ge=0)
    """Steps at the start that fit the soft prompts to the receivers' own token embeddings, averaged over as many spans
    of the text as there are latents. No receiver runs in them, so they cost little; without them a frozen receiver gives
    a random prompt next to no gradient, since it cannot read it yet. They count as steps."""
    coarsening_steps: int = Field(0, ge=0)
    """Steps after the alignment over which the message shrinks, in equal strides, from one latent for every
    ``coarsening_from`` encoder tokens to its own length. A frozen receiver reads a fine message almost as it reads text;
    what it finds there is kept while the message gets shorter, and is hard to find otherwise. 0: the message has its
    own length from the start."""
    coarsening_from: float = knob(1.0, ge=1, le=1024, smaller_costs_more=True)
    """Encoder tokens per latent where the coarsening starts (``byte``: patches). The alignment has this length too."""
    tokens_per_latent: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field((), max_length=64)
    """Each step draws one of these lengths for its messages in place of ``encoder.tokens_per_latent``, by seed and step:
    one wire whose sender chooses how short a message is. Empty: the encoder's own."""
    init_from: Address | None = knob(None, may_change=("resumed run",), calibrates=True)
    """Directory or URI of a checkpoint or export whose encoder, adapters and features a fresh run starts from: the second
    stage after a pretraining, or another receiver's wire. What it does not hold starts anew."""
    train_only: tuple[str, ...] = ()
    """Parts that are trained: receivers' names (adapter, control embeddings, parts of features) and ``encoder`` (with what
    refines its message). The others stay as ``init_from`` has them, to the last bit. Empty: all."""
    warmup_steps: int = knob(50, ge=0, may_change=("cloned trial",))
    """Steps over which the rates rise in equal strides to their peak; the first has one stride. At most half of all steps."""
    min_lr_ratio: float = knob(0.1, ge=0, le=1, may_change=("cloned trial",))
    """The last step's rates, where the cosine ends, as a share of the peak."""
    weight_decay: float = knob(0.01, ge=0, may_change=("cloned trial",))
    """Decoupled decay on matrices. Vectors, gains, embeddings and tables of vectors (queries, control vectors, positions) have
    none."""
    clip_norm: float = knob(1.0, gt=0, may_change=("cloned trial",))
    """Global gradient norm that a step is clipped to."""
    max_bad_steps: int = knob(10, ge=1, may_change=("resumed run",))
    """Steps with a loss or gradient that is not finite are skipped and counted; this many in a row end the run."""
    sequential_models: bool = knob(False, may_change=("resumed run",))
    """Forward and backward one receiver after the other: peak memory is the largest receiver's graph, not the sum."""
    logit_rows: int = knob(512, ge=1, may_change=("resumed run",))
    """Supervised tokens whose logits exist at once. More of them in a step are taken in chunks of this size, each forward
    and backward, so that a large vocabulary costs the memory of one chunk."""
    gradient_checkpointing: bool = knob(False, changes_receivers=True, may_change=("resumed run",))
    """Receivers keep one state per layer for the backward pass and compute the others again: less memory, about a
    third more time."""
    compile: bool = knob(False, changes_receivers=True, may_change=("resumed run",))
    """``torch.compile`` the receivers: faster on CUDA after minutes of compilation, not worth it on a CPU."""
    receivers_per_step: Literal["all", "one"] = knob("all", may_change=("cloned trial",))
    """``one``: each step trains through one receiver, drawn by seed and step (arXiv 2510.20535)."""
    autocast: bool = False
    """Encoder and adapters compute in bfloat16 (their weights stay fp32)."""
    log_gradient_norms: bool = knob(False, changes_receivers=True, may_change=("resumed run",))
    """Also report the norm of each loss term's gradient with respect to the latents. Costs a backward per term."""
    evaluate_every: int = knob(200, ge=1, may_change=("resumed run",))
    """Steps between evaluations; each one writes a checkpoint and reports to Tune."""
    best_by: Literal["dev_f1", "dev_loss"] | None = knob(None, may_change=("resumed run",))
    """The metric that chooses the best checkpoint of a single run (a sweep's trials: ``tune.metric``). F1 is the goal; the loss
    tells more from few development rows (docs/experiments/real_pair.md). ``None``: F1, and the loss where texts have no answers."""
    log_every: int = knob(20, ge=1, may_change=("resumed run",))
    """Steps between progress lines."""
    seed: int = knob(0, ge=0, may_change=("cloned trial",))
    """Seed of initial weights, dropout and the order of rows."""
    num_workers: int = knob(1, ge=1, may_change=("resumed run",))
    """Data-parallel workers of one run (Ray only)."""
    min_workers: int | None = knob(None, ge=1, may_change=("resumed run",))
    """Fewest workers that a run on Ray goes on with while the cluster has no room for ``num_workers``: after a node is lost, say. Each
    step has the same rows with any number of workers. ``None``: as many as ``num_workers``, or it waits."""
    cpus_per_worker: float = knob(1, gt=0, may_change=("resumed run", "repeated trial"))
    """CPUs that one worker asks Ray for; also the threads that it, or a plain command, computes with."""
    gpus_per_worker: float | None = knob(None, ge=0, may_change=("resumed run", "repeated trial"))
    """GPUs that one worker asks Ray for. ``None``: 1 where the cluster has any, else 0."""
    worker_resources: dict[str, Annotated[float, Field(gt=0)]] = knob(
        default_factory=dict, may_change=("resumed run",)
    )
    """Further resources that one worker asks Ray for, by name: a node type's own, e.g. ``{on_demand: 1}`` or
    ``{"accelerator_type:L40S": 0.001}``."""
    max_failures: int = knob(2, ge=0, may_change=("resumed run",))
    """Worker deaths that one trial survives, each time from its last checkpoint."""

    @model_validator(mode="before")
    @classmethod
    def _positions_take_the_place_of_rows(cls, given: Any) -> Any:
        """Leave the default of ``batch_size`` out where batches are filled by positions."""
        if isinstance(given, dict) and given.get("positions_per_batch") is not None:
            # A batch_size that is given beside it stays, and is refused below.
            return {"batch_size": None} | given
        return given

    @model_validator(mode="after")
    def _one_measure_of_a_batch(self) -> TrainingConfig:
        rows, positions = self.batch_size, self.positions_per_batch
        # Both, or neither.
        if (rows is None) == (positions is None):
            named = "none" if rows is None else f"{rows} and {positions}"
            raise ValueError(
                "a batch is filled either by training.batch_size or by training.positions_per_batch, got "
                f"{named}; set one of them, the other null"
            )
        return self

    @model_validator(mode="after")
    def _a_range_of_workers(self) -> TrainingConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"training.min_workers must be at most training.num_workers, got {self.min_workers} and "
                f"{self.num_workers}; set num_workers to the most that the run may have"
            )
        return self

    @property
    def fewest_workers(self) -> int:
        """Workers that a run on Ray needs to go on."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while a run lasts."""
        return self.fewest_workers < self.num_workers

    @property
    def rows_per_batch(self) -> int:
        """Rows of a batch, where ``batch_size`` says how many."""
        assert self.batch_size is not None, "batches are filled by positions"
        return self.batch_size

    @property
    def size_of_batch(self) -> str:
        """The size of a batch, in words."""
        if self.batch_size is not None:
            return f"{self.batch_size} rows"
        return f"up to {self.positions_per_batch:,} positions"

    @property
    def measure(self) -> str:
        """The knob that fills a batch, and its value."""
        if self.batch_size is not None:
            return f"batch_size {self.batch_size}"
        return f"positions_per_batch {self.positions_per_batch}"

    def gpus_each(self, resources: Mapping[str, float]) -> float:
        """GPUs that one worker asks a cluster with these resources for."""
        if self.gpus_per_worker is not None:
            return self.gpus_per_worker
        return 1.0 if resources.get("GPU") else 0.0


Rate = Annotated[float, Field(gt=0, le=10)]


class TunedTextConfig(Section):
    """Text readers that are trained for a comparison: the text gets the chance that the wire had.

    A reader is a constant prefix before the text; the receiver stays frozen. It is trained on the wire's rows, once for each
    receiver and each thing to be read, and kept beside the shards for every wire on the same rows.
    """

    tokens: int = knob(16, ge=1, le=1024, may_change=("resumed run",))
    """Vectors of the prefix."""
    layers: bool = knob(False, may_change=("resumed run",))
    """Add to their keys and values in every layer too."""
    steps: int | None = knob(None, ge=1, may_change=("resumed run",))
    """Optimiser steps of each training. ``None``: as many as the wire's. With fewer the table says so."""
    batch_size: int | None = knob(None, ge=1, may_change=("resumed run",))
    """Questions of each step. ``None``: as many as the wire's."""
    trials: int = knob(3, ge=1, le=100, may_change=("resumed run",))
    """Trainings of each reader, each with a rate that Optuna draws; the best by development loss is kept."""
    lr: tuple[Rate, Rate] = knob((1e-2, 3e-1), may_change=("resumed run",))
    """Lowest and highest rate that is drawn, on a log scale; the first is their geometric mean. See ``training.prefix_lr``."""

    @model_validator(mode="after")
    def _a_range(self) -> TunedTextConfig:
        low, high = self.lr
        if low > high:
            raise ValueError(f"tuned_text.lr must be low ≤ high, got {low}, {high}; swap them")
        return self


class EvaluationConfig(Section):
    """Free-running greedy decoding and its metrics."""

    batch_size: int = knob(64, ge=1, may_change=("resumed run",))
    """Examples decoded together."""
    max_answer_tokens: int = knob(16, ge=1, protocol=True, may_change=("resumed run",))
    """Decoding limit in tokens, the same for every example: nothing is derived from the gold answer."""
    tuned_text: TunedTextConfig | None = None
    """Train text readers for the comparison with text. ``None``: the text is read by the receivers as they are, and no
    score is a share of the text's."""

    def answer_limit(self, asked: int | None) -> int:
        """Return the longest answer in tokens: what a caller asks for, else ``max_answer_tokens``."""
        return asked or self.max_answer_tokens
