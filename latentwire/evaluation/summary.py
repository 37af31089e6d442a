"""From predictions to numbers: means with intervals, the receivers together, comparisons, breakdowns."""

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
    "em", "f1", "nll", "first_1", "first_5", "positions", "bytes", "forward_ms", "encode_ms", "prefill_ms", "decode_ms",
    "first_token_ms",
)  # fmt: skip
"""What a row of the table has the mean of."""
KINDS = 8
"""First words of questions that have a group of their own; the others are ``other``."""


def means(predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    """receiver → means and number of ``rows``, ``mean`` over receivers: what training asks, without intervals and scipy."""
    table = {name: _means(own) for name, own in _by_receiver(predictions).items()}
    return table | {"mean": _over_receivers(table)}


def summarise(predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    """Return receiver → means, 95 % intervals over contexts (``em_low`` …) of EM and F1, ``compression_bytes`` and
    ``compression_tokens`` (context over message), ``examples_per_s``, numbers of ``rows`` and of their ``contexts``.

    ``mean`` is over receivers, with what they are together.
    """
    table: dict[str, dict[str, float]] = {}
    for name, own in _by_receiver(predictions).items():
        contexts = [p.context_id for p in own]
        table[name] = _means(own) | {"contexts": len(set(contexts))}
        for field in ("em", "f1"):
            table[name] |= _bounds(field, [getattr(p, field) for p in own], contexts)
        sent, places = sum(p.bytes for p in own), sum(p.message_positions for p in own)
        if sent and places:  # a closed book compresses nothing
            table[name]["compression_bytes"] = sum(p.context_bytes for p in own) / sent
            table[name]["compression_tokens"] = sum(p.context_tokens for p in own) / places
        spent = sum(table[name][f"{part}_ms"] for part in ("encode", "prefill", "decode"))
        table[name]["examples_per_s"] = 1000 / spent
    return table | {"mean": _over_receivers(table) | together(predictions)}


def _means(own: Sequence[Prediction]) -> dict[str, float]:
    return {field: _mean(own, field) for field in FIELDS} | {"rows": len(own)}


def _over_receivers(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means of what all have but for intervals, which would be no interval of the mean."""
    rows = list(table.values())
    kept = [field for field in rows[0] if all(field in row for row in rows) and not field.endswith(("_low", "_high"))]
    return {field: sum(row[field] for row in rows) / len(rows) for field in kept}


def together(predictions: Sequence[Prediction]) -> dict[str, float]:
    """What several receivers are as one: how often they say the same (``agreement``), the best of their answers
    (``oracle_em``, ``oracle_f1``), and the answer that all of them together find likeliest (``joint_em``, ``joint_f1``).

    Empty for one receiver; without ``joint_…`` where they disagreed and were not asked.
    """
    own = _by_receiver(predictions)
    if len(own) < 2:
        return {}
    rows = list(zip(*own.values(), strict=True))
    found = {
        "agreement": float(np.mean([len({p.text for p in row}) == 1 for row in rows])),
        "oracle_em": float(np.mean([max(p.em for p in row) for row in rows])),
        "oracle_f1": float(np.mean([max(p.f1 for p in row) for row in rows])),
    }
    if any(len({p.text for p in row}) > 1 and row[0].joint_logp is None for row in rows):
        return found
    chosen = [max(row, key=lambda p: 0.0 if p.joint_logp is None else p.joint_logp) for row in rows]
    for field in ("em", "f1"):
        values = [getattr(p, field) for p in chosen]
        bounds = _bounds(f"joint_{field}", values, [p.context_id for p in chosen])
        found |= {f"joint_{field}": float(np.mean(values))} | bounds
    return found


def compare(first: Sequence[Prediction], second: Sequence[Prediction]) -> dict[str, dict[str, dict[str, float]]]:
    """receiver (and ``mean`` over them) → ``em``, ``f1`` and ``nll`` → paired ``difference`` with ``low``, ``high`` and ``p``.

    Both must be of the same rows in the same order; contexts are resampled.
    """
    one, other = _by_receiver(first), _by_receiver(second)
    if [(p.id, p.receiver) for p in first] != [(p.id, p.receiver) for p in second]:
        raise ValueError("predictions must be of the same rows in the same order to be compared")
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in (*one, "mean")}
    contexts = [p.context_id for p in next(iter(one.values()))]
    for field in ("em", "f1", "nll"):
        values = {
            name: np.array([[getattr(p, field) for p in side[name]] for side in (one, other)], np.float64)
            for name in one
        }
        values["mean"] = np.mean(list(values.values()), axis=0)
        for name, (a, b) in values.items():
            found[name][field] = difference(a, b, contexts)
    return found


def pairs(conditions: Iterable[Condition], first: str, second: str) -> list[tuple[str, str]]:
    """Keys of the rows to compare: those two, or, where only modes are named, all of them with the same budget."""
    conditions = list(conditions)

    def named(name: str) -> list[Condition]:
        return [s for s in conditions if s.key == name] or [s for s in conditions if s.mode == name]

    found = [
        (a.key, b.key)
        for a in named(first)
        for b in named(second)
        if a.key != b.key and (a.budget == b.budget or a.budget is None or b.budget is None or first != a.mode)
    ]
    return found


def baseline_pairs(conditions: Sequence[Condition]) -> list[tuple[str, str]]:
    """Every row of latents beside each of its baselines."""
    others = dict.fromkeys(s.mode for s in conditions if s.mode != "latent")
    return [pair for mode in others for pair in pairs(conditions, "latent", mode)]


def details(
    predictions: Mapping[str, Sequence[Prediction]],
    compared: Sequence[tuple[str, str]] = (),
    types: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What goes beyond the table: ``comparisons`` of the rows ``compared``, by their keys; ``breakdown`` and ``distinct``
    (different answers over rows) of each row of the table.
    """
    return {
        "comparisons": [
            {"first": a, "second": b, "receivers": compare(predictions[a], predictions[b])} for a, b in compared
        ],
        "breakdown": {key: breakdown(found, types) for key, found in predictions.items()},
        "distinct": {
            key: {name: len({p.text for p in own}) / len(own) for name, own in _by_receiver(found).items()}
            for key, found in predictions.items()
        },
    }


def breakdown(
    predictions: Sequence[Prediction], types: Mapping[str, str] | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """``length`` (thirds by the context's bytes), ``question`` (its first word) and, where ``types`` names any by the row's id,
    ``type`` → group → rows, EM and F1, mean over receivers."""
    words = Counter(_kind(p.question) for p in predictions)
    common = {word for word, _ in words.most_common(KINDS)}
    edges = np.quantile([p.context_bytes for p in predictions], [0, 1 / 3, 2 / 3, 1])
    names = [f"{low:.0f} to {high:.0f} bytes" for low, high in itertools.pairwise(edges)]
    groups: dict[str, dict[str, list[Prediction]]] = {"length": {name: [] for name in names}, "question": {}}
    for p in predictions:
        third = int(np.searchsorted(edges[1:-1], p.context_bytes, side="left"))
        groups["length"][names[third]].append(p)
        kind = _kind(p.question)
        groups["question"].setdefault(kind if kind in common else "other", []).append(p)
        if types:
            groups.setdefault("type", {}).setdefault(types.get(p.id, "other"), []).append(p)
    receivers = len(_by_receiver(predictions))
    return {
        by: {
            name: {"rows": len(own) // receivers, "em": _mean(own, "em"), "f1": _mean(own, "f1")}
            for name, own in sorted(parts.items(), key=lambda item: (by != "length") * -len(item[1]))
            if own
        }
        for by, parts in groups.items()
    }


def _kind(question: str) -> str:
    words = question.lower().split()
    return words[0].strip("?.,:;\"'") if words else ""


def _by_receiver(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    found: dict[str, list[Prediction]] = {}
    for p in predictions:
        found.setdefault(p.receiver, []).append(p)
    return found


def _bounds(field: str, values: list[float], contexts: list[str]) -> dict[str, float]:
    low, high = interval(values, contexts)
    return {f"{field}_low": low, f"{field}_high": high}


def _mean(predictions: Sequence[Prediction], field: str) -> float:
    values: list[Any] = [getattr(p, field) for p in predictions]
    return float(sum(values)) / len(values)
