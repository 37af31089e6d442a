"""A search space with all that follows from it, derived once and passed on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from latentwire.config import RunConfig, SweepConfig
from latentwire.config.knobs import paths_with
from latentwire.config.resolve import stages_of
from latentwire.data import teachers
from latentwire.data.shards import SPLITS, ShardSplit, shard_paths
from latentwire.planning.variants import (
    data_variants,
    largest_run,
    longest_run,
    variant_key,
)
from latentwire.storage import Place

TRAINING_SPLITS: tuple[ShardSplit, ...] = ("train", "dev")
"""Splits that every stage reads."""


@dataclass(frozen=True)
class DataVariant:
    """One stage under one combination of the searched knobs that shards and teachers' columns depend on."""

    run: RunConfig
    key: str
    """Name among the variants, by :func:`~latentwire.planning.variants.variant_key`."""
    shards: dict[ShardSplit, Place]
    """Directory of each split's shards, which may not be made yet; validation rows are for last stages alone."""
    stage: int = 0
    """Number of the stage."""

    @property
    def is_last(self) -> bool:
        """True for a last stage, by whose scores trials are compared."""
        return "validation" in self.shards


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
        """The run that costs most, in its last stage: an upper bound of any trial's memory there."""
        return self.largest_stages[-1]

    @cached_property
    def largest_stages(self) -> tuple[RunConfig, ...]:
        """Each stage of the run that costs most."""
        return tuple(stage.run for stage in stages_of(largest_run(self.space)))

    @cached_property
    def longest(self) -> RunConfig:
        """The run with the most optimiser steps, in its last stage."""
        return self.longest_stages[-1]

    @cached_property
    def longest_stages(self) -> tuple[RunConfig, ...]:
        """Each stage of the run with the most optimiser steps."""
        return tuple(stage.run for stage in stages_of(longest_run(self.space)))

    @cached_property
    def variants(self) -> tuple[DataVariant, ...]:
        """Every combination of files that a trial can need, for each of its stages.

        Raises as :func:`~latentwire.planning.variants.data_variants`.
        """
        variants = []
        for run in data_variants(self.space):
            stages = stages_of(run)
            for number, stage in enumerate(stages):
                # Trials are compared by their last stage, so only that one is ever validated.
                splits = SPLITS if number + 1 == len(stages) else TRAINING_SPLITS
                paths = shard_paths(stage.run, splits)
                variants.append(DataVariant(stage.run, variant_key(stage.run), paths, number))
        return tuple(variants)

    def taught(self, variant: DataVariant) -> RunConfig:
        """Return a variant's run with the teachers' terms of all variants that share its columns.

        Stages may weigh these terms differently, and read teachers at more or fewer tokens. Their
        files have one key, so the columns must hold what the largest of them reads.
        """
        losses = [other.run.losses for other in self.variants if other.key == variant.key]
        with_teachers = [each for each in losses if teachers.needed(each)]
        if len(with_teachers) < 2 or not teachers.needed(variant.run.losses):
            return variant.run
        largest: dict[str, Any] = {}
        for path in paths_with("teachers", "size"):
            name = path.removeprefix("losses.")
            largest[name] = max(getattr(each, name) for each in with_teachers)
        # K is k times the largest factor of its schedule: it stands alone here.
        largest["k"] = max(map(teachers.most_tokens, with_teachers))
        schedules = variant.run.losses.schedules.items()
        largest["schedules"] = {name: schedule for name, schedule in schedules if name != "k"}
        shared = variant.run.losses.model_copy(update=largest)
        return variant.run.model_copy(update={"losses": shared})


def resolve(space: SweepConfig | ResolvedSweep) -> ResolvedSweep:
    """Resolve a space; one that is resolved already is returned as it is."""
    return space if isinstance(space, ResolvedSweep) else ResolvedSweep(space)


def objectives(space: SweepConfig) -> dict[str, str]:
    """Return metric → ``max`` or ``min``; the metric that the scheduler compares by comes first."""
    return {space.tune.metric: space.tune.mode, **space.tune.objectives}
