"""What a person reads at the end of a sweep: two tables in the terminal, and the same in ``report.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from latentwire.config import RunConfig, TuneConfig
from latentwire.evaluation.baselines import MESSAGE_MODES
from latentwire.evaluation.conditions import label
from latentwire.features.registry import keeps_receivers_frozen
from latentwire.storage import Place, write_text

if TYPE_CHECKING:  # Optuna comes with these, and a plain run has no use for it
    from latentwire.evaluation.scoring import Scored
    from latentwire.tuning.reruns import Finalist
    from latentwire.tuning.results import Best

Grid = tuple[str, list[str], list[list[str]]]
"""Title, header and rows of one table."""


def trials_table(rows: list[dict[str, Any]], config: TuneConfig) -> Grid:
    """All trials, best first."""
    measured = dict.fromkeys((config.metric, *config.objectives, *config.constraints))
    columns = ("step", *measured, "first_train_loss", "train_loss", "examples_per_s", "train_seconds")
    knobs = list(dict.fromkeys(name for row in rows for name in row["values"]))
    body = [
        [_named(row), row["state"], *(_number(row.get(column)) for column in columns)]
        + [_number(row["values"].get(knob)) for knob in knobs]
        for row in rows
    ]
    return f"{len(rows)} trials", ["trial", "state", *columns, *(knob.split(".")[-1] for knob in knobs)], body


def _named(row: dict[str, Any]) -> str:
    """A trial's number, and that of the failed one which it took up."""
    return f"{row['trial']} (takes up {row['retries']})" if "retries" in row else str(row["trial"])


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

    Latents that were read with changed receivers (a feature like ``lora``) are labelled so. The title says what the intervals
    resample: contexts, or rows in results of an earlier version, which did not count them.
    """
    counted = [row["contexts"] for rows in scores.values() for row in rows.values() if "contexts" in row]
    resampled = f"{max(counted):,} contexts" if counted else "rows"
    changed = "" if keeps_receivers_frozen(run) else ", not frozen"
    header = ["the receiver reads", "receiver", "EM", "F1", "NLL", "positions", "bytes", "ms", "rows", "contexts"]
    body = [
        [
            label(key) + (changed if key.split()[0] in MESSAGE_MODES else ""),
            receiver,
            *(f"{100 * row[field]:.1f} [{100 * row[f'{field}_low']:.1f}, {100 * row[f'{field}_high']:.1f}]" for field in ("em", "f1")),
            *(_number(row[field]) for field in ("nll", "positions", "bytes", "forward_ms")),
            str(int(row["rows"])),
            _number(row.get("contexts")),
        ]
        for key, receivers in scores.items()
        for receiver, row in receivers.items()
        if receiver != "mean"
    ]  # fmt: skip
    return f"{title}; 95 % intervals by resampling {resampled}", header, body


def weights_table(sizes: Mapping[str, Mapping[str, int]]) -> Grid:
    """What was trained: parameters and bytes of the encoder (all that receivers share) and of each receiver's own part."""
    total = {field: sum(part[field] for part in sizes.values()) for field in ("parameters", "bytes")}
    body = [
        [name, f"{part['parameters']:,}", f"{part['bytes'] / 1e6:,.2f}"]
        for name, part in {**sizes, "all of the wire": total}.items()
    ]
    return "trained weights", ["part", "parameters", "MB"], body


def together_table(scores: dict[str, Any]) -> Grid:
    """What the receivers are as one, and what a message costs and saves, for each row of the table."""
    header = [
        "the receivers read", "agreement", "oracle EM", "oracle F1", "joint EM", "joint F1", "first token @1", "@5",
        "bytes ÷", "tokens ÷", "encode ms", "prefill ms", "first token ms", "decode ms",
        "examples/s",
    ]  # fmt: skip
    names = (
        "agreement", "oracle_em", "oracle_f1", "joint_em", "joint_f1", "first_1", "first_5", "compression_bytes",
        "compression_tokens", "encode_ms", "prefill_ms", "first_token_ms", "decode_ms", "examples_per_s",
    )  # fmt: skip
    body = [
        [label(key), *(_number(receivers["mean"].get(name)) for name in names)] for key, receivers in scores.items()
    ]
    return "the receivers together (means over them)", header, body


