"""What a sweep varies, and how it searches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from latentwire.config.run import RunConfig
from latentwire.config.section import Section


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
