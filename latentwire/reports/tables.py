"""Tables of a sweep or an evaluation: in the terminal, and the same in ``report.md``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from latentwire import card
from latentwire.config import RunConfig, SweepConfig, TuneConfig
from latentwire.data.readers import budget_of
from latentwire.evaluation.baselines import MESSAGE_MODES
from latentwire.evaluation.conditions import label
from latentwire.features.registry import keeps_receivers_frozen
from latentwire.storage import Place, write_text
from latentwire.tuning.columns import column_names

# Optuna comes with these, and a plain run has no use for it.
if TYPE_CHECKING:
    from latentwire.evaluation.scoring import Scored
    from latentwire.tuning.reruns import Finalist
    from latentwire.tuning.results import Best

Grid = tuple[str, list[str], list[list[str]]]
"""Title, header and rows of one table."""
SCORES = [
    "the receiver reads",
    "receiver",
    "EM",
    "F1",
    "match",
    "NLL",
    "positions",
    "bytes",
    "ms",
    "rows",
    "contexts",
]
"""Columns of the table of scores."""
TOGETHER = {
    "agreement": "agreement",
    "oracle_em": "oracle EM",
    "oracle_f1": "oracle F1",
    "joint_em": "joint EM",
    "joint_f1": "joint F1",
    "first_1": "first token @1",
    "first_5": "@5",
    "compression_bytes": "bytes ÷",
    "compression_tokens": "tokens ÷",
    "encode_ms": "encode ms",
    "prefill_ms": "prefill ms",
    "first_token_ms": "first token ms",
    "decode_ms": "decode ms",
    "examples_per_s": "examples/s",
}
"""Metric → column of the table of the receivers together."""


def trials_table(rows: list[dict[str, Any]], space: SweepConfig) -> Grid:
    """Return all trials, best first."""
    tune = space.tune
    measured = dict.fromkeys((tune.metric, *tune.objectives, *tune.constraints))
    columns = (
        "step",
        *measured,
        "first_train_loss",
        "train_loss",
        "examples_per_s",
        "train_seconds",
    )
    # Paths that any trial drew, in the order in which they first come up.
    paths = dict.fromkeys(itertools.chain.from_iterable(row["values"] for row in rows))
    names = column_names(space.search)
    body = []
    for row in rows:
        reported = [cell(row.get(column)) for column in columns]
        drawn = [cell(row["values"].get(path)) for path in paths]
        state = row["state"] + (" by order" if "stopped_by" in row else "")
        body.append([_named(row), state, *reported, *drawn])
    header = ["trial", "state", *columns, *(names[path] for path in paths)]
    return f"{len(rows)} trials", header, body


def _named(row: dict[str, Any]) -> str:
    """Return a trial's number, and that of the failed one which it retries, or of a clone's parent."""
    notes = [f"retries {row['retries']}"] if "retries" in row else []
    if "clone" in row:
        notes.append(f"clone of {row['clone']['parent']} at step {row['clone']['step']}")
    return f"{row['trial']} ({', '.join(notes)})" if notes else str(row["trial"])


def front_table(rows: list[dict[str, Any]], config: TuneConfig) -> Grid:
    """Return the trials that no other beats in every objective, by the further objectives."""
    names = [*config.objectives, config.metric]
    front = sorted((row for row in rows if row["front"]), key=lambda row: row[names[0]])
    body = []
    for row in front:
        values = [cell(row[name]) for name in names]
        body.append([str(row["trial"]), *values])
    return (
        f"Pareto front: {len(front)} trials that none beats in everything",
        ["trial", *names],
        body,
    )


def scores_table(scores: dict[str, Any], title: str, run: RunConfig) -> Grid:
    """Return one row per condition and receiver.

    Columns are EM, F1 and match with their 95 % intervals, nats per answer token, and the costs;
    last the share of tuned full text's EM, where that was read. Latents that were read with changed
    receivers (a feature like ``lora``) are labelled so. The title says what the intervals resample:
    contexts, or rows in results of an earlier version, which did not count them.
    """
    changed = "" if keeps_receivers_frozen(run) else ", not frozen"
    retention = "retention_em" in card.against_text_columns(scores)
    body, contexts = [], []
    for key, receivers in scores.items():
        name = label(key) + (changed if key.split()[0] in MESSAGE_MODES else "")
        for receiver, row in receivers.items():
            if receiver == "mean":
                continue
            answers = [_percent(row, field) for field in ("em", "f1", "match")]
            costs = [cell(row[field]) for field in ("nll", "positions", "bytes", "forward_ms")]
            counts = [str(int(row["rows"])), cell(row.get("contexts"))]
            share = [_percent(row, "retention_em")] if retention else []
            body.append([name, receiver, *answers, *costs, *counts, *share])
            contexts.append(row.get("contexts", 0))
    # Results of before contexts were counted have none of them.
    resampled = f"{max(contexts):,} contexts" if any(contexts) else "rows"
    header = [*SCORES, *([card.AGAINST_TEXT["retention_em"]] if retention else [])]
    return f"{title}; 95 % intervals by resampling {resampled}", header, body


def _percent(row: Mapping[str, float], field: str) -> str:
    """Return a score in percent with its interval; a dash where the row has no such score."""
    if field not in row:
        return "–"
    value, low, high = (100 * row[name] for name in (field, f"{field}_low", f"{field}_high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def against_text_table(scores: dict[str, Any]) -> Grid:
    """Return what each row keeps of full text, per receiver.

    Columns are in percent with 95 % intervals: retention against tuned full text alone, resilience
    and boost against it or, where nobody tuned one, against untuned full text. A dash stands where
    full text has nothing to divide by.
    """
    columns, yardstick = card.against_text_columns(scores), card.full_text(scores)
    # The 0 stands for a table without rows.
    body, contexts = [], [0]
    for key, receivers in scores.items():
        for receiver, row in receivers.items():
            if columns and key != yardstick and receiver != "mean":
                body.append([label(key), receiver, *(_percent(row, column) for column in columns)])
                contexts.append(int(row["contexts"]))
    names = [card.AGAINST_TEXT[column] for column in columns]
    against = label(yardstick) if yardstick else "full text"
    untuned = " as it is read untuned" if yardstick == card.UNTUNED_KEY else ""
    return (
        f"against {against}{untuned}; 95 % intervals by resampling {max(contexts):,} contexts",
        ["the receiver reads", "receiver", *names],
        body,
    )


def weights_table(sizes: Mapping[str, Mapping[str, int]]) -> Grid:
    """Return parameters and bytes of the trained parts: the encoder, and each receiver's own part.

    The encoder's row holds all that receivers share.
    """
    total = {
        "parameters": sum(part["parameters"] for part in sizes.values()),
        "bytes": sum(part["bytes"] for part in sizes.values()),
    }
    parts = {**sizes, "all of the wire": total}
    body = [
        [name, f"{part['parameters']:,}", f"{part['bytes'] / 1e6:,.2f}"]
        for name, part in parts.items()
    ]
    return "trained weights", ["part", "parameters", "MB"], body


def readers_tables(
    readers: Mapping[str, Mapping[str, Mapping[str, Any]]], run: RunConfig
) -> list[Grid]:
    """Return how the text readers of tuned rows were trained; nothing where there are none.

    ``readers``: key of a tuned row → receiver → report.
    """
    body, rows = [], 0
    for key, reports in readers.items():
        reads = label(key).removesuffix(", tuned")
        for receiver, report in reports.items():
            # All of them were trained on the wire's rows.
            rows = rows or report["rows"]
            # A question a row of each batch, again in later epochs.
            asked_of_it = report["steps"] * report["batch_size"]
            line = [reads, receiver, f"{report['tokens']}", f"{report['parameters']:,}"]
            line.append(f"{asked_of_it:,}")
            line.append(f"{report['rate']:.3g}, best of {len(report['trials'])}")
            line.append(f"{report['dev_loss']:.3g}")
            body.append(line)
    if not body:
        return []
    # Batches that are filled by positions have no number of rows that is known beforehand.
    if run.training.batch_size is None:
        asked = f"at most {run.training.epochs * rows:,} questions"
    else:
        asked = f"{budget_of(run, rows).questions:,} questions"
    if run.training.receivers_per_step == "one" and len(run.receivers) > 1:
        asked += f", each through one of its {len(run.receivers)} receivers"
    if run.training.init_from is not None:
        asked += " here, after what it was asked before"
    title = f"text readers, trained on the same {rows:,} rows as the wire, which was asked {asked}"
    header = ["reads", "receiver", "vectors", "parameters", "questions", "rate", "dev NLL"]
    return [(title, header, body)]


def together_table(scores: dict[str, Any]) -> Grid:
    """Return how the receivers do as one, and what a message costs and saves, by condition."""
    body = []
    for key, receivers in scores.items():
        values = [cell(receivers["mean"].get(field)) for field in TOGETHER]
        body.append([label(key), *values])
    return (
        "the receivers together (means over them)",
        ["the receivers read", *TOGETHER.values()],
        body,
    )


def comparisons_table(comparisons: Sequence[dict[str, Any]]) -> Grid:
    """Return paired differences with their 95 % intervals and p values."""
    body = []
    for pair in comparisons:
        names = [label(pair["first"]), label(pair["second"])]
        for receiver, differences in pair["receivers"].items():
            em, f1 = _paired(differences["em"]), _paired(differences["f1"])
            nll = _paired(differences["nll"], factor=1, digits=2)
            body.append([*names, receiver, *em, *f1, *nll])
    return (
        "paired differences; 95 % intervals and p by contexts",
        ["first", "minus second", "receiver", "EM", "p", "F1", "p", "NLL", "p"],
        body,
    )


def _paired(paired: dict[str, float], factor: int = 100, digits: int = 1) -> list[str]:
    """Return a difference with its interval, and p."""
    difference, low, high = (
        f"{factor * paired[end]:+.{digits}f}" for end in ("difference", "low", "high")
    )
    return [f"{difference} [{low}, {high}]", f"{paired['p']:.2g}"]


def reruns_table(finalists: list[Finalist], metric: str) -> Grid:
    """Return the best trials' scores in the search and with fresh seeds: the gap shows the luck."""
    body = []
    for one in finalists:
        fresh = ", ".join(map(cell, one.fresh)) or "–"
        luck = one.score - one.mean
        body.append([str(one.trial), cell(one.score), fresh, cell(one.mean), cell(luck)])
    header = ["trial", "search", "fresh seeds", "mean", "search − mean"]
    return f"re-runs: {metric} with fresh seeds", header, body


