"""The same with receivers that trials share, for the deaths that differ there. A file of its own, to run beside the other."""

from pathlib import Path

import pytest

from tests.test_chaos import chaos

VICTIMS = ("driver", "worker", "replica")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_trials_that_share_receivers_outlive_deaths_too(tmp_path: Path) -> None:
    text = chaos(
        tmp_path, "--deaths", "3", "--trials", "4", "--receivers", "shared", "--victims", *VICTIMS
    )
    assert "- deaths: 3 of 3" in text and "- trials: 4, all COMPLETE, none RUNNING" in text
    assert all(f"| {victim} |" in text for victim in VICTIMS)
