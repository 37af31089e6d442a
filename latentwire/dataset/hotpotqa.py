"""HotpotQA: questions whose answers take two paragraphs, in the Hub's columns or the official JSON's pairs."""

from __future__ import annotations

from typing import Any

from latentwire.dataset.base import Dataset
from latentwire.dataset.rows import RowError, digest, question_row, text_of


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """Join the titled paragraphs, one a line; those that the answer hangs on name the document."""
    document = supporting_titles(row.get("supporting_facts"))
    context = paragraphs(row.get("context"))
    return question_row(row, context, text_of(row, "question"), document or digest(context))


def supporting_titles(facts: Any) -> str:
    """Return the titles of the paragraphs that an answer hangs on; empty where the row has none."""
    # [[title, sentence], …] in the official JSON, {"title": […], "sent_id": […]} on the Hub.
    if isinstance(facts, list):
        titles = [pair[0] if isinstance(pair, list) and pair else None for pair in facts]
    else:
        titles = (facts.get("title") if isinstance(facts, dict) else facts) or []
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        raise RowError("supporting_facts must be titles, each with a sentence's number")
    return " | ".join(sorted(set(titles)))


def paragraphs(context: Any) -> str:
    """Return titled paragraphs as text, one a line."""
    # {"title": […], "sentences": […]} on the Hub, [[title, sentences], …] in the official JSON.
    if isinstance(context, dict) and isinstance(context.get("sentences"), list):
        bodies = context["sentences"]
        titles = context.get("title") or [""] * len(bodies)
        if not isinstance(titles, list):
            raise RowError(f"titles must be a list, got {type(titles).__name__}")
        if len(titles) != len(bodies):
            raise RowError(
                f"titles and sentences must be of as many paragraphs, got {len(titles)} and "
                f"{len(bodies)}; give each paragraph both"
            )
        titled = list(zip(titles, bodies, strict=True))
    elif isinstance(context, list):
        for number, pair in enumerate(context):
            if not isinstance(pair, list) or len(pair) != 2:
                raise RowError(
                    f"a paragraph must be a list of a title and its sentences, got "
                    f"{_shown(pair)} for number {number}; give it both"
                )
        titled = [tuple(pair) for pair in context]
    else:
        raise RowError(f"context must hold titles and sentences, got {type(context).__name__}")
    lines = []
    for title, sentences in titled:
        is_list = isinstance(sentences, list)
        if not is_list or not all(isinstance(sentence, str) for sentence in sentences):
            raise RowError("sentences must be lists of text")
        body = "".join(sentences).strip()
        if body:
            lines.append(f"{title}: {body}" if title else body)
    if not lines:
        raise RowError("context must not be empty")
    return "\n".join(lines)


def _shown(pair: Any) -> str:
    kind = type(pair).__name__
    return f"a {kind} of {len(pair)}" if isinstance(pair, list) else kind


DATASET = Dataset(
    name="hotpotqa",
    description="HotpotQA (Yang et al., 2018), CC BY-SA 4.0",
    clean=clean,
    configurations=("distractor", "fullwiki"),
    hub_id="hotpotqa/hotpot_qa",
    hub_configuration="distractor",
    official_scores="hotpotqa",
    version=4,
)
