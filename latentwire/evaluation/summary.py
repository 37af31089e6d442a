"""Summaries of predictions: means with intervals, receivers together, comparisons, breakdowns."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from latentwire import card
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.predictions import Prediction
from latentwire.evaluation.statistics import difference, interval, ratio

FIELDS = tuple(
    "em f1 match nll first_1 first_5 positions bytes forward_ms encode_ms prefill_ms decode_ms "
    "first_token_ms".split()
)
"""Fields of a prediction whose mean a row of the table has."""
SCORES = ("em", "f1", "match")
"""Those of an answer, 0..1 each, which have intervals."""
KINDS = 8
"""First words of questions that have a group of their own; the others are ``other``."""


def means(predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    """Return receiver → means and number of ``rows``, and ``mean`` over receivers.

    Training uses it: it needs no intervals and no scipy.
    """
    table = {name: _means(answers) for name, answers in _by_receiver(predictions).items()}
    return table | {"mean": _over_receivers(table)}


def summarise(predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    """Return receiver → means and 95 % intervals over contexts.

    EM, F1 and match have ``em_low`` … beside them. Also: ``compression_bytes`` and ``compression_tokens``
    (context over message), ``examples_per_s``, numbers of ``rows`` and of their ``contexts``.
    ``mean`` is over receivers, with what they are together.
    """
    table: dict[str, dict[str, float]] = {}
    for name, answers in _by_receiver(predictions).items():
        contexts = [p.context_id for p in answers]
        row = _means(answers) | {"contexts": len(set(contexts))}
        for field in SCORES:
            row |= _bounds(field, _values(answers, field), contexts)
        sent_bytes = sum(p.bytes for p in answers)
        positions = sum(p.message_positions for p in answers)
        # Ratios of sums, not means of ratios; a closed book compresses nothing.
        if sent_bytes and positions:
            row["compression_bytes"] = sum(p.context_bytes for p in answers) / sent_bytes
            row["compression_tokens"] = sum(p.context_tokens for p in answers) / positions
        # Each time is a batch's, shared out over its rows: ms an example.
        row["examples_per_s"] = 1000 / (row["encode_ms"] + row["prefill_ms"] + row["decode_ms"])
        table[name] = row
    return table | {"mean": _over_receivers(table) | together(predictions)}


def _means(predictions: Sequence[Prediction]) -> dict[str, float]:
    means = {field: _mean(predictions, field) for field in FIELDS}
    return means | {"rows": len(predictions)}


def _values(answers: Sequence[Prediction], field: str) -> list[Any]:
    """Return one field of each answer."""
    return [getattr(p, field) for p in answers]


def _different(answers: Sequence[Prediction]) -> int:
    """Count the different texts among answers."""
    return len({p.text for p in answers})


def _over_receivers(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Average over receivers what all of them have, except intervals, which have no mean."""
    rows = list(table.values())
    means: dict[str, float] = {}
    for field in rows[0]:
        values = [row[field] for row in rows if field in row]
        if len(values) == len(rows) and not field.endswith(("_low", "_high")):
            means[field] = sum(values) / len(rows)
    return means


