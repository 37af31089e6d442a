"""Search a small space from Python, and look at the trials as a table.

python examples/tune_from_python.py --output runs/example-sweep
python examples/tune_from_python.py --output runs/example-sweep --trials 2 --steps 20
"""

from __future__ import annotations

import sys
from pathlib import Path

from latentwire import tune
from latentwire.cli import run_script


def main(*, output: Path, trials: int = 4, steps: int = 300) -> None:
    """Search, then print the table of trials and the winner.

    Args:
        output: Directory of the sweep; must not exist yet.
        trials: Trials of the sweep.
        steps: Training steps of each.
    """
    overrides = {
        "tune.trials": trials,
        "training.max_steps": steps,
        "training.evaluate_every": max(1, steps // 2),
        "evaluation.tuned_text.steps": min(100, steps),
        "data.samples": 2000,
        "data.validation_samples": 64,
    }
    result = tune("toy", output=output, overrides=overrides)
    print(result.trials[["trial", "state", "dev_f1"]].to_string(index=False))
    print(f"best: trial {result.best.trial} with {result.best.values}")
    print(f"report: {result.report}")


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
