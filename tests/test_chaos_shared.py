"""The same with receivers that trials share, and replicas among the victims. A file of its own, to run beside the other."""

from pathlib import Path

import pytest

from tests.test_chaos import chaos


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_trials_that_share_receivers_outlive_deaths_too(tmp_path: Path) -> None:
    text = chaos(tmp_path, "--deaths", "5", "--trials", "2", "--receivers", "shared")
    assert "- deaths: 5 of 5" in text and "- trials: 2, all COMPLETE, none RUNNING" in text
    assert all(f"| {victim} |" in text for victim in ("driver", "worker", "trial actor", "raylet", "replica"))
