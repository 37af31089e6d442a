"""One Optuna study in a journal file: made, given its starting points and earlier trials, opened again; and a search space in
Optuna's terms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from latentwire.config import CategoricalDimension, Dimension, FloatDimension
from latentwire.config.resolve import ConfigError, search_order
from latentwire.storage import Place, place
from latentwire.tuning.journal import JOURNAL, keep_journal, own_journal, readable

SESSION, CAUSE, EVALUATIONS, WARM = "session", "cause", "evaluations", "warm_start"
"""User attributes of the study's trials: the driver that runs it; why it failed; step → what was reported; where a trial
was taken from."""
RETRIES, DIRECTORY = "retries", "directory"
"""User attributes, too, of a trial that takes up a failed one: that one's number; the number by which
the directory is named that it goes on in."""
OBJECTIVES, PIN = "objectives", "evaluation_pin"
"""User attributes of the study: its objectives with their directions; the evaluation pin that all of its scores have."""
DIRECTIONS = {"max": "maximize", "min": "minimize"}
"""A mode in Optuna's terms."""
__all__ = ["JOURNAL", "keep_journal", "own_journal"]  # of the journal, beside the study that it holds


def distribution(dim: Dimension) -> BaseDistribution:
    """A dimension in Optuna's terms."""
    if isinstance(dim, CategoricalDimension):
        return CategoricalDistribution(dim.choices)
    if isinstance(dim, FloatDimension):
        return FloatDistribution(dim.low, dim.high, log=dim.log, step=dim.step)
    return IntDistribution(dim.low, dim.high, log=dim.log, step=dim.step)


def draw(trial: Trial, search: dict[str, Dimension]) -> dict[str, Any]:
    """Values for a trial, by dotted path, of the dimensions whose conditions hold.

    What the trial has drawn before stays as it is, so that a trial whose driver died half-way can be drawn to its end.
    """
    values: dict[str, Any] = {}
    for path in search_order(search):
        dim = search[path]
        if any(values.get(other) not in wanted for other, wanted in dim.when.items()):
            continue
        if isinstance(dim, CategoricalDimension):
            values[path] = trial.suggest_categorical(path, dim.choices)
        elif isinstance(dim, FloatDimension):
            values[path] = trial.suggest_float(path, dim.low, dim.high, log=dim.log, step=dim.step)
        else:
            values[path] = trial.suggest_int(path, dim.low, dim.high, log=dim.log, step=dim.step)
    return values


def open_study(journal: Place, name: str, objectives: Mapping[str, str]) -> optuna.Study:
    """The study ``name`` of a journal file, made where it is not there yet. ``objectives``: metric → max or min.

    Writes into the journal, which only the driver that holds the sweep may do; :func:`read_study` is for all others. Raises
    :class:`~latentwire.config.resolve.ConfigError` where it is there with other objectives, and
    :class:`~latentwire.tuning.journal.JournalError` where it is damaged in its middle.
    """
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(own_journal(journal)))),
        study_name=name,
        directions=[DIRECTIONS[mode] for mode in objectives.values()],
        load_if_exists=True,
    )
    wanted = [list(item) for item in objectives.items()]
    if study.user_attrs.setdefault(OBJECTIVES, wanted) != wanted:
        raise ConfigError(f"study {name} of {journal} has objectives {study.user_attrs[OBJECTIVES]}, got {wanted}")
    study.set_user_attr(OBJECTIVES, wanted)
    return study


@contextlib.contextmanager
def read_study(journal: Place, name: str, objectives: Mapping[str, str]) -> Iterator[optuna.Study]:
    """The study ``name`` of a journal, to be looked at while the block lasts: nothing is written, whoever else appends to it.

    Where there is none yet, an empty one. Raises :class:`~latentwire.tuning.journal.JournalError` where the journal is damaged in
    its middle.
    """
    if journal.exists():
        with readable(journal) as file:
            storage = JournalStorage(JournalFileBackend(str(file)))
            if name in optuna.get_all_study_names(storage):
                yield optuna.load_study(study_name=name, storage=storage)
                return
    yield optuna.create_study(study_name=name, directions=[DIRECTIONS[mode] for mode in objectives.values()])


def record_protocol(study: optuna.Study, pin: str) -> None:
    """Write the evaluation pin into a study.

    Raises :class:`~latentwire.config.resolve.ConfigError` where its scores have another: rows, layout, decoding or metrics
    have changed since, and old and new scores cannot be compared.
    """
    if (found := study.user_attrs.get(PIN, pin)) != pin:
        raise ConfigError(
            f"scores of study {study.study_name} have the evaluation pin {found}, new ones would have {pin}: rows, layout, "
            f"decoding or metrics differ; start a new sweep"
        )
    study.set_user_attr(PIN, pin)


