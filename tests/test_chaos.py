"""A sweep whose driver, workers, trial actors and machine are killed at random ends as if nobody had been."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def chaos(folder: Path, *flags: str) -> str:
    """What a run of the script wrote down."""
    bounds = (
        "--pause",
        "0",
        "6",
        "--spread",
        "0.75",
        "--steps",
        "12",
        "--output_dir",
        str(folder / "chaos"),
    )
    command = [sys.executable, "scripts/chaos.py", *flags, *bounds]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    log = (folder / "chaos.log").read_text()[-3000:]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:] + log
    return (folder / "chaos" / "chaos.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_death_of_every_kind_changes_nothing(tmp_path: Path) -> None:
    text = chaos(tmp_path, "--deaths", "4", "--trials", "5")
    assert "- deaths: 4 of 4" in text and "- trials: 5, all COMPLETE, none RUNNING" in text
    assert all(f"| {victim} |" in text for victim in ("driver", "worker", "trial actor", "raylet"))
    deaths = json.loads((tmp_path / "chaos" / "chaos.json").read_text())
    assert (
        deaths[-1]["finished"] >= 2
    )  # they met trials that had ended, not only the first ones as they started
