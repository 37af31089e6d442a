"""The picture of a wire's retrieval heads, from the scores that its export holds."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors import safe_open

from latentwire.closed_form.ranking import HeadScores
from latentwire.config import RunConfig
from latentwire.reports import figures
from latentwire.storage import Place, local

PICTURE = "heads.html"
"""Name of the page beside a run's results."""


def write_picture(run: RunConfig, export: Place, output: Place) -> Place | None:
    """Write a page with each receiver's heads by layer, the chosen ones outlined.

    Args:
        run: the wire's configuration.
        export: the wire's directory.
        output: where the page is written.

    Returns:
        The page; None for a wire whose messages stand in every head.
    """
    if run.adapter.kind != "heads" or run.is_reader:
        return None
    scores: list[HeadScores] = []
    chosen: dict[str, Sequence[tuple[int, int]]] = {}
    with local(export) as folder:
        for receiver in run.receivers:
            file = folder / f"adapters/{receiver.name}.safetensors"
            with safe_open(file, framework="pt") as opened:
                score_LH = opened.get_tensor("score_LH")
                heads = opened.get_tensor("head_J2").tolist()
            scores.append(HeadScores(receiver.name, score_LH, run.adapter.ranking_texts))
            chosen[receiver.name] = [(layer, head) for layer, head in heads]
    page = output / PICTURE
    figures.retrieval_heads(scores, chosen, page)
    return page
