"""Exact match and F1 by the official rules, per example and for a file of answers.

The arithmetic is that of the official scripts in Python's own floats, so that a file's scores agree
to the last digit. torchmetrics' SQuAD agrees to fp32's seven digits, but for one case: where
nothing is left of both answers after normalisation ("The" and "a"), it gives an F1 of 1 and the
SQuAD v1.1 and HotpotQA scripts one of 0. A test holds both.
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
from latentwire.dataset import DATASETS

YES_NO = ("yes", "no", "noanswer")
PARTS = ("em", "f1", "prec", "recall")
"""Scores of a part of an answer to HotpotQA, by their official names."""
SHOWN = 80
"""Characters of a value that a message quotes."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# ASCII only, as in the official scripts: “ and — stay.
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Return a text in lower case without ASCII punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def em_f1(
    prediction: str, golds: Sequence[str], dataset: str = "squad", no_answer: str | None = None
) -> tuple[float, float]:
    """Return (EM, F1), each 0..1, best over all golds.

    HotpotQA: a yes/no that is not exactly right scores no F1. ``no_answer``: what says that a text
    does not answer; as in SQuAD 2.0's script it is right or wrong, and its words earn no F1.
    """
    scores = [_scores(prediction, gold, dataset) for gold in golds]
    if no_answer is not None and list(golds) == [no_answer]:
        return scores[0]["em"], scores[0]["em"]
    return max(score["em"] for score in scores), max(score["f1"] for score in scores)


