"""Exact match and F1 by the official rules, per example."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torchmetrics.functional.text import squad

YES_NO = ("yes", "no", "noanswer")


def em_f1(prediction: str, golds: Sequence[str], dataset: str = "squad") -> tuple[float, float]:
    """(EM, F1), each 0..1, best over all golds. HotpotQA: a yes/no that is not exactly right scores no F1."""
    scores = [_score(prediction, [gold]) for gold in golds]
    if dataset == "hotpotqa":
        scores = [
            (em, 0.0 if em < 1 and (_is_yes_no(prediction) or _is_yes_no(gold)) else f1)
            for (em, f1), gold in zip(scores, golds, strict=True)
        ]
    return max(em for em, _ in scores), max(f1 for _, f1 in scores)


def _score(prediction: str, golds: list[str]) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = squad(
            [{"prediction_text": prediction, "id": "0"}],
            [{"answers": {"answer_start": [0] * len(golds), "text": golds}, "id": "0"}],
        )
    return float(result["exact_match"]) / 100, float(result["f1"]) / 100


def _is_yes_no(text: str) -> bool:
    return any(_score(text, [word])[0] == 1 for word in YES_NO)