def failures_table(rows: list[dict[str, Any]]) -> Grid:
    """Return the failed trials and their causes."""
    failed = [row for row in rows if row["state"] == "failed"]
    body = []
    for row in failed:
        # A process that was killed leaves no words.
        told = row["error"].strip().splitlines() or ["no cause was recorded"]
        body.append([str(row["trial"]), told[-1]])
    return f"{len(body)} trials failed", ["trial", "cause"], body


def trial_tables(rows: list[dict[str, Any]], space: SweepConfig) -> list[Grid]:
    """Return a sweep's trials, those that failed, and the Pareto front of several objectives."""
    front = [front_table(rows, space.tune)] if space.tune.objectives else []
    failed = [failures_table(rows)] if any(row["state"] == "failed" for row in rows) else []
    return [trials_table(rows, space), *failed, *front]


def sweep_tables(
    rows: list[dict[str, Any]],
    finalists: list[Finalist],
    scored: Scored,
    best: Best,
    run: RunConfig,
    space: SweepConfig,
    *,
    brief: bool = False,
) -> list[Grid]:
    """Return the tables that end a sweep: its trials, its re-runs, the winner's scores and weights.

    ``run``: the winner's configuration. ``brief``: those that a console shows.
    """
    reruns = [reruns_table(finalists, space.tune.metric)] if finalists else []
    title = f"{run.data.dataset} validation, best trial {best.trial}"
    ends = scored_tables(scored, title, run)
    return [*trial_tables(rows, space), *reruns, *(ends[:BRIEF] if brief else ends)]