def match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1 where a gold answer occurs in ``prediction``, else 0.

    Both are normalised by the official rules, and whole words must agree: "art" is not in "party".
    A gold answer of which nothing is left occurs only where nothing is left of the prediction. So
    what matches exactly also occurs.
    """
    # A space on either side of both: whole words alone are in one another.
    text = f" {normalise(prediction)} "
    return float(any(f" {normalise(gold)} " in text for gold in golds))


def _scores(prediction: str, gold: str, dataset: str) -> dict[str, float]:
    answer, right = normalise(prediction), normalise(gold)
    em = float(answer == right)
    # "yes" is no part of "yes he did": a word in common earns nothing here.
    if DATASETS[dataset].exact_yes_no and not em and (answer in YES_NO or right in YES_NO):
        return {"em": em, "f1": 0.0, "prec": 0.0, "recall": 0.0}
    words, gold_words = answer.split(), right.split()
    # Words in both, each as often as in the one that has it less often.
    same = sum((Counter(words) & Counter(gold_words)).values())
    if same == 0:
        return {"em": em, "f1": 0.0, "prec": 0.0, "recall": 0.0}
    # F1 = 2PR / (P + R), in the official scripts' order of operations: the last digit is theirs.
    precision, recall = 1.0 * same / len(words), 1.0 * same / len(gold_words)
    f1 = 2 * precision * recall / (precision + recall)
    return {"em": em, "f1": f1, "prec": precision, "recall": recall}


def score_file(
    file: Path, data: DataConfig, split: sources.Split = "validation"
) -> tuple[dict[str, float], int]:
    """Score a file in the dataset's official format, under the official names.

    Returns the scores, and how many questions the file leaves out; those score 0. SQuAD: ``{id:
    answer}``, in percent; where the dataset has questions without an answer, as SQuAD 2.0 has, by
    the rules and names of its own script. HotpotQA: ``{"answer": {id: …}, "sp": {id: [[title,
    sentence], …]}}``, 0..1; without ``sp`` only the answers' scores come. Raises
    :class:`~latentwire.config.resolve.ConfigError` for another format and
    :class:`~latentwire.data.sources.DataError`.
    """
    try:
        # utf-8-sig: with or without a byte order mark.
        document = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--predictions must be a file of JSON, got {file}: {error}") from error
    if data.source.official_scores is None:
        scored = ", ".join(name for name, dataset in DATASETS.items() if dataset.official_scores)
        raise ConfigError(
            f"--predictions must be for a dataset with official scores, {scored}; got {data.dataset}"
        )
    hotpot = data.source.official_scores == "hotpotqa"
    answers = document.get("answer") if hotpot and isinstance(document, dict) else document
    if not isinstance(answers, dict):
        form = '{"answer": {id: answer}, "sp": …}' if hotpot else "{id: answer}"
        raise ConfigError(f"predictions for {data.dataset} must be {form}, {file} is not")
    for identity, answer in answers.items():
        if not isinstance(answer, str):
            raise ConfigError(
                f"predictions for {data.dataset} must give each question's answer as text, {file} "
                f"has {_shown(answer)} for {identity}"
            )
    facts = _checked_facts(document.get("sp"), file) if hotpot else {}
    rows = _rows(data, split)
    missing = sum(_identity(row) not in answers for row in rows)
    if hotpot:
        return _hotpotqa(rows, answers, facts), missing
    return _squad(rows, answers), missing


def _checked_facts(facts: Any, file: Path) -> Mapping[str, Sequence[Any]]:
    """Return the supporting facts of a file of predictions, by question; none where it has none."""
    rule = 'predictions for hotpotqa must give supporting facts as "sp": {id: [[title, number of the sentence], …]}'
    if not isinstance(facts, dict | None):
        raise ConfigError(f"{rule}, {file} has {_shown(facts)}")
    for identity, pairs in (facts or {}).items():
        if not isinstance(pairs, list) or not all(map(_is_fact, pairs)):
            raise ConfigError(f"{rule}, {file} has {_shown(pairs)} for {identity}")
    return facts or {}


def _is_fact(pair: Any) -> bool:
    """Return whether a pair is a title and a sentence's number; JSON's ``true`` is no number."""
    return isinstance(pair, list) and [type(part) for part in pair] == [str, int]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:SHOWN]


def question_types(data: DataConfig, split: sources.Split) -> dict[str, str]:
    """Return id → HotpotQA's own type of question (``bridge``, ``comparison``).

    Empty for other datasets. Rows that cannot be read have none: preprocessing counts them.
    """
    types = {}
    is_hotpotqa = data.source.official_scores == "hotpotqa"
    for raw in _raw(data, split) if is_hotpotqa else ():
        try:
            row = sources.parsed(raw)
        except sources.RowError:
            continue
        if row.get("type"):
            types[_identity(row)] = str(row["type"])
    return types


def _rows(data: DataConfig, split: sources.Split) -> list[dict[str, Any]]:
    rows = []
    for raw in _raw(data, split):
        try:
            row = dict(sources.parsed(raw))
            if data.source.official_scores == "hotpotqa":
                row["answer"] = _only_answer(row)
                row["supporting_facts"] = _gold_facts(row.get("supporting_facts"))
            else:
                row["answers"] = sources.answers_of(row)
            rows.append(row)
        except sources.RowError as error:
            raise sources.DataError(
                f"official scores need every row of {data.dataset} {split}: {error}; mend the file"
            ) from error
    if not rows:
        raise sources.DataError(
            f"official scores need rows of {data.dataset} {split}, {data.data_dir} holds none"
        )
    return rows


def _only_answer(row: dict[str, Any]) -> str:
    if not isinstance(answer := row.get("answer"), str):
        raise sources.RowError(
            f"answer of question {_identity(row)} must be text, got {_shown(answer)}"
        )
    return answer


def _gold_facts(facts: Any) -> set[tuple[str, int]]:
    """Return supporting facts, in the Hub's columns or in pairs, as pairs; there may be none."""
    try:
        pairs = facts or ()
        # The Hub's rows have a list of titles beside one of sentences' numbers.
        if isinstance(facts, dict):
            pairs = zip(facts["title"], facts["sent_id"], strict=True)
        return {(str(title), int(sentence)) for title, sentence in pairs}
    except (KeyError, TypeError, ValueError):
        raise sources.RowError(
            f"supporting_facts must be titles with sentences' numbers, got {_shown(facts)}"
        ) from None


def _raw(data: DataConfig, split: sources.Split) -> Iterator[sources.Row]:
    for piece in sources.pieces(data, split):
        yield from sources.read(data, split, piece)


def _squad(rows: list[dict[str, Any]], answers: Mapping[str, str]) -> dict[str, float]:
    """Score in percent, by SQuAD 2.0's rules where a question has no answer, else by v1.1's."""
    if any(row.get("is_impossible") is not None or not row["answers"] for row in rows):
        return _squad_v2(rows, answers)
    totals = {"exact_match": 0.0, "f1": 0.0}
    for row in rows:
        if (answer := answers.get(_identity(row))) is not None:
            em, f1 = em_f1(answer, row["answers"])
            totals = {"exact_match": totals["exact_match"] + em, "f1": totals["f1"] + f1}
    return {name: 100.0 * total / len(rows) for name, total in totals.items()}


