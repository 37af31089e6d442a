"""What the searcher takes for a suggestion as the study grows."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

import optuna

from benchmarks.measure import Row
from latentwire.config.resolve import load_space
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import JOURNAL

SPACE = Path(__file__).parents[1] / "search_spaces" / "llama_qwen.yaml"
MEASURED = 10
"""Suggestions that a median is taken of."""


def suggestion(finished: int) -> Row:
    """Milliseconds of a suggestion with so many finished trials in the journal, in the largest shipped space."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rng, seconds = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        space, journal = load_space(SPACE), Path(folder) / JOURNAL
        search = StudySearch(
            space, journal=journal, name="benchmark", trial_dir=Path(folder) / "trials"
        )
        for number in range(finished + MEASURED):
            began = time.perf_counter()
            search.suggest(str(number))
            seconds.append(time.perf_counter() - began)
            search.on_trial_complete(
                str(number), {"step": 1, "total_steps": 1, "dev_f1": rng.random()}
            )
    # Of the last suggestions alone, which see all the trials before them.
    milliseconds = 1000 * statistics.median(seconds[finished:])
    detail = f"{space.tune.sampler.name}, {len(space.search)} dimensions"
    return Row(
        f"a suggestion with {finished:,} finished trials, in ms", milliseconds, "< 50", detail
    )