BRIEF = 2
"""Tables of a wire, of those below, that a sweep's console shows; its report has all of them."""


def scored_tables(scored: Scored, title: str, run: RunConfig) -> list[Grid]:
    """Return the tables of a wire: its scores, their costs, and its trained weights."""
    return [
        scores_table(scored.scores, title, run),
        together_table(scored.scores),
        against_text_table(scored.scores),
        weights_table(scored.sizes),
        *readers_tables(scored.readers, run),
    ]


def show(grids: list[Grid]) -> None:
    """Print tables as wide as they need to be: a log file has no terminal to fit.

    A table without rows is left out.
    """
    for title, header, body in (grid for grid in grids if grid[2]):
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in header:
            table.add_column(name, no_wrap=True)
        for row in body:
            table.add_row(*row)
        # Room enough for every column, so that none is folded.
        console = Console(width=40 * len(header))
        console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
        console.print(table)


def verdict(best: Best, gap: dict[str, float], metric: str) -> str:
    """Describe the winner in one line: its development score beside that of the untouched split."""
    line = f"best: trial {best.trial}, step {best.step}, development {metric} {best.score:.4f}"
    return f"{line}, validation {gap['validation']:.4f}, gap {gap['gap']:+.4f}" if gap else line


def write_report(output: Place, line: str, grids: list[Grid], command: str) -> Place:
    """Write ``report.md``: the verdict ``line``, the tables, and the command that made them."""
    lines = [f"# {output.name}", "", f"Command: `{command}`", "", f"{line}."]
    for title, header, body in grids:
        lines += ["", f"## {title}", "", _markdown(header), f"|{'---|' * len(header)}"]
        lines += map(_markdown, body)
    path = output / "report.md"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _markdown(cells: Iterable[str]) -> str:
    """Return a line of a Markdown table; a cell's own strokes and line breaks end no cell."""
    texts = (" ".join(text.split()).replace("|", r"\|") for text in cells)
    return f"| {' | '.join(texts)} |"


def cell(value: Any) -> str:
    """Return a value as a table shows it: three digits, or whole from 100 on; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return repr(value) if isinstance(value, str) else str(value)
    # NaN alone differs from itself.
    if value != value:
        return "nan"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:.0f}"
