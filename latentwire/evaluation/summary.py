"""Summaries of predictions: means with intervals, receivers together, comparisons, breakdowns."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.evaluator import Prediction
from latentwire.evaluation.statistics import difference, interval

FIELDS = (
    "em",
    "f1",
    "match",
    "nll",
    "first_1",
    "first_5",
    "positions",
    "bytes",
    "forward_ms",
    "encode_ms",
    "prefill_ms",
    "decode_ms",
    "first_token_ms",
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
            row |= _bounds(field, [getattr(p, field) for p in answers], contexts)
        sent_bytes = sum(p.bytes for p in answers)
        positions = sum(p.message_positions for p in answers)
        if sent_bytes and positions:  # a closed book compresses nothing
            row["compression_bytes"] = sum(p.context_bytes for p in answers) / sent_bytes
            row["compression_tokens"] = sum(p.context_tokens for p in answers) / positions
        row["examples_per_s"] = 1000 / (row["encode_ms"] + row["prefill_ms"] + row["decode_ms"])
        table[name] = row
    return table | {"mean": _over_receivers(table) | together(predictions)}


def _means(predictions: Sequence[Prediction]) -> dict[str, float]:
    means = {field: _mean(predictions, field) for field in FIELDS}
    return means | {"rows": len(predictions)}


def _over_receivers(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Average over receivers what all of them have, except intervals, which have no mean."""
    rows = list(table.values())
    return {
        field: sum(row[field] for row in rows) / len(rows)
        for field in rows[0]
        if all(field in row for row in rows) and not field.endswith(("_low", "_high"))
    }


def together(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return how several receivers do as one; empty for one receiver.

    ``agreement``: how often they say the same. ``oracle_em``, ``oracle_f1``: the best of their
    answers. ``joint_em``, ``joint_f1``: the answer that all of them together find likeliest; left
    out where they disagreed and were not asked.
    """
    by_receiver = _by_receiver(predictions)
    if len(by_receiver) < 2:
        return {}
    rows = list(zip(*by_receiver.values(), strict=True))
    agreed = [len({p.text for p in row}) == 1 for row in rows]
    scores = {
        "agreement": float(np.mean(agreed)),
        "oracle_em": float(np.mean([max(p.em for p in row) for row in rows])),
        "oracle_f1": float(np.mean([max(p.f1 for p in row) for row in rows])),
    }
    if any(row[0].joint_logp is None and not same for row, same in zip(rows, agreed, strict=True)):
        return scores
    likeliest = [max(row, key=lambda p: p.joint_logp or 0.0) for row in rows]
    for field in ("em", "f1"):
        values = [getattr(p, field) for p in likeliest]
        scores[f"joint_{field}"] = float(np.mean(values))
        scores |= _bounds(f"joint_{field}", values, [p.context_id for p in likeliest])
    return scores


def compare(
    first: Sequence[Prediction], second: Sequence[Prediction]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return receiver (and ``mean`` over them) → ``em``, ``f1``, ``nll`` → paired difference.

    A difference has ``difference``, ``low``, ``high`` and ``p``. Both must be of the same rows in
    the same order; contexts are resampled.
    """
    if [(p.id, p.receiver) for p in first] != [(p.id, p.receiver) for p in second]:
        raise ValueError("predictions must be of the same rows in the same order to be compared")
    one, other = _by_receiver(first), _by_receiver(second)
    differences: dict[str, dict[str, dict[str, float]]] = {name: {} for name in (*one, "mean")}
    contexts = [p.context_id for p in next(iter(one.values()))]
    for field in ("em", "f1", "nll"):
        a_RN = np.array([[getattr(p, field) for p in one[name]] for name in one], np.float64)
        b_RN = np.array([[getattr(p, field) for p in other[name]] for name in one], np.float64)
        for name, a_N, b_N in zip(one, a_RN, b_RN, strict=True):
            differences[name][field] = difference(a_N, b_N, contexts)
        differences["mean"][field] = difference(a_RN.mean(0), b_RN.mean(0), contexts)
    return differences


def pairs(conditions: Iterable[Condition], first: str, second: str) -> list[tuple[str, str]]:
    """Return keys of the rows to compare: those two, or all of two modes with the same budget."""
    conditions = list(conditions)

    def named(name: str) -> list[Condition]:
        by_key = [condition for condition in conditions if condition.key == name]
        return by_key or [condition for condition in conditions if condition.mode == name]

    compared = []
    for a, b in itertools.product(named(first), named(second)):
        same_budget = a.budget == b.budget or a.budget is None or b.budget is None
        if a.key != b.key and (same_budget or first != a.mode):
            compared.append((a.key, b.key))
    return compared


def baseline_pairs(conditions: Sequence[Condition]) -> list[tuple[str, str]]:
    """Return every row of latents beside each of its baselines."""
    others = dict.fromkeys(row.mode for row in conditions if row.mode != "latent")
    return [pair for mode in others for pair in pairs(conditions, "latent", mode)]


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


def _distinct(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return receiver → different answers over rows."""
    by_receiver = _by_receiver(predictions)
    return {
        name: len({p.text for p in answers}) / len(answers) for name, answers in by_receiver.items()
    }


def breakdown(
    predictions: Sequence[Prediction], types: Mapping[str, str] | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the scores of groups of rows: group → rows, EM and F1, mean over receivers.

    Rows are grouped by ``length`` (thirds by the context's bytes), ``question`` (its first word)
    and, where ``types`` names any by the row's id, ``type``.
    """
    words = Counter(_kind(p.question) for p in predictions)
    common = {word for word, _ in words.most_common(KINDS)}
    edges = np.quantile([p.context_bytes for p in predictions], [0, 1 / 3, 2 / 3, 1])
    names = [f"{low:.0f} to {high:.0f} bytes" for low, high in itertools.pairwise(edges)]
    groups: dict[str, dict[str, list[Prediction]]] = {
        "length": {name: [] for name in names},
        "question": {},
    }
    for p in predictions:
        third = int(np.searchsorted(edges[1:-1], p.context_bytes, side="left"))
        groups["length"][names[third]].append(p)
        kind = _kind(p.question)
        groups["question"].setdefault(kind if kind in common else "other", []).append(p)
        if types:
            groups.setdefault("type", {}).setdefault(types.get(p.id, "other"), []).append(p)
    receivers = len(_by_receiver(predictions))
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for by, members in groups.items():
        # Lengths stay in their order; of other groups the largest comes first.
        names = list(members)
        if by != "length":
            names.sort(key=lambda name, members=members: -len(members[name]))  # type: ignore[misc]
        scores[by] = {
            name: {
                "rows": len(members[name]) // receivers,
                "em": _mean(members[name], "em"),
                "f1": _mean(members[name], "f1"),
            }
            for name in names
            if members[name]
        }
    return scores


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
    values: list[Any] = [getattr(p, field) for p in predictions]
    return float(sum(values)) / len(values)
