"""An order is a file, whole or not there; its outcome stands beside it, on a disk and in a store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from latentwire import storage
from latentwire.storage import Place, children
from latentwire.tuning import orders
from latentwire.tuning.orders import ORDERS, OrderError
from tests.s3 import bucket, point_to


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with bucket() as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def sweep(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "disk":
        return tmp_path / "sweep"
    point_to(monkeypatch, request.getfixturevalue("port"))
    return storage.place(f"s3://bucket/{tmp_path.name}")


def test_orders_are_read_in_the_order_in_which_they_were_given(sweep: Place) -> None:
    assert orders.given(sweep) == []
    first = orders.give(sweep, orders.draft("stop", trial=3))
    second = orders.give(sweep, orders.draft("add", trials=4))
    read = orders.given(sweep)
    assert [each.order for each in read] == sorted([first, second], key=lambda order: order.id)
    assert all(each.is_open and each.outcome is None for each in read)
    assert first.who.count("@") == 1 and abs(second.time - first.time) < 60
    assert [order.summary for order in (first, second)] == ["stop trial 3", "add 4 trials"]
    # Nothing is left that was written aside.
    assert len(children(sweep / ORDERS)) == 2


def test_an_outcome_closes_an_order_and_one_that_is_begun_does_not(sweep: Place) -> None:
    order = orders.give(sweep, orders.draft("add", trials=4))
    orders.answer(sweep, order.id, "begun", "goes to 12", 12)
    (begun,) = orders.given(sweep)
    assert begun.is_open and begun.outcome is not None and begun.outcome.trials == 12
    orders.answer(sweep, order.id, "done", "is 12", 12)
    (done,) = orders.given(sweep)
    assert not done.is_open and done.outcome is not None and done.outcome.reason == "is 12"
    assert orders.given(sweep, without={order.id}) == []


def test_what_is_open_at_the_end_is_refused_and_nothing_else(sweep: Place) -> None:
    done, left = (orders.give(sweep, orders.draft("stop", trial=number)) for number in (1, 2))
    orders.answer(sweep, done.id, "done", "stopped")
    orders.refuse_open(sweep, "it is over")
    outcomes = {each.id: each.outcome for each in orders.given(sweep)}
    assert {key: (outcome.state, outcome.reason) for key, outcome in outcomes.items() if outcome} == {
        done.id: ("done", "stopped"), left.id: ("refused", "it is over"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "an order must be as latentwire sweep writes it"),
        ('{"id": "x", "kind": "stop", "time": 1, "who": "me"}', "got stop of None; give it anew"),
        ('{"id": "x", "kind": "add", "time": 1, "who": "me", "trials": 0}', "got trials: Input"),
        ('{"id": "x", "kind": "halt", "time": 1, "who": "me"}', "got kind: Input should be"),
        ('{"id": "x", "kind": "end", "time": 1, "who": "me", "trial": 3}', "got end of 3"),
    ],
)
def test_a_file_that_is_no_order_says_why(tmp_path: Path, text: str, rule: str) -> None:
    storage.write_text(tmp_path / ORDERS / "x.json", text)
    (each,) = orders.given(tmp_path)
    assert each.order is None and each.is_open and rule in each.problem


def test_an_order_that_lacks_what_it_needs_is_not_given(tmp_path: Path) -> None:
    with pytest.raises(OrderError, match=r"got add of None; give it anew"):
        orders.draft("add")
    with pytest.raises(OrderError, match=r"got stop of None"):
        orders.draft("stop")
    assert not (tmp_path / ORDERS).exists()


def test_an_outcome_that_makes_no_sense_names_its_file(tmp_path: Path) -> None:
    order = orders.give(tmp_path, orders.draft("end"))
    storage.write_text(tmp_path / ORDERS / f"{order.id}.outcome.json", "{}")
    with pytest.raises(OrderError, match=rf"{order.id}\.outcome\.json must say what became"):
        orders.given(tmp_path)
