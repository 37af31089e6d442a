"""Which toy questions a wire answers wrongly: by the place of the asked fact in its context, and what was said instead.

    python experiments/toy_errors.py runs/one/predictions.parquet --latents 4

``--latents`` tells them also by what shares the asked fact's latent, for wires with ``encoder.span_ends: sentences``.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from latentwire.dataset.toy import KINDS, Facts
from latentwire.models.pooling import span_edges


def place_of(prediction: dict[str, Any]) -> int:
    """Return which fact of the context holds the answer, from 1."""
    return 1 + [value for _, _, value in facts_of(prediction)].index(prediction["golds"][0])


def facts_of(prediction: dict[str, Any]) -> Facts:
    """Name, kind and value of each fact of the context, in order."""
    # "Ada lives in Rome. Ben …": a name first, its value last.
    sentences = [sentence.rstrip(".").split() for sentence in prediction["context"].split(". ")]
    facts = []
    for words in sentences:
        kind = next(kind for kind in KINDS if words[-1] in kind.values)
        facts.append((words[0], kind, words[-1]))
    return facts


def sharing(prediction: dict[str, Any], latents: int) -> str:
    """Return what shares the asked fact's latent, where spans are whole facts; the most alike."""
    facts, asked = facts_of(prediction), place_of(prediction) - 1
    count = torch.tensor([len(facts)])
    # The encoder's spans over a text whose tokens are facts: latent i holds edges[i] to [i + 1].
    every = torch.ones(1, len(facts), dtype=torch.bool)
    edges = span_edges(count, torch.tensor([latents]), every)[0].tolist()
    start, end = next(edge for edge in itertools.pairwise(edges) if edge[0] <= asked < edge[1])
    name, kind, _ = facts[asked]
    others = [facts[place] for place in range(int(start), int(end)) if place != asked]
    # The most alike first.
    if any(other[1] == kind for other in others):
        return "another person's fact of that kind"
    if any(other[0] != name for other in others):
        return "another person's fact of another kind"
    return "the same person's other fact" if others else "nothing"


def said_instead(prediction: dict[str, Any]) -> str:
    """Return what kind of wrong answer it is."""
    asked = next(kind for kind in KINDS if prediction["golds"][0] in kind.values)
    there = prediction["text"] in prediction["context"].replace(".", "").split()
    if prediction["text"] not in asked.values:
        return "a value of another kind"
    if there:
        return "another person's value of that kind"
    return "a value of that kind that nobody has"


def main() -> None:
    """Print a Markdown table of exact match, and the counts of wrong answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", type=Path, help="predictions.parquet of a run on the toy")
    parser.add_argument("--latents", type=int, help="those of a message; at most as many as facts")
    options = parser.parse_args()
    every = pq.read_table(options.predictions).to_pylist()
    rows = [row for row in every if row["condition"] == "latent"]
    # Receiver → place of the asked fact → exact match of each row.
    scores: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scores[row["receiver"]][place_of(row)].append(row["em"])
    places = sorted(set().union(*scores.values()))
    header = " | ".join(f"fact {place}" for place in places)
    print(f"| receiver | {header} |\n|{'---|' * (len(places) + 1)}")
    for receiver, by_place in scores.items():
        means = []
        for place in places:
            at_place = by_place[place]
            means.append(f"{sum(at_place) / len(at_place):.2f} ({len(at_place)})")
        print(f"| {receiver} | {' | '.join(means)} |")
    if options.latents:
        _print_sharing(rows, options.latents)
    for kind, count in Counter(said_instead(row) for row in rows if not row["em"]).most_common():
        print(f"{count} × {kind}")


def _print_sharing(rows: list[dict[str, Any]], latents: int) -> None:
    by_mate: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_mate[sharing(row, latents)].append(row["em"])
    print("| what shares the latent | exact match |\n|---|---|")
    for mate, scores in sorted(by_mate.items()):
        print(f"| {mate} | {sum(scores) / len(scores):.3f} ({len(scores)}) |")


if __name__ == "__main__":
    main()
