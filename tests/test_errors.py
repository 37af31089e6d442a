"""Errors that users can cause come as one line, wherever they were raised."""

from collections.abc import Iterator

import pytest
from ray.data._internal.util import iterate_with_retry
from ray.exceptions import RayTaskError

from latentwire.data.sources import DataError
from latentwire.errors import UserError, fail


def test_an_error_of_a_task_reads_as_it_would_in_this_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cause = DataError("train.json must be a list of rows")
    told = RayTaskError("read", "Traceback (most recent call last): …", cause).as_instanceof_cause()
    assert isinstance(told, UserError) and str(told) != str(cause)
    assert fail(told) == fail(cause) == 2
    assert capsys.readouterr().err == "error: train.json must be a list of rows\n" * 2


def test_ray_datas_advice_on_its_retries_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def read() -> Iterator[None]:
        raise DataError("columns must be there, got none;\nname them")
        yield

    with pytest.raises(DataError, match="DataContext") as told:
        list(iterate_with_retry(read, "apply UDF transform", max_attempts=1))
    fail(told.value)
    assert capsys.readouterr().err == "error: columns must be there, got none;\nname them\n"
