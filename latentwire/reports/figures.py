"""Pictures of a sweep, by optuna.visualization and plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState, create_trial

from latentwire.config import TuneConfig
from latentwire.evaluation.conditions import label
from latentwire.tuning.study import evaluations, own_trials

CURVES = 6
"""Most trials whose learning curves are shown."""
Curve = tuple[int, list[tuple[int, float]]]
"""A trial's number, and its metric at each evaluated step."""
Figure = tuple[str, str, go.Figure | str]
"""Title, caption, and the picture, or why there is none."""


def search_figures(study: optuna.Study, config: TuneConfig) -> list[Figure]:
    """Draw history, learning curves, importances, parallel coordinates, contour and fronts."""
    done = own_trials(study, (TrialState.COMPLETE,))
    # Of several objectives the first is the metric; Optuna's pictures must be told which to show.
    target: dict[str, Any] = {"target_name": config.metric}
    if len(study.directions) > 1:
        target["target"] = lambda trial: trial.values[0]
    history: go.Figure | str = "No trial has run to its end yet."
    if done:
        history = visualization.plot_optimization_history(study, **target)
    best_so_far = f"Each finished trial's {config.metric}, and the best so far."
    of_the_best = f"{config.metric} on the development rows, of the best trials, {CURVES} at most."
    return [
        ("Optimisation history", best_so_far, history),
        ("Learning curves", of_the_best, curves(_reported(study, config), config.metric)),
        *_importances(study, done, target),
        *_fronts(study),
    ]


def _importances(
    study: optuna.Study, done: Sequence[FrozenTrial], target: Mapping[str, Any]
) -> list[Figure]:
    """Draw which searched paths matter, where enough trials differ in them.

    ``target``: the value by which Optuna's pictures compare trials, and its name.
    """
    # A path that some trials did not draw, by its conditions, has no importance over all.
    shared = set.intersection(*(set(trial.params) for trial in done)) if done else set()
    drawn = {path: {trial.params[path] for trial in done} for path in sorted(shared)}
    varied = [path for path, values in drawn.items() if len(values) > 1]
    scores = {trial.values[0] for trial in done}
    if len(done) < 3 or not varied or len(scores) < 2:
        why = f"This needs three finished trials that differ, and there are {len(done)}."
        return [("What mattered", "Parameter importances, parallel coordinates and contour.", why)]
    lines = visualization.plot_parallel_coordinate(study, params=varied, **target)
    figures: list[Figure] = [
        (
            "Parallel coordinates",
            "A line per finished trial through the values that it drew.",
            lines,
        )
    ]
    if len(varied) == 1:
        slices = visualization.plot_slice(study, params=varied, **target)
        return [*figures, ("Slice", f"Scores by {varied[0]}.", slices)]
    weights = optuna.importance.get_param_importances(
        study, params=varied, target=target.get("target")
    )
    # The importances come largest first.
    two = list(weights)[:2]
    share = "How much of the spread of scores each parameter explains (fANOVA)."
    bars = visualization.plot_param_importances(study, params=varied, **target)
    contour = visualization.plot_contour(study, params=two, **target)
    return [
        *figures,
        ("Parameter importances", share, bars),
        ("Contour of the two most important", " and ".join(two), contour),
    ]


def _fronts(study: optuna.Study) -> list[Figure]:
    """Draw F1 against what it costs: each trial's best evaluation."""
    figures: list[Figure] = []
    for cost, name in (("wire_bytes", "wire bytes"), ("prompt_positions", "positions read")):
        # Optuna draws fronts of studies: this one, in memory, has the cost beside F1.
        both = optuna.create_study(directions=["minimize", "maximize"])
        for trial in own_trials(study):
            report = _best(trial, "dev_f1", max)
            if report is not None and cost in report:
                values = [report[cost], report["dev_f1"]]
                copied = create_trial(
                    values=values, params=trial.params, distributions=trial.distributions
                )
                both.add_trial(copied)
        if both.trials:
            about = "Every trial; those that no other beats in both are marked."
            front = visualization.plot_pareto_front(both, target_names=[name, "dev_f1"])
            figures.append((f"Pareto front: F1 against {name}", about, front))
    return figures


def _reported(study: optuna.Study, config: TuneConfig) -> list[Curve]:
    """Return the learning curves of all trials that have reported, the best first."""
    best = []
    for trial in own_trials(study):
        report = _best(trial, config.metric, config.best_of)
        if report is not None:
            best.append((report[config.metric], trial))
    best.sort(key=lambda scored: scored[0], reverse=config.mode == "max")
    reported = []
    for _, trial in best:
        points = [(report["step"], report[config.metric]) for report in evaluations(trial)]
        reported.append((trial.number, points))
    return reported


def curves(reported: Sequence[Curve], metric: str) -> go.Figure | str:
    """Draw a metric by steps, of the first :data:`CURVES` trials.

    ``reported``: the curves of trials, the best first.
    """
    if not reported:
        return "No trial has reported yet."
    figure = go.Figure()
    for number, points in reported[:CURVES]:
        _add_curve(figure, points, f"trial {number}")
    return figure.update_layout(xaxis_title="step", yaxis_title=metric)


def stage_figures(stages: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Draw the learning curve of each earlier stage of the winner: F1 where it has answers, and the loss."""
    figures: list[Figure] = []
    for stage in stages:
        figure = go.Figure()
        for metric in ("dev_f1", "dev_loss"):
            reports = [report for report in stage["evaluations"] if metric in report]
            if reports:
                points = [(report["step"], report[metric]) for report in reports]
                _add_curve(figure, points, metric)
        about = (
            f"Stage {stage['name']} of the winner on its development rows; its {stage['keep']} checkpoint, of step "
            f"{stage['step']:,}, is what the next stage began with."
        )
        axes = figure.update_layout(xaxis_title="step")
        figures.append((f"Learning curves: stage {stage['name']}", about, axes))
    return figures


def _add_curve(figure: go.Figure, points: Sequence[tuple[int, float]], name: str) -> None:
    """Add a learning curve, of one point or more, to a picture."""
    steps, values = zip(*points, strict=True)
    figure.add_scatter(x=steps, y=values, mode="lines+markers", name=name)


def _best(trial: FrozenTrial, metric: str, pick: Any) -> dict[str, Any] | None:
    reports = [report for report in evaluations(trial) if report.get(metric) is not None]
    return pick(reports, key=lambda report: report[metric]) if reports else None


def scores_figure(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> go.Figure:
    """Draw F1 of every row of the table with its 95 % interval, a bar per receiver."""
    receivers: Sequence[str] = [name for name in next(iter(scores.values())) if name != "mean"]
    figure = go.Figure()
    for name in receivers:
        rows = [by[name] for by in scores.values()]
        figure.add_bar(
            name=name,
            x=[label(key) for key in scores],
            y=[100 * row["f1"] for row in rows],
            # plotly takes distances from the bar, not the ends of the interval.
            error_y={
                "array": [100 * (row["f1_high"] - row["f1"]) for row in rows],
                "arrayminus": [100 * (row["f1"] - row["f1_low"]) for row in rows],
            },
        )
    return figure.update_layout(yaxis_title="F1", barmode="group")
