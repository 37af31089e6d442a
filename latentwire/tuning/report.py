"""What a person reads at the end of a sweep: two tables in the terminal, and the same in ``report.md``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from latentwire.config import RunConfig
from latentwire.evaluation.evaluator import MODES, Mode
from latentwire.features.registry import keeps_receivers_frozen
from latentwire.tuning.results import Best

MODE_NAMES: dict[Mode, str] = {
    "text": "full text",
    "latent": "latents",
    "shuffled": "latents of another row",
    "closed_book": "closed book",
}
Grid = tuple[str, list[str], list[list[str]]]
"""Title, header and rows of one table."""


def trials_table(rows: list[dict[str, Any]], metric: str) -> Grid:
    """All trials, best first."""
    columns = ("step", metric, "first_train_loss", "train_loss", "examples_per_s", "seconds")
    knobs = list(dict.fromkeys(name for row in rows for name in row["values"]))
    body = [
        [row["trial"], row["state"], *(_number(row.get(column)) for column in columns)]
        + [_number(row["values"].get(knob)) for knob in knobs]
        for row in rows
    ]
    return f"{len(rows)} trials", ["trial", "state", *columns, *(knob.split(".")[-1] for knob in knobs)], body


def scores_table(scores: dict[str, Any], title: str, run: RunConfig) -> Grid:
    """One row per prompt kind and receiver: EM, F1, nats per answer token, positions read.

    Latents that were read with changed receivers (a feature like ``lora``) are labelled so.
    """
    label = "" if keeps_receivers_frozen(run) else ", not frozen"
    modes = [mode for mode in ("text", *MODES) if mode in scores]
    body = [
        [
            MODE_NAMES[mode] + (label if mode in ("latent", "shuffled") else ""),
            name,
            *(_number(row[field]) for field in ("em", "f1", "nll", "positions")),
            str(int(row["rows"])),
        ]
        for mode in dict.fromkeys(modes)
        for name, row in scores[mode].items()
        if name != "mean"
    ]
    return title, ["the receiver reads", "receiver", "EM", "F1", "NLL", "positions", "rows"], body


def show(grids: list[Grid]) -> None:
    """Print tables, as wide as they need to be: a log file has no terminal to fit."""
    for title, header, body in grids:
        table = Table(title=title, title_justify="left")
        for name in header:
            table.add_column(name, no_wrap=True)
        for row in body:
            table.add_row(*row)
        Console(width=max(100, 14 * len(header))).print(table)


def write_report(output: Path, best: Best, grids: list[Grid], command: str) -> Path:
    """``report.md``: the tables, where the winner is, and the command that made them."""
    lines = [
        f"# {output.name}", "", f"Command: `{command}`", "",
        f"Best: trial {best.trial} at step {best.step}, development score {best.score:.4f}; exported to `{output / 'best'}`.",
    ]  # fmt: skip
    for title, header, body in grids:
        lines += ["", f"## {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in body]
    path = output / "report.md"
    aside = output / ".report.md.part"
    aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    aside.rename(path)
    return path


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return repr(value) if isinstance(value, str) else str(value)
    if value != value:
        return "nan"
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 100 else f"{value:.0f}"
