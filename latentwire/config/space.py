"""Search spaces: dimensions, sampler, scheduler, and all else that a sweep is told."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from latentwire.config.run import RunConfig
from latentwire.config.section import Address, Section, knob


def _plain(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise ValueError(
            f"a choice must be a number, a text or a switch, got {value!r}; of a section its knobs can be searched"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a choice must be finite, got {value!r}; leave it out")
    return value


Choice = Annotated[bool | int | float | str, BeforeValidator(_plain)]


class SearchedKnob(Section):
    """A knob that is searched; its kinds below say by which values."""

    when: dict[str, tuple[Choice, ...]] = Field(default_factory=dict)
    """Other searched paths and some of their choices: the dimension is drawn only in trials that have one of these in
    each. In other trials ``run:`` decides."""

    @field_validator("when", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        conditions = {}
        for path, given in value.items():
            conditions[path] = given if isinstance(given, list | tuple) else (given,)
        return conditions


class FloatDimension(SearchedKnob):
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


class IntDimension(SearchedKnob):
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


class CategoricalDimension(SearchedKnob):
    """One of a list, in the terms of ``optuna.distributions.CategoricalDistribution``."""

    type: Literal["categorical"]
    """Kind of dimension."""
    choices: tuple[Choice, ...] = Field(min_length=1)
    """The values."""


Dimension = Annotated[
    FloatDimension | IntDimension | CategoricalDimension, Field(discriminator="type")
]


class SamplerConfig(Section):
    """The sampler of Optuna that draws the trials' values."""

    name: Literal["tpe", "gp", "cmaes", "nsgaii", "nsgaiii", "qmc", "random", "grid"] = "tpe"
    """``tpe`` takes dimensions together and by condition (multivariate, group); ``grid`` visits every combination."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that sampler's class, laid over ours."""


class Limit(Section):
    """A limit that a metric of a trial must not pass."""

    max: float = Field(ge=0)
    """Largest value that counts as feasible, in the metric's unit."""


class TuneConfig(Section):
    """The search: trials, sampler, scheduler, metric, and what is kept."""

    trials: int = knob(8, ge=1, may_change=("resumed sweep",))
    """Trials in the sweep."""
    max_concurrent_trials: int | None = knob(None, ge=1, may_change=("resumed sweep",))
    """Upper limit of trials at once. ``None``: as many as the cluster's CPUs and GPUs hold."""
    receivers: Literal["auto", "own", "shared"] = "auto"
    """``own``: every trial loads the frozen receivers. ``shared``: trials ask replicas that hold them once (docs/guides/sharing.md).
    ``auto``: shared where more trials fit at once that way, and nothing stands against it."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Memory of one GPU in GB, to plan with. ``None``: that of this machine's GPU; where it has none (a head without GPUs)
    receivers are shared only if this says what its workers have."""
    replicas: int | None = Field(None, ge=1)
    """Copies of each shared receiver. ``None``: one per GPU, or one where there are none."""
    wait_minutes: float = knob(60.0, gt=0, may_change=("resumed sweep",))
    """Minutes that a sweep waits for room for its first shared receivers before it gives up. Trials
    wait as long as it takes."""
    joined_trials: int | None = Field(None, ge=1)
    """Trials whose steps one pass of a shared receiver may answer together: faster on a GPU at small batches, and as many
    times one step's activations in memory. ``None``: 4 on GPUs, 1 elsewhere."""
    sampler: SamplerConfig = SamplerConfig()
    """Draws the trials' values."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """``asha`` stops trials that lag at the rungs, ``median`` those below the median of the others' means so far; ``none``
    runs all to the end."""
    grace_steps: int = Field(200, ge=1)
    """Training steps before a trial can be stopped: ASHA's first rung."""
    reduction_factor: int = Field(3, ge=2)
    """ASHA keeps one of this many at each rung."""
    max_failures: int = knob(1, ge=0, may_change=("resumed sweep",))
    """Times that a trial whose driver or workers died for good is started again, from its last checkpoint. Waiting for room is
    no failure."""
    keep_checkpoints: int = knob(4, ge=1, may_change=("resumed sweep",))
    """Checkpoints kept of all trials together, the best by ``metric``; each running trial's last and its own best, and
    each failed one's last, are kept besides."""
    metric: str = "dev_f1"
    """Metric to search by: ``dev_f1`` (mean over receivers), ``dev_em``, ``dev_loss``, or one receiver's, ``dev_f1_<name>``."""
    mode: Literal["max", "min"] = "max"
    """``max`` where more of the metric is better, ``min`` where less is."""
    objectives: dict[str, Literal["max", "min"]] = Field(default_factory=dict)
    """Further metrics to search by, besides ``metric``, and which way, e.g. ``wire_bytes: min``. Their values are those of
    the evaluation that is best by ``metric``; the scheduler looks at ``metric`` alone."""
    constraints: dict[str, Limit] = Field(default_factory=dict)
    """Metrics that must not pass a limit, e.g. ``wire_bytes: {max: 2048}``: trials beyond it cannot win, and samplers that
    know constraints (``tpe``, ``gp``, ``nsgaii``, ``nsgaiii``) avoid them."""
    start_with: tuple[dict[str, Choice], ...] = ()
    """Values by path for the first trials; what one leaves out is drawn."""
    warm_start: Address | None = None
    """Directory or URI (or ``study.journal``) of an earlier sweep whose trials the sampler learns from, where their values lie in
    this space. They are not counted as trials of this sweep."""
    finalists: int = Field(0, ge=0)
    """Best trials that are trained again with ``final_seeds`` fresh seeds each; the best mean wins. The best of many noisy
    scores is partly luck, and luck does not come twice. 0: the best trial wins as it is."""
    final_seeds: int = Field(2, ge=1)
    """Fresh seeds for each finalist."""
    seed: int = Field(0, ge=0)
    """Seed of Optuna's sampler."""
    time_budget_minutes: float | None = knob(None, gt=0, may_change=("resumed sweep",))
    """Wall-clock limit of one command's search in minutes, finals included: then it stops as by Ctrl-C, scores nothing, and
    ``--resume`` goes on with as much time again. ``None``: none."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Experiment trackers that also get every evaluation, by Ray's callbacks (extra ``tracking``). TensorBoard's files are
    always written."""
    storage_path: Address = knob("runs", may_change=("repeated trial",))
    """Directory (local, NFS) or URI (``s3://…``, ``gs://…``) that holds the sweep's output directories."""

    @property
    def best_of(self) -> Any:
        """``max`` or ``min``, as ``mode`` says."""
        return max if self.mode == "max" else min


class SweepConfig(Section):
    """A configuration file: a shipped one, such as ``toy``, or your own, which may begin with ``extends: toy``."""

    run: RunConfig = RunConfig()
    """The configuration that all trials share."""
    search: dict[str, Dimension] = Field(default_factory=dict)
    """The dimensions: path into ``run``, e.g. ``encoder.latent_len``, to the values that trials draw."""
    tune: TuneConfig = TuneConfig()
    """The search itself."""
