"""``report.html``: a sweep in one file that opens offline. All texts in it are escaped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import optuna
import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from latentwire import card
from latentwire.config import SweepConfig
from latentwire.config.resolve import last_stage, with_values
from latentwire.evaluation import readings
from latentwire.evaluation.conditions import label
from latentwire.evaluation.summary import wider_by_document
from latentwire.planning.resolved import objectives
from latentwire.reports import figures, tables
from latentwire.reports.templates import TEMPLATES
from latentwire.storage import Place, files_below, read_footer, read_parquet, write_text
from latentwire.tuning import resume
from latentwire.tuning.reruns import Finalist
from latentwire.tuning.results import trial_rows
from latentwire.tuning.study import JOURNAL, own_trials, read_study

FILE = "report.html"
EXAMPLES = 12
"""Most rows whose answers stand side by side."""
COLOURS = ["#2563a8", "#c2571a", "#3f8f4f", "#8a4fa3", "#a8873b", "#4b5563"]


def write(output: Place) -> Place:
    """Write a sweep's report from the files in its directory; parts that are missing are left out.

    Raises :class:`~latentwire.config.resolve.ConfigError` where ``output`` holds no sweep.
    """
    # The studies that fronts are drawn of are not news.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = resume.read_space(output, [])
    with read_study(output / JOURNAL, output.name, objectives(space)) as study:
        return _write(output, space, study)


def _write(output: Place, space: SweepConfig, study: optuna.Study) -> Place:
    document = _json(output / "results.json")
    scores = document.get("validation") or {}
    trials = trial_rows(study, space.tune)
    best = document.get("best")
    finalists = [Finalist(**finalist) for finalist in document.get("finalists") or []]
    run = last_stage(with_values(space.run, best["values"]) if best else space.run)
    pictures: list[figures.Figure] = figures.search_figures(study, space.tune)
    pictures += figures.stage_figures(document.get("stages") or [])
    scores_grid = together_grid = None
    if scores:
        scores_grid = tables.scores_table(scores, f"{run.data.dataset} validation", run)
    if any("agreement" in row["mean"] for row in scores.values()):
        together_grid = tables.together_table(scores)
    # plotly's script is megabytes: it is there only for pages with a picture.
    has_pictures = scores or any(not isinstance(what, str) for *_, what in pictures)
    page = TEMPLATES.get_template("report.html.jinja").render(
        title=output.name,
        command=document.get("command"),
        best=best,
        selection=document.get("selection") or {},
        metric=space.tune.metric,
        scores=scores_grid,
        read=readings.sentence(document.get("readings")),
        wider=wider_by_document(document.get("by_document") or {}),
        weights=tables.weights_table(document["weights"]) if document.get("weights") else None,
        together=together_grid,
        kept=_kept(scores),
        against_text=tables.against_text_table(scores),
        text_notes=card.text_notes(scores),
        chart=_draw(figures.scores_figure(scores)) if scores else "",
        pictures=[(name, about, _draw(what)) for name, about, what in pictures],
        trials=tables.trials_table(trials, space),
        reruns=tables.reruns_table(finalists, space.tune.metric) if finalists else None,
        failures=[row for row in trials if row["state"] == "failed"],
        examples=_examples(output / "predictions.parquet"),
        costs=_costs(study, space, output),
        manifest=_manifest(output / "manifest.json"),
        plotly=get_plotlyjs() if has_pictures else "",
    )
    write_text(output / FILE, page)
    return output / FILE


def _draw(figure: go.Figure | str) -> str:
    """Return a picture as HTML, or a text as a paragraph.

    plotly escapes what could end its script.
    """
    if isinstance(figure, str):
        return f"<p>{jinja2.filters.escape(figure)}</p>"
    figure.update_layout(
        title=None,
        template="plotly_white",
        colorway=COLOURS,
        height=380,
        autosize=True,
        width=None,
        margin={"l": 60, "r": 20, "t": 48, "b": 60},
        font={"family": "system-ui, sans-serif", "size": 12},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    html: str = plotly.io.to_html(
        figure,
        config={"responsive": True, "displayModeBar": False},
        include_plotlyjs=False,
        full_html=False,
        default_width="100%",
    )
    return html


def _kept(scores: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return how much of tuned full text's EM each receiver keeps from the first row of latents.

    Nothing where nobody tuned a reader of the full text, or where it is never right.
    """
    key = next((key for key in scores if key.split()[0] == "latent"), None)
    rows = scores[key].items() if key is not None else ()
    parts = []
    for name, row in rows:
        if name != "mean" and "retention_em" in row:
            parts.append((label(str(key)), name, row["retention_em"]))
    return parts


def _examples(file: Place) -> list[dict[str, Any]]:
    """Return rows with each receiver's answers to text and to latents.

    Right and wrong ones come by turns where there are both.
    """
    names = read_footer(file).schema.to_arrow_schema().names if file.exists() else []
    if "context" not in names:
        return []
    # Files before version 0.2 call it a setting.
    condition = "condition" if "condition" in names else "setting"
    columns = ["id", "receiver", "mode", condition, "text", "golds", "em", "question", "context"]
    rows: dict[str, dict[str, Any]] = {}
    right: dict[str, list[bool]] = {}
    for p in read_parquet(file, columns).to_pylist():
        # A row of the table is a question; its predictions, one a receiver and condition, join it.
        row = {
            "context": p["context"],
            "question": p["question"],
            "golds": p["golds"],
            "answers": [],
        }
        row = rows.setdefault(p["id"], row)
        if p["mode"] in ("text", "latent"):
            answer = (label(p[condition]), p["receiver"], p["text"], p["em"] == 1, p["mode"])
            row["answers"].append(answer)
        if p["mode"] == "latent":
            right.setdefault(p["id"], []).append(p["em"] == 1)
    # Good: every receiver is right from the latents.
    is_good = {key: key in right and all(right[key]) for key in rows}
    good = [row for key, row in rows.items() if is_good[key]]
    bad = [row for key, row in rows.items() if not is_good[key]]
    # zip ends with the shorter list; the rest of the longer one follows.
    turns = itertools.chain.from_iterable(zip(good, bad, strict=False))
    return [*turns, *good[len(bad) :], *bad[len(good) :]][:EXAMPLES]


def _costs(study: optuna.Study, space: SweepConfig, output: Place) -> list[tuple[str, str]]:
    """Return what the search took: wall-clock time, CPU- and GPU-hours of the workers, and disk."""
    training = space.run.training
    # A trial that is unfinished has no duration.
    durations = [trial.duration for trial in own_trials(study) if trial.duration]
    hours = sum(duration.total_seconds() for duration in durations) / 3600
    gpus = training.gpus_per_worker
    nodes = _json(output / "manifest.json").get("hardware", {}).get("nodes", [])
    # gpus_per_worker null: one where the cluster had any.
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    files = files_below(output)
    disk = sum(files.values())
    weights = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    return [
        ("trials, wall-clock", f"{hours:.2f} h"),
        ("CPU-hours", f"{hours * training.cpus_per_worker * training.num_workers:.2f}"),
        ("GPU-hours", f"{hours * gpus * training.num_workers:.2f}"),
        ("disk", f"{disk / 1e6:,.1f} MB, of which checkpoints {weights / 1e6:,.1f} MB"),
    ]


def _manifest(file: Place) -> list[tuple[str, str]]:
    """Return the manifest's entries as text, the long ones indented."""
    entries = []
    for name, value in _json(file).items():
        text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
        entries.append((name, text))
    return entries


def _json(file: Place) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return document
