"""Errors that users can cause come as one line, wherever they were raised."""

import pytest
from ray.exceptions import RayTaskError

from latentwire.data.sources import DataError
from latentwire.errors import UserError, fail


def test_an_error_of_a_task_reads_as_it_would_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    cause = DataError("train.json must be a list of rows")
    told = RayTaskError("read", "Traceback (most recent call last): …", cause).as_instanceof_cause()
    assert isinstance(told, UserError) and str(told) != str(cause)
    assert fail(told) == fail(cause) == 2
    assert capsys.readouterr().err == "error: train.json must be a list of rows\n" * 2
