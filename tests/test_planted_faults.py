"""The oracles can fail: each fault of the original, planted, is caught by the tests named here."""

import os
import re
import subprocess
import sys

import pytest

from tests.faults import FAULTS

CAUGHT_BY = {
    "bos_twice": {"test_bos_stands_once_at_position_zero"},
    "anchor_merged": {"test_anchor_that_merges_with_the_answer_is_an_error", "test_anchor_white_space_goes_with_the_answer"},
    "answer_shifted": {"test_ce_equals_the_models_own_loss", "test_collate_supervises_answers_and_stops_and_nothing_else"},
    "padding_attended": {"test_the_side_of_the_padding_and_its_token_do_not_matter"},
    "wrong_teacher_row": {"test_each_row_is_what_the_receiver_says_one_token_at_a_time", "test_kd_is_zero_for_the_oracle_soft_prompt"},
}  # fmt: skip
ORACLES = ("tests/data/test_layout.py", "tests/models/test_lm.py", "tests/training/test_teacher.py")


def failing(fault: str | None, oracles: set[str]) -> set[str]:
    """Names of those oracles that fail on the toy pair under a fault."""
    environment = {k: v for k, v in os.environ.items() if k != "LATENTWIRE_TEST_RECEIVERS"}
    if fault is not None:
        environment["LATENTWIRE_FAULT"] = fault
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.faults", "-p", "no:cacheprovider", *ORACLES]
    named = ["-k", " or ".join(sorted(oracles))]
    done = subprocess.run([*command, *named], env=environment, capture_output=True, text=True)
    assert done.returncode == (0 if fault is None else 1), done.stdout[-3000:]
    return set(re.findall(r"^FAILED \S+::(\w+)", done.stdout, re.MULTILINE))


def test_every_fault_is_accounted_for() -> None:
    assert CAUGHT_BY.keys() == FAULTS.keys()


@pytest.mark.slow
def test_without_a_fault_all_of_them_pass() -> None:
    assert failing(None, set().union(*CAUGHT_BY.values())) == set()


@pytest.mark.slow
@pytest.mark.parametrize("fault", CAUGHT_BY)
def test_a_planted_fault_fails_its_tests(fault: str) -> None:
    assert failing(fault, CAUGHT_BY[fault]) == CAUGHT_BY[fault]
