"""The stages of a run before anything is trained: whether each can begin, and what those of a sweep take."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from latentwire import exports
from latentwire.config import CategoricalDimension, RunConfig, SweepConfig
from latentwire.config.knobs import parted
from latentwire.config.resolve import ConfigError, Stage, stages_of, with_values
from latentwire.config.stages import STAGES
from latentwire.data import shards, streams
from latentwire.data.positions import units_of
from latentwire.data.stages import is_there, placed
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.planning.planner import on_meta
from latentwire.planning.resolved import ResolvedSweep
from latentwire.planning.variants import total_steps
from latentwire.storage import Place, local, place

COMBINATIONS = 256
"""Most combinations of searched choices under which the stages of a sweep are looked for one by one."""


def check_start(run: RunConfig) -> None:
    """Raise where a run could not begin with the wire that it names, or a stage with that of the one before.

    Raises :class:`~latentwire.exports.CheckpointError` for a ``training.init_from`` that is broken,
    and :class:`~latentwire.config.resolve.ConfigError` for stages whose wires differ in shape.
    """
    if run.training.init_from is not None:
        with local(place(run.training.init_from)) as start:
            exports.read_manifest(start)
    if not run.stages:
        return
    stages = stages_of(run)
    wires = [_shapes(stage.run) for stage in stages]
    for number, (before, after) in enumerate(itertools.pairwise(wires)):
        _check_same(before, after, stages[number], stages[number + 1])


Shapes = Mapping[str, Mapping[str, torch.Size]]
"""File of an export → name of each tensor in it → its shape."""


def _shapes(run: RunConfig) -> Shapes:
    """Return the shapes of a wire's parts; no weight is loaded."""
    wire: Any = SimpleNamespace(interlingua=on_meta(run))
    shapes: dict[str, dict[str, torch.Size]] = {}
    # A backbone that is not trained is never saved: an export has its hash alone.
    for file, module in exports.parts(wire).items():
        fixed: Any = module.frozen_parameters() if isinstance(module, InterlinguaEncoder) else ()
        tensors = module.state_dict().items()
        shapes[file] = {name: tensor.shape for name, tensor in tensors if name not in fixed}
    return shapes


def _check_same(before: Shapes, after: Shapes, one: Stage, other: Stage) -> None:
    """Raise where the parts that both stages have differ, or where they have none in common."""
    first, second = f"stage {one.name}", f"stage {other.name}"
    of_shapes = ("encoder.", "features.", "prompt.")
    suspects = []
    for stage in (one, other):
        for path in stage.config.values:
            if path.startswith(of_shapes):
                suspects.append(f"{STAGES}.{stage.name}.{path}")
    remedy = f"set for all of them, under run, what decides it ({', '.join(suspects)})"
    common = [file for file in after if file in before]
    if not common:
        raise ConfigError(
            f"a stage begins with parts of the wire of the one before, {first} leaves {', '.join(before)} and {second} has "
            f"{', '.join(after)}; {remedy}"
        )
    for file in common:
        for name in sorted(before[file].keys() | after[file].keys()):
            sizes = [shapes[file].get(name) for shapes in (before, after)]
            if sizes[0] != sizes[1]:
                has = ["none" if size is None else " × ".join(map(str, size)) for size in sizes]
                raise ConfigError(
                    f"all stages of a run have a wire of one shape, {name} of {file} is {has[0]} in {first} and {has[1]} in "
                    f"{second}; {remedy}"
                )


@dataclass(frozen=True)
class StageForecast:
    """An earlier stage of the trials of a sweep."""

    name: str
    count: int
    """Different ones that trials can need; each is trained once."""
    exact: bool
    """False where the space has more of them than are looked for one by one; ``count`` is the most then."""
    there: int
    """How many of them are there."""
    run: RunConfig
    """The one with the most optimiser steps."""
    steps: int | None
    """Its steps; ``None``: the rows are not counted before shards are made."""

    @property
    def missing(self) -> int:
        """How many are to be made, at most."""
        return self.count - self.there

    def line(self) -> str:
        """Describe it for the terminal."""
        number = f"{'' if self.exact else 'at most '}{self.count}"
        steps = "" if self.steps is None else f", at most {self.steps:,} steps each"
        return f"stage {self.name}: {number} for all trials together, {self.there} there{steps}"


