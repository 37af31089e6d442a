"""Exact match and F1 by the official rules, per example and for a file of answers.

The arithmetic is that of the official scripts in Python's own floats, so that a file's scores agree to the last digit.
torchmetrics' SQuAD agrees to fp32's seven digits, but for one case: where nothing is left of both answers after
normalisation ("The" and "a"), it gives an F1 of 1 and the SQuAD v1.1 and HotpotQA scripts one of 0. A test holds both.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentwire.config import DataConfig
from latentwire.config.resolve import ConfigError
from latentwire.data import sources

YES_NO = ("yes", "no", "noanswer")
DATASETS = ("squad", "hotpotqa")
"""Datasets whose files of answers can be scored."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only, as in the official scripts: “ and — stay


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def em_f1(prediction: str, golds: Sequence[str], dataset: str = "squad") -> tuple[float, float]:
    """(EM, F1), each 0..1, best over all golds. HotpotQA: a yes/no that is not exactly right scores no F1."""
    scores = [_scores(prediction, gold, dataset) for gold in golds]
    return max(score["em"] for score in scores), max(score["f1"] for score in scores)


def _scores(prediction: str, gold: str, dataset: str) -> dict[str, float]:
    said, right = normalise(prediction), normalise(gold)
    em = float(said == right)
    if dataset == "hotpotqa" and not em and (said in YES_NO or right in YES_NO):
        return {"em": em, "f1": 0.0, "prec": 0.0, "recall": 0.0}
    words, gold_words = said.split(), right.split()
    same = sum((Counter(words) & Counter(gold_words)).values())
    if same == 0:
        return {"em": em, "f1": 0.0, "prec": 0.0, "recall": 0.0}
    precision, recall = 1.0 * same / len(words), 1.0 * same / len(gold_words)
    return {"em": em, "f1": 2 * precision * recall / (precision + recall), "prec": precision, "recall": recall}


def score_file(file: Path, data: DataConfig, split: sources.Split = "validation") -> tuple[dict[str, float], int]:
    """Scores of a file in the dataset's official format, under the official names, and how many questions it leaves out.

    SQuAD: ``{id: answer}``, in percent. HotpotQA: ``{"answer": {id: …}, "sp": {id: [[title, sentence], …]}}``, 0..1; without
    ``sp`` only the answers' scores come. A question that is left out scores 0. Raises
    :class:`~latentwire.config.resolve.ConfigError` for another format and :class:`~latentwire.data.sources.DataError`.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--predictions must be a file of JSON, got {file}: {error}") from error
    hotpot = data.dataset == "hotpotqa"
    answers = document.get("answer") if hotpot and isinstance(document, dict) else document
    if not isinstance(answers, dict) or not all(isinstance(answer, str) for answer in answers.values()):
        wanted = '{"answer": {id: answer}, "sp": …}' if hotpot else "{id: answer}"
        raise ConfigError(f"predictions for {data.dataset} must be {wanted}, {file} is not")
    rows = _rows(data, split)
    missing = sum(_identity(row) not in answers for row in rows)
    if hotpot:
        return _hotpotqa(rows, answers, document.get("sp") or {}), missing
    totals = {"exact_match": 0.0, "f1": 0.0}
    for row in rows:
        if (answer := answers.get(_identity(row))) is not None:
            em, f1 = em_f1(answer, _golds(row))
            totals = {"exact_match": totals["exact_match"] + em, "f1": totals["f1"] + f1}
    return {name: 100.0 * total / len(rows) for name, total in totals.items()}, missing


def question_types(data: DataConfig, split: sources.Split) -> dict[str, str]:
    """id → HotpotQA's own type of question (``bridge``, ``comparison``); empty for other datasets.

    Rows that cannot be read have none: preprocessing counts them.
    """
    found = {}
    for raw in _raw(data, split) if data.dataset == "hotpotqa" else ():
        try:
            row = sources.parsed(raw)
        except sources.RowError:
            continue
        if row.get("type"):
            found[_identity(row)] = str(row["type"])
    return found


def _rows(data: DataConfig, split: sources.Split) -> list[dict[str, Any]]:
    try:
        return [sources.parsed(raw) for raw in _raw(data, split)]
    except sources.RowError as error:
        raise sources.DataError(
            f"official scores need every row of {data.dataset} {split}: {error}; mend the file"
        ) from error


def _raw(data: DataConfig, split: sources.Split) -> Iterator[sources.Row]:
    for piece in sources.pieces(data, split):
        yield from sources.read(data, split, piece)


def _hotpotqa(rows: list[dict[str, Any]], answers: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, float]:
    names = [
        f"{part}{name}"
        for part in ("", *(("sp_", "joint_") if facts else ()))
        for name in ("em", "f1", "prec", "recall")
    ]
    totals = dict.fromkeys(names, 0.0)
    for row in rows:
        own, answer = _identity(row), None
        if own in answers:
            answer = _scores(answers[own], row["answer"], "hotpotqa")
            _add(totals, "", answer)
        if own in facts:
            found = _facts(facts[own], row.get("supporting_facts"))
            _add(totals, "sp_", found)
            if answer is not None:
                _add(totals, "joint_", _joint(answer, found))
    return {name: total / len(rows) for name, total in totals.items()}


def _add(totals: dict[str, float], part: str, scores: Mapping[str, float]) -> None:
    for name, value in scores.items():
        totals[part + name] += value


def _facts(said: Iterable[Sequence[Any]], gold: Any) -> dict[str, float]:
    """Supporting facts as sets of (title, number of the sentence)."""
    pairs = zip(gold["title"], gold["sent_id"], strict=True) if isinstance(gold, dict) else gold or []
    right, own = {(pair[0], int(pair[1])) for pair in pairs}, {(pair[0], int(pair[1])) for pair in said}
    hits, extra, missed = len(own & right), len(own - right), len(right - own)
    precision = 1.0 * hits / (hits + extra) if hits + extra else 0.0
    recall = 1.0 * hits / (hits + missed) if hits + missed else 0.0
    return {"em": float(extra + missed == 0), "f1": _harmonic(precision, recall), "prec": precision, "recall": recall}


def _joint(answer: Mapping[str, float], facts: Mapping[str, float]) -> dict[str, float]:
    precision, recall = answer["prec"] * facts["prec"], answer["recall"] * facts["recall"]
    em, f1 = answer["em"] * facts["em"], _harmonic(precision, recall)
    return {"em": em, "f1": f1, "prec": precision, "recall": recall}


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _identity(row: Mapping[str, Any]) -> str:
    return str(row.get("id", row.get("_id")))


def _golds(row: Mapping[str, Any]) -> list[str]:
    answers = row.get("answers", row.get("answer"))
    answers = answers.get("text") if isinstance(answers, dict) else answers
    return [answers] if isinstance(answers, str) else list(answers or [""])
