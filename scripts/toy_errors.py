"""Which toy questions a wire answers wrongly: by the place of the asked fact in its context, and what was said instead.

python scripts/toy_errors.py runs/one/predictions.parquet
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from latentwire.data.toy import KINDS


def place_of(prediction: dict[str, Any]) -> int:
    """Which fact of the context holds the answer, from 1."""
    facts = prediction["context"].split(". ")
    return 1 + next(place for place, fact in enumerate(facts) if prediction["golds"][0] in fact.rstrip(".").split())


def said_instead(prediction: dict[str, Any]) -> str:
    """What kind of wrong answer it is."""
    asked = next(kind for kind in KINDS if prediction["golds"][0] in kind.values)
    there = prediction["text"] in prediction["context"].replace(".", "").split()
    if prediction["text"] in asked.values:
        return "another person's value of that kind" if there else "a value of that kind that nobody has"
    return "a value of another kind"


def main() -> None:
    """Print a Markdown table of exact match, and the counts of wrong answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path, help="predictions.parquet of a run on the toy")
    options = parser.parse_args()
    rows = [row for row in pq.read_table(options.predictions).to_pylist() if row["setting"] == "latent"]
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["receiver"]][place_of(row)].append(row["em"])
    places = sorted({place for by_place in found.values() for place in by_place})
    print(f"| receiver | {' | '.join(f'fact {place}' for place in places)} |\n|{'---|' * (len(places) + 1)}")
    for receiver, by_place in found.items():
        means = [f"{sum(by_place[place]) / len(by_place[place]):.2f} ({len(by_place[place])})" for place in places]
        print(f"| {receiver} | {' | '.join(means)} |")
    for kind, count in Counter(said_instead(row) for row in rows if not row["em"]).most_common():
        print(f"{count} × {kind}")


if __name__ == "__main__":
    main()