def _squad_v2(rows: list[dict[str, Any]], answers: Mapping[str, str]) -> dict[str, float]:
    """Score as ``evaluate-v2.0.py`` does: all questions, those with an answer, those without."""
    scores: dict[str, list[tuple[float, float]]] = {"": [], "HasAns_": [], "NoAns_": []}
    for row in rows:
        # As there: where no gold answer has a word left, the right answer is an empty one.
        golds = [gold for gold in row["answers"] if normalise(gold)] or [""]
        answer = answers.get(_identity(row))
        pair = (0.0, 0.0) if answer is None else _v2_scores(answer, golds)
        scores[""].append(pair)
        scores["HasAns_" if row["answers"] else "NoAns_"].append(pair)
    document: dict[str, float] = {}
    for part, pairs in scores.items():
        if pairs:
            document[f"{part}exact"] = 100.0 * sum(em for em, _ in pairs) / len(pairs)
            document[f"{part}f1"] = 100.0 * sum(f1 for _, f1 in pairs) / len(pairs)
            document[f"{part}total"] = len(pairs)
    return document


def _v2_scores(prediction: str, golds: Sequence[str]) -> tuple[float, float]:
    """Return (EM, F1): an answer that normalises to nothing is right only where there is none."""
    exact = [float(normalise(prediction) == normalise(gold)) for gold in golds]
    f1 = []
    for gold, equal in zip(golds, exact, strict=True):
        # Where nothing is left of one, F1 is 1 if nothing is left of the other, else 0.
        both = normalise(prediction) and normalise(gold)
        f1.append(_scores(prediction, gold, "squad")["f1"] if both else equal)
    return max(exact), max(f1)


def _hotpotqa(
    rows: list[dict[str, Any]], answers: Mapping[str, str], facts: Mapping[str, Sequence[Any]]
) -> dict[str, float]:
    parts = ("", "sp_", "joint_") if facts else ("",)
    totals: dict[str, float] = {}
    for part in parts:
        totals |= dict.fromkeys((f"{part}{name}" for name in PARTS), 0.0)
    for row in rows:
        identity, answer_scores = _identity(row), None
        if identity in answers:
            answer_scores = _scores(answers[identity], row["answer"], "hotpotqa")
            _add(totals, "", answer_scores)
        if identity in facts:
            fact_scores = _facts(facts[identity], row["supporting_facts"])
            _add(totals, "sp_", fact_scores)
            if answer_scores is not None:
                _add(totals, "joint_", _joint(answer_scores, fact_scores))
    # Over all rows: a question that the file leaves out counts as 0.
    return {name: total / len(rows) for name, total in totals.items()}


def _add(totals: dict[str, float], part: str, scores: Mapping[str, float]) -> None:
    for name, value in scores.items():
        totals[part + name] += value


def _facts(named: Iterable[Sequence[Any]], right: set[tuple[str, int]]) -> dict[str, float]:
    """Score supporting facts as sets of (title, number of the sentence)."""
    facts = {(title, sentence) for title, sentence in named}
    hits, extra, missed = len(facts & right), len(facts - right), len(right - facts)
    precision = 1.0 * hits / (hits + extra) if hits + extra else 0.0
    recall = 1.0 * hits / (hits + missed) if hits + missed else 0.0
    em, f1 = float(extra + missed == 0), _harmonic(precision, recall)
    return {"em": em, "f1": f1, "prec": precision, "recall": recall}


def _joint(answer: Mapping[str, float], facts: Mapping[str, float]) -> dict[str, float]:
    # HotpotQA's joint scores: P and R are products, F1 is theirs and no product of F1s.
    precision, recall = answer["prec"] * facts["prec"], answer["recall"] * facts["recall"]
    em, f1 = answer["em"] * facts["em"], _harmonic(precision, recall)
    return {"em": em, "f1": f1, "prec": precision, "recall": recall}


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _identity(row: Mapping[str, Any]) -> str:
    # HotpotQA's own JSON says _id where the Hub says id.
    return str(row.get("id", row.get("_id")))
