"""Optuna's samplers by name, with our defaults and the user's options."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna import samplers
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from latentwire.config import CategoricalDimension, Dimension, FloatDimension, SweepConfig
from latentwire.config.resolve import ConfigError


class Grid(samplers.GridSampler):
    """A grid sampler that visits every combination once, in an order that the seed decides."""

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Do nothing: Tune ends the sweep, and the original would stop a loop that is not there."""


CLASSES: dict[str, type[samplers.BaseSampler]] = {
    "tpe": samplers.TPESampler,
    "gp": samplers.GPSampler,
    "cmaes": samplers.CmaEsSampler,
    "nsgaii": samplers.NSGAIISampler,
    "nsgaiii": samplers.NSGAIIISampler,
    "qmc": samplers.QMCSampler,
    "random": samplers.RandomSampler,
    "grid": Grid,
}

OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "tpe": {"multivariate": True, "group": True, "n_startup_trials": 5},
    "gp": {"n_startup_trials": 5, "warn_independent_sampling": False},
    "cmaes": {"warn_independent_sampling": False},
    "qmc": {"warn_independent_sampling": False},
}

ONE_OBJECTIVE = ("cmaes",)


def make_sampler(space: SweepConfig, number: int = 0) -> samplers.BaseSampler:
    """Return the sampler that ``tune.sampler`` names, for the study's trial ``number``.

    All that it draws depends on the seed, that number and the study, so that a sweep in pieces
    draws what it would draw in one. Raises :class:`~latentwire.config.resolve.ConfigError` for
    options that the class does not take, and for spaces or objectives that it cannot search.
    """
    name, options = space.tune.sampler.name, space.tune.sampler.options
    if name in ONE_OBJECTIVE and space.tune.objectives:
        raise ConfigError(
            f"sampler {name} takes one objective, got {1 + len(space.tune.objectives)}; try nsgaii or tpe"
        )
    parameters = inspect.signature(CLASSES[name].__init__).parameters
    # The seed is tune.seed's, and a grid's space the configuration's.
    known = [option for option in parameters if option not in ("self", "seed", "search_space")]
    for option in options:
        if option not in known:
            hint = f"it takes {', '.join(known) or 'none'}"
            if close := difflib.get_close_matches(option, known, n=1):
                hint = f"did you mean {close[0]}?"
            raise ConfigError(
                f"unknown option {option} of sampler {name} (tune.sampler.options); {hint}"
            )
    # Seeds under two values of tune.seed do not meet within a million trials.
    seed = space.tune.seed * 1_000_003 + number
    # These have one sequence for the whole study, which they walk by the trials' numbers.
    if name in ("grid", "qmc"):
        seed = space.tune.seed
    arguments = OWN_DEFAULTS.get(name, {}) | options | {"seed": seed}
    if name == "grid":
        arguments["search_space"] = grid(space)
    try:
        return CLASSES[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sampler {name} refuses its options {options}: {error}") from error


def grid(space: SweepConfig) -> dict[str, list[Any]]:
    """Return path → values, for a space of choices and steps without conditions.

    Raises :class:`~latentwire.config.resolve.ConfigError` for other spaces, and where there are
    fewer combinations than trials: the rest would be repetitions.
    """
    values = {path: _grid_values(path, dim) for path, dim in space.search.items()}
    size = len(list(itertools.product(*values.values())))
    if size < space.tune.trials:
        raise ConfigError(
            f"sampler grid has {size} combinations here, tune.trials must be ≤ that, got {space.tune.trials}"
        )
    if space.tune.start_with:
        raise ConfigError("sampler grid visits every combination; leave tune.start_with out")
    return values


def _grid_values(path: str, dim: Dimension) -> list[Any]:
    if dim.when:
        raise ConfigError(f"sampler grid takes no conditions, got search.{path}.when")
    if isinstance(dim, CategoricalDimension):
        return list(dim.choices)
    if dim.step is None or dim.log:
        raise ConfigError(f"sampler grid needs choices or a step, without log, for search.{path}")
    # floor((high − low) / step) + 1, both ends among them: 0.3 / 0.1 is 2.9999999999999996.
    count = int(np.floor((dim.high - dim.low) / dim.step + 1e-9)) + 1
    drawn = [dim.low + number * dim.step for number in range(count)]
    return [float(value) for value in drawn] if isinstance(dim, FloatDimension) else drawn
