"""A search space with all that follows from it, derived once and passed on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from latentwire.config import RunConfig, SweepConfig
from latentwire.data.shards import SPLITS, ShardSplit, shard_path
from latentwire.planning.variants import (
    data_variants,
    largest_run,
    longest_run,
    variant_key,
)
from latentwire.storage import Place


@dataclass(frozen=True)
class DataVariant:
    """One combination of the searched knobs that shards and teachers' columns depend on."""

    run: RunConfig
    key: str
    """Name among the variants, by :func:`~latentwire.planning.variants.variant_key`."""
    shards: dict[ShardSplit, Place]
    """Directory of each split's shards, which may not be made yet."""


@dataclass(frozen=True)
class ResolvedSweep:
    """A search space and what follows from it, each derived at first use and then kept.

    Only the variants load tokenizers, which name the shards.
    """

    space: SweepConfig

    @cached_property
    def objectives(self) -> dict[str, str]:
        """Metric → ``max`` or ``min``; the metric that the scheduler compares by comes first."""
        return objectives(self.space)

    @cached_property
    def largest(self) -> RunConfig:
        """The run that costs most: an upper bound of any trial's memory."""
        return largest_run(self.space)

    @cached_property
    def longest(self) -> RunConfig:
        """The run with the most optimiser steps."""
        return longest_run(self.space)

    @cached_property
    def variants(self) -> tuple[DataVariant, ...]:
        """Every combination of files that a trial can need.

        Raises as :func:`~latentwire.planning.variants.data_variants`.
        """
        return tuple(
            DataVariant(run, variant_key(run), {split: shard_path(run, split) for split in SPLITS})
            for run in data_variants(self.space)
        )


def resolve(space: SweepConfig | ResolvedSweep) -> ResolvedSweep:
    """Resolve a space; one that is resolved already is returned as it is."""
    return space if isinstance(space, ResolvedSweep) else ResolvedSweep(space)


def objectives(space: SweepConfig) -> dict[str, str]:
    """Return metric → ``max`` or ``min``; the metric that the scheduler compares by comes first."""
    return {space.tune.metric: space.tune.mode, **space.tune.objectives}