def together(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return how several receivers do as one; empty for one receiver.

    ``agreement``: how often they say the same. ``oracle_em``, ``oracle_f1``: the best of their
    answers. ``joint_em``, ``joint_f1``: the answer that all of them together find likeliest; left
    out where they disagreed and were not asked.
    """
    by_receiver = _by_receiver(predictions)
    if len(by_receiver) < 2:
        return {}
    # Each is one row's answers, a receiver's each.
    rows = list(zip(*by_receiver.values(), strict=True))
    agreed = [_different(row) == 1 for row in rows]
    scores = {
        "agreement": float(np.mean(agreed)),
        "oracle_em": float(np.mean([max(_values(row, "em")) for row in rows])),
        "oracle_f1": float(np.mean([max(_values(row, "f1")) for row in rows])),
    }
    disagreed = [row for row, same in zip(rows, agreed, strict=True) if not same]
    if any(row[0].joint_logp is None for row in disagreed):
        return scores
    # Where they agree nobody is asked: any of the equal answers is the likeliest.
    likeliest = [max(row, key=lambda p: p.joint_logp or 0.0) for row in rows]
    for field in ("em", "f1"):
        values = _values(likeliest, field)
        scores[f"joint_{field}"] = float(np.mean(values))
        scores |= _bounds(f"joint_{field}", values, _values(likeliest, "context_id"))
    return scores


def compare(
    first: Sequence[Prediction], second: Sequence[Prediction]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return receiver (and ``mean`` over them) → ``em``, ``f1``, ``nll`` → paired difference.

    A difference has ``difference``, ``low``, ``high`` and ``p``. Both must be of the same rows in
    the same order; contexts are resampled.
    """
    one, other = _paired(first, second)
    differences: dict[str, dict[str, dict[str, float]]] = {name: {} for name in (*one, "mean")}
    # All receivers have the same rows in the same order.
    contexts = [p.context_id for p in next(iter(one.values()))]
    for field in ("em", "f1", "nll"):
        # [receivers, rows]
        a_RN = np.array([_values(one[name], field) for name in one], np.float64)
        b_RN = np.array([_values(other[name], field) for name in one], np.float64)
        for name, a_N, b_N in zip(one, a_RN, b_RN, strict=True):
            differences[name][field] = difference(a_N, b_N, contexts)
        differences["mean"][field] = difference(a_RN.mean(0), b_RN.mean(0), contexts)
    return differences


def _paired(
    first: Sequence[Prediction], second: Sequence[Prediction]
) -> tuple[dict[str, list[Prediction]], dict[str, list[Prediction]]]:
    """Return both by receiver; raises :class:`ValueError` where their rows are not the same."""
    one, other = _by_receiver(first), _by_receiver(second)
    rows = {name: _values(answers, "id") for name, answers in one.items()}
    if rows != {name: _values(answers, "id") for name, answers in other.items()}:
        raise ValueError("predictions must be of the same rows in the same order to be compared")
    return one, other


def against_text(
    predictions: Mapping[str, Sequence[Prediction]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Return what each row keeps of full text, by its key → receiver (and ``mean``) → metrics.

    Full text is the tuned row where there is one, else the untuned one, and the names of the
    metrics say which. Without either nothing is returned, nor for full text itself.

    - ``retention_em``, ``retention_f1``, ``retention_match``: the row's score over that of tuned
      full text on the same rows. There is none against untuned text: a reader that nobody trained
      is a yardstick that a trained wire can pass. BenchPress (arXiv 2510.20797) too normalises
      scores by the teacher's; the ratio of sums is our definition.
    - ``resilience_tuned_text`` (or ``_untuned_text``): of the rows that full text gets exactly
      right, the share that this one gets right; ``boost_…``: the same of those that full text gets
      wrong. Both after DEX-Comp (arXiv 2609.05152).

    Each has ``…_low`` and ``…_high``, its 95 % interval by resampled contexts; ``mean`` has none. A
    metric whose denominator is 0 is left out.
    """
    yardstick = card.full_text(predictions)
    if yardstick is None:
        return {}
    return {
        key: _against(answers, predictions[yardstick], yardstick)
        for key, answers in predictions.items()
        if key != yardstick
    }


def _against(
    answers: Sequence[Prediction], full_text: Sequence[Prediction], yardstick: str
) -> dict[str, dict[str, float]]:
    """Return receiver → metrics of one row of the table against full text."""
    table: dict[str, dict[str, float]] = {}
    by_receiver, of_text = _paired(answers, full_text)
    for name, rows in by_receiver.items():
        # [scores, rows]; EM is the first of them, 1 where an answer is exactly right.
        a_FN = np.array([_values(rows, field) for field in SCORES])
        b_FN = np.array([_values(of_text[name], field) for field in SCORES])
        em_N, right_N = a_FN[0], b_FN[0]
        # Metric → (part, whole), both by row: a share is Σ part / Σ whole.
        fractions = {
            "resilience": (em_N * right_N, right_N),
            "boost": (em_N * (1 - right_N), 1 - right_N),
        }
        text = "tuned_text" if yardstick == card.TUNED_TEXT else "untuned_text"
        fractions = {f"{metric}_{text}": both for metric, both in fractions.items()}
        if yardstick == card.TUNED_TEXT:
            for field, a_N, b_N in zip(SCORES, a_FN, b_FN, strict=True):
                fractions[f"retention_{field}"] = (a_N, b_N)
        table[name] = {}
        # A share whose whole is 0 is left out.
        for metric, (part_N, whole_N) in fractions.items():
            share = ratio(part_N.tolist(), whole_N.tolist(), [p.context_id for p in rows])
            if share is not None:
                names = (metric, f"{metric}_low", f"{metric}_high")
                table[name] |= dict(zip(names, share, strict=True))
    return table | {"mean": _over_receivers(table)}


def pairs(conditions: Iterable[Condition], first: str, second: str) -> list[tuple[str, str]]:
    """Return keys of the rows to compare: those two, or all of two kinds with the same budget.

    A kind is a mode, of its untuned rows alone, or a mode and ``tuned``, as ``truncated tuned``.
    """
    conditions = list(conditions)

    def named(name: str) -> list[Condition]:
        by_key = [condition for condition in conditions if condition.key == name]
        return by_key or [condition for condition in conditions if _row_kind(condition) == name]

    compared = []
    for a, b in itertools.product(named(first), named(second)):
        # A row without a budget, such as full text, stands beside all of them.
        same_budget = a.budget == b.budget or a.budget is None or b.budget is None
        # Two rows that were named by their keys are compared, whatever their budgets.
        if a.key != b.key and (same_budget or first != _row_kind(a)):
            compared.append((a.key, b.key))
    return compared


def baseline_pairs(conditions: Sequence[Condition]) -> list[tuple[str, str]]:
    """Return every row of latents beside each of its baselines.

    Tuned text that is cut to the message's positions comes first: it had the same training and the
    same room as the latents.
    """
    others = dict.fromkeys(_row_kind(row) for row in conditions if row.mode != "latent")
    fairest = _row_kind(Condition("truncated", tuned=True))
    # False sorts before True, and the sort is stable: the fairest first, the others as they were.
    ordered = sorted(others, key=lambda kind: kind != fairest)
    compared = []
    for kind in ordered:
        compared += pairs(conditions, "latent", kind)
    return compared


def _row_kind(condition: Condition) -> str:
    """Return a row's mode, followed by ``tuned`` where it is."""
    return Condition(condition.mode, tuned=condition.tuned).key


def details(
    predictions: Mapping[str, Sequence[Prediction]],
    compared: Sequence[tuple[str, str]] = (),
    types: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what goes beyond the table.

    ``comparisons`` are of the rows ``compared``, by their keys. Each row of the table has a
    ``breakdown``, and ``distinct``: different answers over rows.
    """
    comparisons = []
    for first, second in compared:
        receivers = compare(predictions[first], predictions[second])
        comparisons.append({"first": first, "second": second, "receivers": receivers})
    return {
        "comparisons": comparisons,
        "breakdown": {key: breakdown(of_row, types) for key, of_row in predictions.items()},
        "distinct": {key: _distinct(of_row) for key, of_row in predictions.items()},
    }


def by_document(
    predictions: Mapping[str, Sequence[Prediction]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Return intervals that resample documents, by a row's key → receiver → metrics.

    Contexts of one document are not independent either: what a receiver knows of its subject helps
    with all of them. ``documents`` is their number; EM, F1 and match have ``em_low``, ``em_high``
    and ``em_wider``: how much wider this interval is than that over contexts, left out where the
    latter has no width. Empty where all rows are of one document, which has no interval, or every
    context is a document of its own, which gives the same one.
    """
    answers = next(iter(predictions.values()), ())
    documents, contexts = {p.document for p in answers}, {p.context_id for p in answers}
    if not 1 < len(documents) < len(contexts):
        return {}
    intervals: dict[str, dict[str, dict[str, float]]] = {key: {} for key in predictions}
    for key, of_row in predictions.items():
        for name, rows in _by_receiver(of_row).items():
            intervals[key][name] = _by_document(rows) | {"documents": len(documents)}
    return intervals


def _by_document(rows: Sequence[Prediction]) -> dict[str, float]:
    """Return one receiver's intervals by resampled documents."""
    intervals: dict[str, float] = {}
    for field in SCORES:
        values = _values(rows, field)
        bounds = _bounds(field, values, [p.document for p in rows])
        low, high = interval(values, [p.context_id for p in rows])
        intervals |= bounds
        # How much wider than over contexts, where that one has a width.
        if high > low:
            width = bounds[f"{field}_high"] - bounds[f"{field}_low"]
            intervals[f"{field}_wider"] = width / (high - low)
    return intervals


def wider_by_document(intervals: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str | None:
    """Say how much wider intervals by document are; ``None`` where there is nothing to say.

    ``intervals``: those of :func:`by_document`.
    """
    rows: list[Mapping[str, float]] = []
    for receivers in intervals.values():
        rows += receivers.values()
    wider = []
    for field in SCORES:
        wider += [row[f"{field}_wider"] for row in rows if f"{field}_wider" in row]
    if not wider:
        return None
    return (
        f"the rows are of {int(rows[0]['documents']):,} documents; intervals that resample those "
        f"are {np.median(wider):.1f} times as wide as over contexts (median; at most "
        f"{max(wider):.1f})"
    )


def _distinct(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return receiver → different answers over rows."""
    by_receiver = _by_receiver(predictions)
    return {name: _different(answers) / len(answers) for name, answers in by_receiver.items()}


def breakdown(
    predictions: Sequence[Prediction], types: Mapping[str, str] | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the scores of groups of rows: group → rows, EM and F1, mean over receivers.

    Rows are grouped by ``length`` (thirds by the context's bytes), ``question`` (its first word)
    and, where ``types`` names any by the row's id, ``type``.
    """
    words = Counter(_kind(p.question) for p in predictions)
    common = {word for word, _ in words.most_common(KINDS)}
    # Four edges of three parts with about as many rows each.
    edges = np.quantile([p.context_bytes for p in predictions], [0, 1 / 3, 2 / 3, 1])
    names = [f"{low:.0f} to {high:.0f} bytes" for low, high in itertools.pairwise(edges)]
    groups: dict[str, dict[str, list[Prediction]]] = {
        "length": {name: [] for name in names},
        "question": {},
    }
    for p in predictions:
        # 0, 1 or 2: how many of the two inner edges lie below.
        third = int(np.searchsorted(edges[1:-1], p.context_bytes, side="left"))
        groups["length"][names[third]].append(p)
        kind = _kind(p.question)
        groups["question"].setdefault(kind if kind in common else "other", []).append(p)
        if types:
            groups.setdefault("type", {}).setdefault(types.get(p.id, "other"), []).append(p)
    # A row counts once, however many receivers answer it.
    receivers = len(_by_receiver(predictions))
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for by, members in groups.items():
        # Lengths stay in their order; of other groups the largest comes first.
        names = list(members)
        if by != "length":
            names.sort(key=lambda name, members=members: -len(members[name]))  # type: ignore[misc]
        scores[by] = {name: _group(members[name], receivers) for name in names if members[name]}
    return scores


def _group(answers: Sequence[Prediction], receivers: int) -> dict[str, float]:
    """Return the number of rows and the mean scores of one group of a breakdown."""
    rows = len(answers) // receivers
    return {"rows": rows, "em": _mean(answers, "em"), "f1": _mean(answers, "f1")}


def _kind(question: str) -> str:
    words = question.lower().split()
    return words[0].strip("?.,:;\"'") if words else ""


def _by_receiver(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    by_receiver: dict[str, list[Prediction]] = {}
    for p in predictions:
        by_receiver.setdefault(p.receiver, []).append(p)
    return by_receiver


def _bounds(field: str, values: list[float], contexts: list[str]) -> dict[str, float]:
    low, high = interval(values, contexts)
    return {f"{field}_low": low, f"{field}_high": high}


def _mean(predictions: Sequence[Prediction], field: str) -> float:
    values = _values(predictions, field)
    return float(sum(values)) / len(values)
