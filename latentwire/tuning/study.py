"""One Optuna study in a journal file, and a search space in Optuna's terms."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from latentwire.config import CategoricalDimension, Dimension, FloatDimension
from latentwire.config.resolve import ConfigError, search_order
from latentwire.config.space import Limit
from latentwire.storage import Place, place
from latentwire.tuning.journal import JOURNAL, keep_journal, own_journal, readable

SESSION, CAUSE, EVALUATIONS, WARM = "session", "cause", "evaluations", "warm_start"
"""User attributes of the study's trials: the driver that runs it; why it failed; step → report; the
number of the earlier sweep's trial that it copies."""
RETRIES, DIRECTORY = "retries", "directory"
"""Further user attributes of a trial that retries a failed one: that one's number; the number in
the name of the directory in which it goes on."""
STOPPED = "stopped_by"
"""Further user attribute of a trial that an order ended: the order's id, who gave it, and when."""
PAUSED = "paused"
"""Further user attribute of a trial that was paused: the last order that paused it or took it up again, by id, and
``on``, whether it is paused."""
CLONE = "clone"
"""Further user attribute of a clone: the order's id, ``parent`` and its ``step``, the ``changed`` values, and ``values``,
those of the run that its parameters do not have."""
OBJECTIVES, PROTOCOL = "objectives", "evaluation_pin"
"""User attributes of the study: its objectives with their directions; the protocol hash that all of
its scores have."""
DIRECTIONS = {"max": "maximize", "min": "minimize"}
"""Mode → direction in Optuna's terms."""
__all__ = [
    "JOURNAL",
    "keep_journal",
    "own_journal",
]  # of the journal, beside the study that it holds


def distribution(dim: Dimension) -> BaseDistribution:
    """Return a dimension in Optuna's terms."""
    if isinstance(dim, CategoricalDimension):
        return CategoricalDistribution(dim.choices)
    if isinstance(dim, FloatDimension):
        return FloatDistribution(dim.low, dim.high, log=dim.log, step=dim.step)
    return IntDistribution(dim.low, dim.high, log=dim.log, step=dim.step)


def draw(trial: Trial, search: dict[str, Dimension]) -> dict[str, Any]:
    """Draw values for a trial, by path, of the dimensions whose conditions hold.

    Values that the trial has already drawn stay, so that a trial whose driver died half-way can be
    drawn to its end.
    """
    values: dict[str, Any] = {}
    for path in search_order(search):
        dim = search[path]
        if any(values.get(other) not in choices for other, choices in dim.when.items()):
            continue
        if isinstance(dim, CategoricalDimension):
            values[path] = trial.suggest_categorical(path, dim.choices)
        elif isinstance(dim, FloatDimension):
            values[path] = trial.suggest_float(path, dim.low, dim.high, log=dim.log, step=dim.step)
        else:
            values[path] = trial.suggest_int(path, dim.low, dim.high, log=dim.log, step=dim.step)
    return values


def open_study(journal: Place, name: str, objectives: Mapping[str, str]) -> optuna.Study:
    """Open the study ``name`` of a journal file for writing; it is made where there is none.

    ``objectives``: metric → ``max`` or ``min``. Only the driver that holds the sweep may write;
    :func:`read_study` is for all others. Raises :class:`~latentwire.config.resolve.ConfigError` for
    a study with other objectives, and :class:`~latentwire.tuning.journal.JournalError` for one that
    is damaged in its middle.
    """
    storage = JournalStorage(JournalFileBackend(str(own_journal(journal))))
    study = optuna.create_study(
        storage=storage,
        study_name=_name_in(storage, journal, name),
        directions=[DIRECTIONS[mode] for mode in objectives.values()],
        load_if_exists=True,
    )
    # Lists, as JSON gives them back, and in order: Optuna knows objectives by their places alone.
    pairs = [list(pair) for pair in objectives.items()]
    recorded = study.user_attrs.get(OBJECTIVES, pairs)
    if recorded != pairs:
        raise ConfigError(
            f"study {name} of {journal} has objectives {recorded}, got {pairs}; start a new sweep"
        )
    study.set_user_attr(OBJECTIVES, pairs)
    return study