def enqueue(study: optuna.Study, points: Sequence[Mapping[str, Any]]) -> None:
    """Starting points, each once however often the study is opened."""
    for point in points:
        study.enqueue_trial(dict(point), skip_if_exists=True)


def own_trials(study: optuna.Study, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
    """The study's trials without those of a warm start, and without failed ones that others took up."""
    trials = study.get_trials(deepcopy=False)
    taken_up = {trial.user_attrs[RETRIES] for trial in trials if RETRIES in trial.user_attrs}
    own = [trial for trial in trials if WARM not in trial.user_attrs and trial.number not in taken_up]
    return own if states is None else [trial for trial in own if trial.state in states]


def retry_failed(study: optuna.Study) -> dict[int, FrozenTrial]:
    """Have each failed trial taken up by a new one; returns new number → failed trial.

    The new one has its values and goes on in its directory. Optuna's trials end once: the failed one
    stays in the study as what it is, and :func:`own_trials` passes it over.
    """
    new: dict[int, FrozenTrial] = {}
    for failed in own_trials(study, (TrialState.FAIL,)):
        attributes = {RETRIES: failed.number, DIRECTORY: directory_of(failed)}
        new[len(study.get_trials(deepcopy=False))] = failed
        study.enqueue_trial(dict(failed.params), user_attrs=attributes)
    return new


def directory_of(trial: FrozenTrial) -> int:
    """Return the number that names a trial's directory: its own, or that of the one it takes up."""
    return int(trial.user_attrs.get(DIRECTORY, trial.number))


def evaluations(trial: FrozenTrial) -> list[dict[str, Any]]:
    """What a trial reported, in the order of its steps."""
    return sorted(trial.user_attrs.get(EVALUATIONS, {}).values(), key=lambda report: report["step"])


def read_earlier(source: str | Place, objectives: Mapping[str, str], pin: str | None = None) -> list[FrozenTrial]:
    """Finished trials of an earlier sweep (its directory, or its journal).

    Raises :class:`~latentwire.config.resolve.ConfigError` where there is no study, or one with other objectives or another
    evaluation ``pin`` (``None``: not looked at): other metrics, or scores on other rows, would mislead the sampler.
    """
    given = place(source)
    journal = given / JOURNAL if given.is_dir() else given
    if not journal.is_file():
        raise ConfigError(f"tune.warm_start must be a sweep's directory or its {JOURNAL}, got {source}")
    found = []
    with readable(journal) as file:
        storage = JournalStorage(JournalFileBackend(str(file)))
        for summary in optuna.get_all_study_summaries(storage):
            earlier = optuna.load_study(study_name=summary.study_name, storage=storage)
            stated = earlier.user_attrs.get(OBJECTIVES)
            wanted = [list(item) for item in objectives.items()]
            if stated != wanted:
                raise ConfigError(f"tune.warm_start must have the objectives {wanted}, got {stated} ({journal})")
            if pin is not None and (other := earlier.user_attrs.get(PIN)) != pin:
                raise ConfigError(
                    f"tune.warm_start must have the evaluation pin {pin}, got {other} ({journal}): its scores are not comparable"
                )
            found += own_trials(earlier, (TrialState.COMPLETE, TrialState.PRUNED))
    return found


def warm_start(study: optuna.Study, earlier: Sequence[FrozenTrial], search: Mapping[str, Dimension]) -> int:
    """Add the ``earlier`` trials whose values lie in this space, once; returns how many the study has now.

    What lies outside it is left out trial by trial, since a trial's score belongs to all of its values.
    """
    there = {trial.user_attrs[WARM] for trial in study.get_trials(deepcopy=False) if WARM in trial.user_attrs}
    for trial in earlier:
        label = str(trial.number)
        if label in there or not trial.params or not set(trial.params) <= set(search):
            continue
        try:
            copied = create_trial(
                state=trial.state,
                values=trial.values,
                params=trial.params,
                distributions={path: distribution(search[path]) for path in trial.params},
                user_attrs={WARM: label},
                intermediate_values=trial.intermediate_values,
            )
        except ValueError:  # create_trial's word for a value outside its distribution
            continue
        study.add_trial(copied)
        there.add(label)
    return len(there)
