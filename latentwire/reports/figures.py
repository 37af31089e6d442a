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
Figure = tuple[str, str, go.Figure | str]
"""Title, caption, and the picture, or why there is none."""


def search_figures(study: optuna.Study, config: TuneConfig) -> list[Figure]:
    """Draw history, learning curves, parallel coordinates, importances, contour and Pareto fronts.
    """
    done = own_trials(study, (TrialState.COMPLETE,))
    told: dict[str, Any] = {"target_name": config.metric}
    if len(study.directions) > 1:
        told["target"] = lambda trial: trial.values[0]
    figures: list[Figure] = [
        ("Optimisation history", f"Each finished trial's {config.metric}, and the best so far.",
         visualization.plot_optimization_history(study, **told) if done else "No trial has run to its end yet."),
        ("Learning curves", f"{config.metric} on the development rows, of the best trials, {CURVES} at most.",
         _curves(study, config)),
    ]  # fmt: skip
    shared = set.intersection(*(set(trial.params) for trial in done)) if done else set()
    varied = [name for name in sorted(shared) if len({trial.params[name] for trial in done}) > 1]
    if len(done) < 3 or not varied or len({trial.values[0] for trial in done}) < 2:
        why = f"This needs three finished trials that differ, and there are {len(done)}."
        return [
            *figures,
            ("What mattered", "Parameter importances, parallel coordinates and contour.", why),
            *_fronts(study),
        ]
    figures.append(("Parallel coordinates", "A line per finished trial through the values that it drew.",
                    visualization.plot_parallel_coordinate(study, params=varied, **told)))  # fmt: skip
    if len(varied) > 1:
        weights = optuna.importance.get_param_importances(study, params=varied, target=told.get("target"))
        two = list(weights)[:2]
        figures += [
            ("Parameter importances", "How much of the spread of scores each parameter explains (fANOVA).",
             visualization.plot_param_importances(study, params=varied, **told)),
            ("Contour of the two most important", " and ".join(two), visualization.plot_contour(study, params=two, **told)),
        ]  # fmt: skip
    else:
        figures.append(("Slice", f"Scores by {varied[0]}.", visualization.plot_slice(study, params=varied, **told)))
    return [*figures, *_fronts(study)]


def _fronts(study: optuna.Study) -> list[Figure]:
    """Draw F1 against what it costs: each trial's best evaluation."""
    figures: list[Figure] = []
    for cost, name in (("wire_bytes", "wire bytes"), ("prompt_positions", "positions read")):
        points = [(trial, _best(trial, "dev_f1", max)) for trial in own_trials(study)]
        held = [(trial, report) for trial, report in points if report is not None and cost in report]
        if not held:
            continue
        both = optuna.create_study(directions=["minimize", "maximize"])
        both.add_trials(
            [
                create_trial(
                    values=[report[cost], report["dev_f1"]], params=trial.params, distributions=trial.distributions
                )
                for trial, report in held
            ]
        )
        figures.append((f"Pareto front: F1 against {name}", "Every trial; those that no other beats in both are marked.",
                        visualization.plot_pareto_front(both, target_names=[name, "dev_f1"])))  # fmt: skip
    return figures


def _curves(study: optuna.Study, config: TuneConfig) -> go.Figure | str:
    best = [(trial, report) for trial in own_trials(study) if (report := _best(trial, config.metric, config.best_of))]
    if not best:
        return "No trial has reported yet."
    best.sort(key=lambda item: item[1][config.metric], reverse=config.mode == "max")
    figure = go.Figure(
        [
            go.Scatter(
                x=[report["step"] for report in evaluations(trial)],
                y=[report[config.metric] for report in evaluations(trial)],
                mode="lines+markers",
                name=f"trial {trial.number}",
            )
            for trial, _ in best[:CURVES]
        ]
    )
    return figure.update_layout(xaxis_title="step", yaxis_title=config.metric)


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
            error_y={
                "array": [100 * (row["f1_high"] - row["f1"]) for row in rows],
                "arrayminus": [100 * (row["f1"] - row["f1_low"]) for row in rows],
            },
        )
    return figure.update_layout(yaxis_title="F1", barmode="group")