@contextlib.contextmanager
def read_study(journal: Place, name: str, objectives: Mapping[str, str]) -> Iterator[optuna.Study]:
    """Yield the study ``name`` of a journal for reading, whoever else appends to it meanwhile.

    A sweep whose directory was renamed keeps its study (:func:`_name_in`). Where there is none yet, an
    empty one. Raises :class:`~latentwire.tuning.journal.JournalError`
    where the journal is damaged in its middle.
    """
    if journal.exists():
        with readable(journal) as file:
            storage = JournalStorage(JournalFileBackend(str(file)))
            known = _name_in(storage, journal, name)
            if known in optuna.get_all_study_names(storage):
                yield optuna.load_study(study_name=known, storage=storage)
                return
    yield optuna.create_study(
        study_name=name, directions=[DIRECTIONS[mode] for mode in objectives.values()]
    )


def _name_in(storage: JournalStorage, journal: Place, name: str) -> str:
    """Return the name of a sweep's study in a journal.

    It is ``name``, but for the only study of a journal in a directory of that name: the directory was
    renamed since.
    """
    names = optuna.get_all_study_names(storage)
    return names[0] if len(names) == 1 and journal.parent.name == name else name


def record_protocol(study: optuna.Study, protocol: str) -> None:
    """Write the protocol hash of its scores into a study.

    Raises :class:`~latentwire.config.resolve.ConfigError` where the study has another: rows,
    layout, decoding or metrics have changed since, and old and new scores cannot be compared.
    """
    recorded = study.user_attrs.get(PROTOCOL, protocol)
    if recorded != protocol:
        raise ConfigError(
            f"scores of study {study.study_name} have the protocol hash {recorded}, new ones would "
            f"have {protocol}: rows, layout, decoding or metrics differ; start a new sweep"
        )
    study.set_user_attr(PROTOCOL, protocol)


def enqueue(study: optuna.Study, points: Sequence[Mapping[str, Any]]) -> None:
    """Enqueue starting points, each once however often the study is opened."""
    for point in points:
        study.enqueue_trial(dict(point), skip_if_exists=True)


def own_trials(
    study: optuna.Study, states: Sequence[TrialState] | None = None
) -> list[FrozenTrial]:
    """Return the study's trials without those of a warm start and failed ones that were retried."""
    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs[RETRIES] for trial in trials if RETRIES in trial.user_attrs}
    drawn_here = [trial for trial in trials if WARM not in trial.user_attrs]
    latest = [trial for trial in drawn_here if trial.number not in retried]
    return [trial for trial in latest if states is None or trial.state in states]


def retry_failed(study: optuna.Study) -> dict[int, FrozenTrial]:
    """Enqueue a new trial for each failed one; returns new number → failed trial.

    The new one has its values and goes on in its directory. Optuna's trials end once: the failed
    one stays in the study, and :func:`own_trials` passes it over.
    """
    new: dict[int, FrozenTrial] = {}
    attributes: dict[str, Any]
    for failed in own_trials(study, (TrialState.FAIL,)):
        attributes = {RETRIES: failed.number, DIRECTORY: directory_of(failed)}
        if record := clone_record(failed):
            attributes[CLONE] = record
        # The number that Optuna gives the next trial.
        new[len(study.get_trials(deepcopy=False))] = failed
        study.enqueue_trial(dict(failed.params), user_attrs=attributes)
    return new


def directory_of(trial: FrozenTrial) -> int:
    """Return the number that names a trial's directory: its own, or the retried trial's."""
    return int(trial.user_attrs.get(DIRECTORY, trial.number))


def stopped_by(trial: FrozenTrial) -> dict[str, Any]:
    """Return the order that ended a trial: ``order``, ``who`` and ``time``; empty where none did."""
    return dict(trial.user_attrs.get(STOPPED, {}))


def is_paused(trial: FrozenTrial) -> bool:
    """Return whether an order has taken a trial's resources until another one takes it up again."""
    # In the study such a trial is still running.
    paused = trial.state is TrialState.RUNNING and trial.user_attrs.get(PAUSED, {}).get("on")
    return bool(paused)


def clone_record(trial: FrozenTrial) -> dict[str, Any]:
    """Return what a clone came from; empty for any other trial."""
    return dict(trial.user_attrs.get(CLONE, {}))