def comparisons_table(comparisons: Sequence[dict[str, Any]]) -> Grid:
    """Paired differences with their 95 % intervals, and how likely so large a one is by chance."""
    body = [
        [
            label(pair["first"]),
            label(pair["second"]),
            receiver,
            *_paired(found["em"]),
            *_paired(found["f1"]),
            *_paired(found["nll"], factor=1, digits=2),
        ]
        for pair in comparisons
        for receiver, found in pair["receivers"].items()
    ]
    return (
        "paired differences; 95 % intervals and p by contexts",
        ["first", "minus second", "receiver", "EM", "p", "F1", "p", "NLL", "p"],
        body,
    )


def _paired(found: dict[str, float], factor: int = 100, digits: int = 1) -> list[str]:
    """A difference with its interval, and p."""
    difference, low, high = (f"{factor * found[end]:+.{digits}f}" for end in ("difference", "low", "high"))
    return [f"{difference} [{low}, {high}]", f"{found['p']:.2g}"]


def reruns_table(finalists: list[Finalist], metric: str) -> Grid:
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


def failures_table(rows: list[dict[str, Any]]) -> Grid:
    """What failed, and why."""
    body = [[str(row["trial"]), row["error"].strip().splitlines()[-1]] for row in rows if row["state"] == "failed"]
    return f"{len(body)} trials failed", ["trial", "cause"], body


def trial_tables(rows: list[dict[str, Any]], config: TuneConfig) -> list[Grid]:
    """A sweep's trials, those that failed, and the Pareto front where there are several objectives."""
    front = [front_table(rows, config)] if config.objectives else []
    failed = [failures_table(rows)] if any(row["state"] == "failed" for row in rows) else []
    return [trials_table(rows, config), *failed, *front]


def sweep_tables(
    rows: list[dict[str, Any]],
    finalists: list[Finalist],
    scored: Scored,
    best: Best,
    run: RunConfig,
    config: TuneConfig,
) -> list[Grid]:
    """What a sweep ends with: its trials, the finals where there are finalists, the winner's scores and weights."""
    finals = [reruns_table(finalists, config.metric)] if finalists else []
    title = f"{run.data.dataset} validation, best trial {best.trial}"
    return [*trial_tables(rows, config), *finals, *scored_tables(scored, title, run)]


def scored_tables(scored: Scored, title: str, run: RunConfig) -> list[Grid]:
    """A wire's scores, what they took, and what of it was trained."""
    return [scores_table(scored.scores, title, run), together_table(scored.scores), weights_table(scored.sizes)]


def show(grids: list[Grid]) -> None:
    """Print tables, as wide as they need to be: a log file has no terminal to fit. One without rows is left out."""
    for title, header, body in (grid for grid in grids if grid[2]):
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in header:
            table.add_column(name, no_wrap=True)
        for row in body:
            table.add_row(*row)
        console = Console(width=40 * len(header))
        console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
        console.print(table)


def verdict(best: Best, gap: dict[str, float], metric: str) -> str:
    """The winner in a line: its development score beside the same on the untouched split."""
    line = f"best: trial {best.trial}, step {best.step}, development {metric} {best.score:.4f}"
    return f"{line}, validation {gap['validation']:.4f}, gap {gap['gap']:+.4f}" if gap else line


def write_report(output: Place, line: str, grids: list[Grid], command: str) -> Place:
    """``report.md``: the verdict ``line``, the tables, and the command that made them."""
    lines = [f"# {output.name}", "", f"Command: `{command}`", "", f"{line}."]
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
