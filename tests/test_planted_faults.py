"""The tests can fail: each fault that was planted is caught by the tests that are named for it."""

import json
import os
import subprocess
import sys

import pytest

from tests.faults import FAULTS


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[int, list[str]]]:
    """Fault → pytest's status and the tests that failed under it, on the toy pair; under "" without any."""
    environment = {k: v for k, v in os.environ.items() if k != "LATENTWIRE_TEST_RECEIVERS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, tuple[int, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.slow
def test_without_a_fault_all_of_them_pass(found: dict[str, tuple[int, list[str]]]) -> None:
    assert found[""] == [0, []]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_its_tests(
    found: dict[str, tuple[int, list[str]]], fault: str
) -> None:
    status, failed = found[fault]
    assert (status, failed) == (pytest.ExitCode.TESTS_FAILED, sorted(FAULTS[fault].caught_by))
