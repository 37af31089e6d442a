"""Orders to a sweep: a file each beside its study, and what became of it in a file beside that.

Whoever may write to the sweep's directory may give one, whether a driver runs or not. The driver
reads them every few seconds (:mod:`latentwire.tuning.steering`). Files are written aside and
renamed, so an order is whole or not there, and no death of a driver loses one.
"""

from __future__ import annotations

import getpass
import socket
import time
import uuid
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from latentwire.config.section import Section
from latentwire.errors import UserError
from latentwire.storage import Place, children, text_if_there, write_text

ORDERS = "orders"
"""Directory of the orders in a sweep's directory."""
OUTCOME = ".outcome.json"
"""End of the name of an outcome's file; it begins with the order's id."""
Kind = Literal["stop", "pause", "resume", "clone", "add", "end"]
OF_A_TRIAL: tuple[Kind, ...] = ("stop", "pause", "resume", "clone")
"""Kinds of orders that name a trial."""


class OrderError(UserError):
    """An order that cannot be given; the message quotes the rule, the value and the next move."""


class Order(Section):
    """One order to a sweep."""

    id: str
    """Name of the order and its file; ids sort by the time when they were given."""
    kind: Kind
    """What is to be done."""
    time: float = Field(gt=0)
    """When it was given, in seconds since 1970."""
    who: str
    """Who gave it: user and machine."""
    trial: int | None = Field(None, ge=0)
    """Number of the trial that is meant; None where none is."""
    trials: int | None = Field(None, ge=1)
    """``add``: how many trials more."""
    values: dict[str, Any] = Field(default_factory=dict)
    """``clone``: path below ``run`` → changed value."""

    @model_validator(mode="after")
    def _names_what_it_needs(self) -> Order:
        if (self.kind in OF_A_TRIAL) != (self.trial is not None):
            raise ValueError(
                f"{', '.join(OF_A_TRIAL)} name a trial and no others, got {self.kind} of {self.trial}"
            )
        if (self.kind == "add") != (self.trials is not None):
            raise ValueError(
                f"add says how many trials, and no other order does, got {self.kind} of {self.trials}"
            )
        return self

    @property
    def summary(self) -> str:
        """The order in a few words: ``stop trial 3``."""
        if self.kind == "add":
            return f"add {self.trials} trials"
        if self.kind == "end":
            return "end"
        changed = ", ".join(f"{path}={value}" for path, value in self.values.items())
        return f"{self.kind} trial {self.trial}" + (f" with {changed}" if changed else "")


class Outcome(Section):
    """What became of an order."""

    state: Literal["begun", "done", "refused"]
    """``begun``: what it comes to is settled, and a driver that died then left the rest to the next."""
    reason: str
    """What was done, or why not and what to do instead."""
    time: float
    """When, in seconds since 1970."""
    trials: int | None = None
    """``tune.trials`` that the order comes to, where it changes them: it counts once, however often it is carried out."""


@dataclass(frozen=True)
class Given:
    """An order in a sweep's directory."""

    id: str
    order: Order | None
    """None where the file holds no order."""
    outcome: Outcome | None
    """None while it is open."""
    problem: str = ""
    """Why the file holds no order."""

    @property
    def is_open(self) -> bool:
        """Return whether a driver has still something to do for it."""
        return self.outcome is None or self.outcome.state == "begun"


def draft(
    kind: Kind,
    *,
    trial: int | None = None,
    trials: int | None = None,
    values: dict[str, Any] | None = None,
) -> Order:
    """Return an order of this moment, which nobody has been given yet.

    Raises :class:`OrderError` for one that lacks what its kind needs.
    """
    now = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    try:
        return Order(
            # Second, microsecond, and six digits that tell two drivers of one moment apart.
            id=f"{stamp}-{int(now * 1e6) % 1_000_000:06d}-{uuid.uuid4().hex[:6]}",
            kind=kind,
            time=now,
            who=f"{_user()}@{socket.gethostname()}",
            trial=trial,
            trials=trials,
            values=values or {},
        )
    except ValidationError as error:
        raise OrderError(_rule(error)) from error


def give(sweep: Place, order: Order) -> Order:
    """Write an order into a sweep's directory, and return it."""
    write_text(sweep / ORDERS / f"{order.id}.json", order.model_dump_json(indent=1))
    return order


def answer(
    sweep: Place,
    order_id: str,
    state: Literal["begun", "done", "refused"],
    reason: str,
    trials: int | None = None,
) -> Outcome:
    """Write what became of an order beside it."""
    outcome = Outcome(state=state, reason=reason, time=time.time(), trials=trials)
    write_text(sweep / ORDERS / f"{order_id}{OUTCOME}", outcome.model_dump_json(indent=1))
    return outcome


def refuse_open(sweep: Place, reason: str) -> None:
    """Refuse every order that is still open."""
    for each in given(sweep):
        if each.is_open:
            answer(sweep, each.id, "refused", reason)


def given(sweep: Place, without: Container[str] = ()) -> list[Given]:
    """List a sweep's orders, the earliest first; those of the ids ``without`` are not read."""
    # A name with a dot before it is of a file that is being written.
    names = [path.name for path in children(sweep / ORDERS) if not path.name.startswith(".")]
    answered = {name.removesuffix(OUTCOME) for name in names if name.endswith(OUTCOME)}
    # An outcome's name ends in .json too.
    files = [name for name in names if name.endswith(".json") and not name.endswith(OUTCOME)]
    ids = sorted(name.removesuffix(".json") for name in files)
    return [_read(sweep, each, each in answered) for each in ids if each not in without]


def record(order: Order) -> dict[str, Any]:
    """Return what the study keeps of an order with the trial that it changed."""
    return {"order": order.id, "who": order.who, "time": order.time}


def _read(sweep: Place, order_id: str, answered: bool) -> Given:
    folder = sweep / ORDERS
    text = text_if_there(folder / f"{order_id}{OUTCOME}") if answered else None
    try:
        outcome = None if text is None else Outcome.model_validate_json(text)
    except ValidationError as error:
        raise OrderError(
            f"{folder / order_id}{OUTCOME} must say what became of an order, got {text!r}; delete it, "
            "and the order is carried out anew"
        ) from error
    try:
        order = Order.model_validate_json(text_if_there(folder / f"{order_id}.json") or "")
    except ValidationError as error:
        return Given(order_id, None, outcome, _rule(error))
    return Given(order_id, order, outcome)


def _rule(error: ValidationError) -> str:
    problem = error.errors()[0]  # one is enough to mend it by
    place = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"an order must be as latentwire sweep writes it, got {place or 'one'}: {message}; give it anew"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may have no name for its user
        return "unknown"
