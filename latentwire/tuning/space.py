"""A search space in Optuna's terms, and the shards that its trials will need."""

from __future__ import annotations

import itertools
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from latentwire.config import CategoricalDimension, FloatDimension, RunConfig, SpaceFile
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data.shards import SHARD_KNOBS
from latentwire.data.teachers import TEACHER_KNOBS, TEACHER_SIZES


def distributions(space: SpaceFile) -> dict[str, BaseDistribution]:
    """Dotted path → Optuna distribution."""
    table: dict[str, BaseDistribution] = {}
    for dotted, dim in space.search.items():
        if isinstance(dim, CategoricalDimension):
            table[dotted] = CategoricalDistribution(dim.choices)
        elif isinstance(dim, FloatDimension):
            table[dotted] = FloatDistribution(dim.low, dim.high, log=dim.log, step=dim.step)
        else:
            table[dotted] = IntDistribution(dim.low, dim.high, log=dim.log, step=dim.step)
    return table


def check_metric(space: SpaceFile) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` where a sweep would choose by a metric that its rows cannot give."""
    metric, mode = space.tune.metric, space.tune.mode
    if space.run.data.dataset == "text" and not (metric.startswith("dev_loss") and mode == "min"):
        raise ConfigError(
            f"tune.metric must be dev_loss and tune.mode min for dataset text, which has no answers to score; "
            f"got {metric} and {mode}"
        )


def data_variants(space: SpaceFile) -> list[RunConfig]:
    """The configurations whose shards or teachers' columns differ: every combination of searched choices of what they hang on.

    Weights of the teachers' terms, and ``k``, stand at their largest: the columns then serve every trial. Raises
    :class:`~latentwire.config.resolve.ConfigError` where such a dimension is not categorical: each of its values needs files
    of its own, so there must be a few of them, known beforehand.
    """
    varied: dict[str, tuple[Any, ...]] = {}
    for dotted, dim in space.search.items():
        if dotted.startswith((*SHARD_KNOBS, *TEACHER_KNOBS)):
            if not isinstance(dim, CategoricalDimension):
                raise ConfigError(
                    f"search.{dotted} must be categorical, got {dim.type}: each value needs files of its own"
                )
            varied[dotted] = dim.choices
    largest = {name: value for name, value in _largest(space).items() if name in TEACHER_SIZES}
    return [
        with_values(space.run, largest | dict(zip(varied, choice, strict=True)))
        for choice in itertools.product(*varied.values())
    ]


def largest_run(space: SpaceFile) -> RunConfig:
    """The shared configuration with every searched number at its upper end: what a trial may cost at most."""
    return with_values(space.run, _largest(space), "largest trial of the space")


def _largest(space: SpaceFile) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for dotted, dim in space.search.items():
        if not isinstance(dim, CategoricalDimension):
            values[dotted] = dim.high
        elif all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in dim.choices):
            values[dotted] = max(dim.choices)
    return values