def run_values(trial: FrozenTrial) -> dict[str, Any]:
    """Return the values by path under which a trial runs: its parameters, and a clone's others."""
    return dict(trial.params) | dict(clone_record(trial).get("values", {}))


def evaluations(trial: FrozenTrial) -> list[dict[str, Any]]:
    """Return a trial's reports in the order of its steps."""
    return sorted(trial.user_attrs.get(EVALUATIONS, {}).values(), key=lambda report: report["step"])


def read_earlier(
    source: str | Place, objectives: Mapping[str, str], protocol: str | None = None
) -> list[FrozenTrial]:
    """Return the finished trials of an earlier sweep (its directory, or its journal).

    ``protocol``: the protocol hash that they must have; ``None``: any. Raises
    :class:`~latentwire.config.resolve.ConfigError` where there is no study, or one with other
    objectives or another protocol: other metrics, or scores on other rows, would mislead the
    sampler.
    """
    journal = place(source)
    if journal.is_dir():
        journal = journal / JOURNAL
    if not journal.is_file():
        raise ConfigError(
            f"tune.warm_start must be a sweep's directory or its {JOURNAL}, got {source}"
        )
    pairs = [list(pair) for pair in objectives.items()]
    trials = []
    with readable(journal) as file:
        storage = JournalStorage(JournalFileBackend(str(file)))
        for summary in optuna.get_all_study_summaries(storage):
            earlier = optuna.load_study(study_name=summary.study_name, storage=storage)
            recorded = earlier.user_attrs
            if recorded.get(OBJECTIVES) != pairs:
                raise ConfigError(
                    f"tune.warm_start must have the objectives {pairs}, got {recorded.get(OBJECTIVES)} ({journal})"
                )
            if protocol is not None and recorded.get(PROTOCOL) != protocol:
                raise ConfigError(
                    f"tune.warm_start must have the protocol hash {protocol}, got "
                    f"{recorded.get(PROTOCOL)} ({journal}): its scores are not comparable"
                )
            ended = own_trials(earlier, (TrialState.COMPLETE, TrialState.PRUNED))
            # A clone's score is not that of its values alone, which nobody could see there.
            trials += [trial for trial in ended if not clone_record(trial)]
    return trials


def warm_start(
    study: optuna.Study,
    earlier: Sequence[FrozenTrial],
    search: Mapping[str, Dimension],
    limits: Mapping[str, Limit],
) -> int:
    """Add the ``earlier`` trials whose values lie in this space, each once.

    Returns how many there are now. Trials outside the space are left out, since a trial's score
    belongs to all of its values. ``limits``: by metric; trials that did not report one of these are
    left out too.
    """
    trials = study.get_trials(deepcopy=False)
    # Numbers of trials that an earlier driver of this sweep has copied.
    labels = {trial.user_attrs[WARM] for trial in trials if WARM in trial.user_attrs}
    for trial in earlier:
        label = str(trial.number)
        if label in labels or not trial.params or not set(trial.params) <= set(search):
            continue
        constraints = _constraints(trial, limits)
        if constraints is None:
            continue
        try:
            # Under this space's distributions, which may be narrower or wider than they were.
            copied = create_trial(
                state=trial.state,
                values=trial.values,
                params=trial.params,
                distributions={path: distribution(search[path]) for path in trial.params},
                user_attrs={WARM: label},
                constraints=constraints,
                intermediate_values=trial.intermediate_values,
            )
        except ValueError:  # create_trial's word for a value outside its distribution
            continue
        study.add_trial(copied)
        labels.add(label)
    return len(labels)


def _constraints(trial: FrozenTrial, limits: Mapping[str, Limit]) -> dict[str, float] | None:
    """Return how far a trial's last report is beyond each limit; ``None`` where it lacks a metric.

    Samplers take a trial without constraints to be within every limit, or refuse it.
    """
    report = evaluations(trial)[-1] if evaluations(trial) else {}
    # In Optuna's terms: at most 0 is within the limit.
    beyond = {name: report.get(name, math.nan) - limit.max for name, limit in limits.items()}
    return beyond if all(map(math.isfinite, beyond.values())) else None
