"""What a person reads at the end of a sweep: two tables in the terminal, and the same in ``report.md``."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from latentwire.config import RunConfig, TuneConfig
from latentwire.evaluation.baselines import MESSAGE_MODES, MODE_NAMES
from latentwire.features.registry import keeps_receivers_frozen
from latentwire.storage import Place, write_text
from latentwire.tuning.finals import Finalist
from latentwire.tuning.results import Best

Grid = tuple[str, list[str], list[list[str]]]
"""Title, header and rows of one table."""


def trials_table(rows: list[dict[str, Any]], config: TuneConfig) -> Grid:
    """All trials, best first."""
    measured = dict.fromkeys((config.metric, *config.objectives, *config.constraints))
    columns = ("step", *measured, "first_train_loss", "train_loss", "examples_per_s", "train_seconds")
    knobs = list(dict.fromkeys(name for row in rows for name in row["values"]))
    body = [
        [str(row["trial"]), row["state"], *(_number(row.get(column)) for column in columns)]
        + [_number(row["values"].get(knob)) for knob in knobs]
        for row in rows
    ]
    return f"{len(rows)} trials", ["trial", "state", *columns, *(knob.split(".")[-1] for knob in knobs)], body


def front_table(rows: list[dict[str, Any]], config: TuneConfig) -> Grid:
    """The trials that no other beats in every objective, by the further objectives."""
    rows, names = [row for row in rows if row["front"]], [*config.objectives, config.metric]
    body = [
        [str(row["trial"]), *(_number(row[name]) for name in names)]
        for row in sorted(rows, key=lambda row: row[names[0]])
    ]
    return f"Pareto front: {len(rows)} trials that none beats in everything", ["trial", *names], body


def scores_table(scores: dict[str, Any], title: str, run: RunConfig) -> Grid:
    """One row per prompt kind and receiver: EM and F1 with their 95 % intervals, nats per answer token, and the costs.

    Latents that were read with changed receivers (a feature like ``lora``) are labelled so.
    """
    label = "" if keeps_receivers_frozen(run) else ", not frozen"
    header = ["the receiver reads", "receiver", "EM", "F1", "NLL", "positions", "bytes", "ms", "rows"]
    body = [
        [
            name + (label if mode in MESSAGE_MODES else ""),
            receiver,
            *(f"{100 * row[field]:.1f} [{100 * row[f'{field}_low']:.1f}, {100 * row[f'{field}_high']:.1f}]" for field in ("em", "f1")),
            *(_number(row[field]) for field in ("nll", "positions", "bytes", "forward_ms")),
            str(int(row["rows"])),
        ]
        for mode, name in MODE_NAMES.items()
        for receiver, row in scores.get(mode, {}).items()
        if receiver != "mean"
    ]  # fmt: skip
    return title, header, body


def finals_table(finalists: list[Finalist], metric: str) -> Grid:
    """The best trials' scores in the search and with fresh seeds: how much of the first was luck."""
    body = [
        [
            str(f.trial),
            _number(f.score),
            ", ".join(map(_number, f.fresh)) or "–",
            _number(f.mean),
            _number(f.score - f.mean),
        ]
        for f in finalists
    ]
    return f"finals: {metric} with fresh seeds", ["trial", "search", "fresh seeds", "mean", "search − mean"], body


def sweep_tables(
    rows: list[dict[str, Any]],
    finalists: list[Finalist],
    scores: dict[str, Any],
    best: Best,
    run: RunConfig,
    config: TuneConfig,
) -> list[Grid]:
    """What a sweep ends with: its trials, the Pareto front where there are several objectives, the finals where there are
    finalists, the winner's scores."""
    front = [front_table(rows, config)] if config.objectives else []
    finals = [finals_table(finalists, config.metric)] if finalists else []
    title = f"{run.data.dataset} validation, best trial {best.trial}"
    return [trials_table(rows, config), *front, *finals, scores_table(scores, title, run)]


def show(grids: list[Grid]) -> None:
    """Print tables, as wide as they need to be: a log file has no terminal to fit."""
    for title, header, body in grids:
        table = Table(title=title, title_justify="left")
        for name in header:
            table.add_column(name, no_wrap=True)
        for row in body:
            table.add_row(*row)
        Console(width=40 * len(header)).print(table)


def verdict(best: Best, gap: dict[str, float], metric: str) -> str:
    """The winner in a line: its development score beside the same on the untouched split."""
    line = f"best: trial {best.trial}, step {best.step}, development {metric} {best.score:.4f}"
    return f"{line}, validation {gap['validation']:.4f}, gap {gap['gap']:+.4f}" if gap else line


def write_report(output: Place, line: str, grids: list[Grid], command: str) -> Place:
    """``report.md``: the verdict ``line``, the tables, and the command that made them."""
    lines = [f"# {output.name}", "", f"Command: `{command}`", "", f"{line}; exported to `{output / 'best'}`."]
    for title, header, body in grids:
        lines += ["", f"## {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in body]
    path = output / "report.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return repr(value) if isinstance(value, str) else str(value)
    if value != value:
        return "nan"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:.0f}"
