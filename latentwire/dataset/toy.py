"""A synthetic reading task: short contexts of facts about people, and a question about one of them.

Who has which fact is drawn anew for every context, so only the context can answer; without it a guess is right about
once in twenty. Names and values come from closed lists, which keeps the task small enough for receivers of a million
weights and encoders trained in minutes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from latentwire.dataset.base import Dataset
from latentwire.dataset.squad import clean

if TYPE_CHECKING:
    from latentwire.config import DataConfig


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jill Karl Lena Max Nora Otto Pia Quinn Rosa Sam Tara "
    "Uma Vera Walt Xena Yara Zoe Alan Beth Carl Dora Emil Fay Glen Hugo Iris Jack Kurt Lily Mona Ned"
)


@dataclass(frozen=True)
class Kind:
    """One kind of fact: how it is stated, how it is asked for, and its values."""

    fact: str
    question: str
    values: tuple[str, ...]


KINDS = (
    Kind(
        "{name} lives in {value}.",
        "Where is the home of {name}?",
        _words(
            "Oslo Rome Paris Lima Cairo Tokyo Delhi Quito Bonn Kiev Lyon Milan Perth Dakar Turin Seoul Malmo "
            "Porto Basel Riga"
        ),
    ),
    Kind(
        "{name} works as {value}.",
        "What is the job of {name}?",
        _words(
            "baker pilot nurse judge miner actor singer lawyer farmer tailor barber sailor editor porter "
            "doctor guard mason clerk cook poet"
        ),
    ),
    Kind(
        "{name} owns a {value}.",
        "Which animal belongs to {name}?",
        _words(
            "dog cat horse goat parrot rabbit turtle hamster ferret gecko pony duck goose snake mouse lizard "
            "canary donkey sheep pig"
        ),
    ),
    Kind(
        "{name} eats {value}.",
        "What is the favourite meal of {name}?",
        _words(
            "rice soup pasta bread cheese salad beans noodles fish eggs pizza curry stew corn honey apples "
            "plums yogurt tofu cake"
        ),
    ),
)


Facts = list[tuple[str, Kind, str]]
"""Names, kinds and values of one context."""


def facts(rng: random.Random, people: int, kinds: int) -> Facts:
    """Draw ``people`` × ``kinds`` facts (name, kind, value) in random order; no value stands twice."""
    names = rng.sample(NAMES, people)
    drawn = []
    for kind in rng.sample(KINDS, kinds):
        values = rng.sample(kind.values, people)
        drawn += [(name, kind, value) for name, value in zip(names, values, strict=True)]
    rng.shuffle(drawn)
    return drawn


def context_of(drawn: Facts) -> str:
    """Return the text that states these facts."""
    return " ".join(kind.fact.format(name=name, value=value) for name, kind, value in drawn)


def toy_rows(
    count: int, *, seed: int, people: int = 3, kinds: int = 2, questions: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield ``count`` rows with ``id``, ``document``, ``context``, ``question`` and ``answers``; the seed decides them.

    ``people`` and ``kinds`` are 1 to 4, ``questions`` to a context 1 to their product. A context is a document of its own.
    """
    rng = random.Random(f"toy {seed}")
    for first in range(0, count, questions):
        drawn = facts(rng, people, kinds)
        # The last context may be asked fewer questions than the others.
        asked = rng.sample(drawn, questions)[: count - first]
        for number, (name, kind, value) in enumerate(asked, start=first):
            yield {
                "id": f"toy-{seed}-{number}",
                "document": f"toy-{seed}-{first}",
                "context": context_of(drawn),
                "question": kind.question.format(name=name),
                "answers": [value],
            }


def generate(data: DataConfig, split: Literal["train", "validation"]) -> Iterator[dict[str, Any]]:
    """Yield a split's rows: of training rows enough, with a margin, when the development documents are taken out."""
    if split == "train":
        # A share of 1 − dev_fraction is left for training, on average: a tenth more makes up for
        # an unlucky draw of the development documents.
        samples = data.samples or 20_000
        count = round(samples / (1 - data.dev_fraction) * 1.1) + 4 * data.dev_samples
    else:
        count = (data.validation_samples or 512) + data.validation_skip
    seed = 2 * data.seed + (split == "validation")  # the two streams never share a seed
    questions = data.toy_questions if split == "train" else 1
    return toy_rows(
        count, seed=seed, people=data.toy_people, kinds=data.toy_kinds, questions=questions
    )


DATASET = Dataset(
    name="toy",
    description="LatentWire's synthetic reading task: facts about people, drawn anew for every context",
    clean=clean,
    generate=generate,
    version=2,
)
