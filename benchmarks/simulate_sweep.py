"""What orchestration costs: many trials that train nothing, through the real searcher, study, ASHA and budget.

    python benchmarks/simulate_sweep.py --trials 1000 --at_once 64

Ray's own part (processes, placement) is left out: what is measured is what one driver must do for every suggestion, report and
end of a trial, and how large its study grows. Trials' scores are drawn from their values; their checkpoints are manifests alone.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
from ray.tune.schedulers import TrialScheduler

from latentwire.config import SweepConfig
from latentwire.config.resolve import load_space, set_path
from latentwire.distributed.trial import trial_path
from latentwire.training import step_checkpoints
from latentwire.tuning.checkpoint_budget import CheckpointBudget
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import JOURNAL
from latentwire.tuning.sweep import make_scheduler

SPACE = Path(__file__).parent.parent / "search_spaces" / "llama_qwen.yaml"
EVALUATIONS = 8
STEPS = 1_600


class Simulated:
    """A trial as a scheduler sees it, whose score rises to what its values are worth."""

    def __init__(self, trial_id: str, values: dict[str, Any]) -> None:
        self.trial_id, self.status, self.step = trial_id, "RUNNING", 0
        # By its values alone: the same trial is worth the same in every run.
        self.worth = random.Random(repr(sorted(values.items()))).random()

    def save(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Save as its worker would: a checkpoint of no weights; the best and the last stay."""
        path = folder / step_checkpoints.step_name(self.step)
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(json.dumps({"files": {}, "metrics": metrics}))
        step_checkpoints.keep_best_and_last(folder, "dev_f1", "max")

    def report(self) -> dict[str, Any]:
        """The next evaluation, as large as a real one."""
        self.step += STEPS // EVALUATIONS
        score = self.worth * self.step / STEPS
        # As many metrics as a real evaluation has: the journal grows by them.
        real = {f"metric_{number}": score for number in range(40)}
        return real | {
            "dev_f1": score,
            "step": self.step,
            "total_steps": STEPS,
            "training_iteration": self.step,
        }


def simulate(space: SweepConfig, at_once: int, folder: Path) -> dict[str, float]:
    """Run the sweep; returns seconds by what they were spent on, and the study's size."""
    search = StudySearch(
        space, journal=folder / JOURNAL, name="simulated", trial_dir=folder / "trials"
    )
    scheduler = make_scheduler(space.tune, STEPS)
    budget = CheckpointBudget(search)
    spent = {"suggest": 0.0, "report": 0.0, "end": 0.0, "tidy": 0.0}
    running: list[Simulated] = []
    started = ended = 0

    def timed(what: str, call: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        answer = call(*arguments)
        spent[what] += time.perf_counter() - began
        return answer

    while ended < space.tune.trials:
        while len(running) < at_once and started < space.tune.trials:
            trial = Simulated(f"t{started}", timed("suggest", search.suggest, f"t{started}"))
            scheduler.on_trial_add(None, trial)
            running.append(trial)
            started += 1
        # In turns: the trial at the front reports, and goes to the back if it goes on.
        trial = running.pop(0)
        result = trial.report()
        trial.save(trial_path(search.trial_dir, int(trial.trial_id[1:])), result)
        timed("report", search.on_trial_result, trial.trial_id, result)
        decision = timed("report", scheduler.on_trial_result, None, trial, result)
        if decision == TrialScheduler.STOP or trial.step >= STEPS:
            timed("end", search.on_trial_complete, trial.trial_id, result)
            scheduler.on_trial_complete(None, trial, result)
            ended += 1
            if ended % 100 == 0:
                print(
                    f"{ended} trials: {sum(spent.values()) / ended:.3f} s each so far", flush=True
                )
        else:
            running.append(trial)
        timed("tidy", budget.tidy)
    return spent | {"journal_mb": (folder / JOURNAL).stat().st_size / 1e6}


def main() -> None:
    """Print seconds per trial and the study's size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1_000, help="trials of the sweep")
    parser.add_argument("--at_once", type=int, default=64, help="trials that run at once")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tree = load_space(SPACE).model_dump(mode="json", exclude_unset=True)
    set_path(tree, "tune.trials", options.trials)
    set_path(tree, "tune.metric", "dev_f1")
    with tempfile.TemporaryDirectory() as folder:
        spent = simulate(SweepConfig.model_validate(tree), options.at_once, Path(folder))
    size = spent.pop("journal_mb")
    per_trial = {what: 1000 * seconds / options.trials for what, seconds in spent.items()}
    each = ", ".join(f"{what} {milliseconds:.1f} ms" for what, milliseconds in per_trial.items())
    print(f"{options.trials} trials, {options.at_once} at once: {sum(spent.values()):.1f} s of the driver; per trial: {each}; "
          f"study {size:.1f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