def forecast_stages(sweep: ResolvedSweep, runs: int) -> tuple[StageForecast, ...]:
    """Forecast the earlier stages of all trials; none where runs have no stages.

    Args:
        sweep: the search.
        runs: trials, and the finalists' re-runs.
    """
    space = sweep.space
    names = list(space.run.stages)[:-1]
    forecasts = []
    for number, name in enumerate(names):
        paths = _paths(space, number)
        # Trials that agree in a stage share it: one for each directory, at most one for each run.
        count = runs if paths is None else min(runs, len(paths))
        # Re-runs have seeds that no trial drew, and with them stages of their own.
        if paths is not None and space.tune.finalists and not _sets_seed(space, number):
            count = min(runs, count + space.tune.finalists * space.tune.final_seeds)
        there = sum(map(is_there, paths or ()))
        run, exact = sweep.longest_stages[number], paths is not None
        forecasts.append(StageForecast(name, count, exact, min(there, count), run, _steps(run)))
    return tuple(forecasts)


def _paths(space: SweepConfig, number: int) -> set[Place] | None:
    """Return the directories of one stage that trials can need; ``None`` where they are too many to be named."""
    names = list(space.run.stages)[: number + 1]
    choices: dict[str, list[Any]] = {}
    for path, dim in space.search.items():
        stage, knob = parted(path)
        given = [knob in space.run.stages[name].values for name in names]
        # A dimension of a later stage, or one that all stages up to here set themselves.
        if stage not in (None, *names) or (stage is None and all(given)):
            continue
        if not isinstance(dim, CategoricalDimension):  # as many directories as trials
            return None
        choices[path] = list(dim.choices)
        if dim.when:  # a trial may go without it
            choices[path].append(LEFT_OUT)
    combinations = itertools.product(*choices.values())
    paths = set()
    for count, drawn in enumerate(combinations):
        if count == COMBINATIONS:
            return None
        values = {path: v for path, v in zip(choices, drawn, strict=True) if v is not LEFT_OUT}
        if _can_be(space, values, choices):
            stage_path = placed(with_values(space.run, values))[number].path
            assert stage_path is not None
            paths.add(stage_path)
    return paths


LEFT_OUT = object()
"""Stands for no value of a dimension under a condition."""


def _can_be(space: SweepConfig, values: Mapping[str, Any], named: Collection[str]) -> bool:
    """Return whether a trial can draw these values of the ``named`` dimensions, whatever the others are."""
    for path in named:
        when = space.search[path].when
        known = [values.get(other) in choices for other, choices in when.items() if other in named]
        must_be_drawn = all(known) and len(known) == len(when)
        # Drawn though a condition fails, or left out though all conditions are met. A condition on a
        # dimension that is not named may go either way.
        if (path in values and not all(known)) or (path not in values and must_be_drawn):
            return False
    return True


def _sets_seed(space: SweepConfig, number: int) -> bool:
    """Return whether the stages up to one have seeds of their own, which fresh seeds leave alone."""
    stages = list(space.run.stages.values())[: number + 1]
    return all("training.seed" in stage.values for stage in stages)


def _steps(run: RunConfig) -> int | None:
    """Return the optimiser steps of a stage, where its rows are counted."""
    train = shards.shard_path(run, "train")
    there = shards.complete(train)
    if run.training.positions_per_batch is not None:
        units = units_of(run, train) if there else None
        return None if units is None else streams.packed_steps(run.training, units)
    rows = shards.read_manifest(train)["rows"] if there else run.data.samples
    return total_steps(run, rows) if rows else run.training.max_steps
