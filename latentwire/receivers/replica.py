"""One copy of a frozen receiver for several trials, whose requests are joined into passes."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from latentwire.receivers.local import LocalReceiver
from latentwire.receivers.memory import is_out_of_memory
from latentwire.receivers.requests import LookUp, Request


@dataclass
class Account:
    """One trial's use of a replica."""

    requests: int = 0
    joined: int = 0
    """Requests that were answered together with another trial's."""
    positions: int = 0
    seconds: float = 0.0
    """Seconds of passes, shared out by positions."""
    waited: float = 0.0
    """Seconds in the queue."""


@dataclass(eq=False)  # each is itself: requests hold tensors, which do not compare
class _Waiting:
    asker: str
    request: Request
    arrival: int
    since: float = field(default_factory=time.perf_counter)
    answer: Future[Any] = field(default_factory=Future)


class Replica:
    """Answers requests one pass after the other, those that are alike together.

    Fair: the trial whose last answer is longest ago comes first. Waiting requests that are alike go
    with it, in the same order, up to ``most_positions``. No trial waits for more passes than there
    are other trials. The queue is bounded: a trial that asks while ``most_waiting`` wait is held
    until there is room.
    """

    def __init__(self, lm: LocalReceiver, *, most_positions: int, most_waiting: int) -> None:
        """Start the thread that answers.

        ``most_positions``: rows times positions that a pass over several requests may have.
        """
        self.lm, self.most_positions = lm, most_positions
        self.accounts: dict[str, Account] = {}
        self.passes = 0
        self._room = threading.Semaphore(most_waiting)
        self._looking = threading.Lock()  # a tokenizer is not to be used from two threads
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        self._arrivals = itertools.count()
        self._served: dict[str, int] = {}  # the pass of each trial's last answer
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"replica {lm.name}", daemon=True)
        self._thread.start()

    def ask(self, asker: str, request: Request | LookUp) -> Any:
        """Return the answer to one request, when it comes; to a look-up, at once.

        Raises what answering it alone raises.
        """
        if isinstance(request, LookUp):
            with self._looking:
                return request.answer(self.lm)
        # Held until the answer is there: what is in a pass counts as waiting, too.
        with self._room:
            waiting = _Waiting(asker, request, next(self._arrivals))
            with self._changed:
                # Under the lock: after the thread's end nobody would take it off the queue.
                if self._closed:
                    raise RuntimeError(f"replica of {self.lm.name} is closed")
                self._waiting.append(waiting)
                self._changed.notify()
            return waiting.answer.result()

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._waiting)

    def usage(self) -> dict[str, dict[str, float]]:
        """Return each trial's account."""
        with self._changed:
            return {asker: asdict(account) for asker, account in self.accounts.items()}

    def close(self) -> None:
        """End the thread when the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        group: list[_Waiting] | None = []
        try:
            while (group := self._next()) is not None:
                self._answer(group)
        finally:
            # After a fault here, nobody may wait for ever: neither who is in the queue, nor who
            # was taken off it and has no answer yet.
            with self._changed:
                self._closed = True
                for waiting in [*(group or ()), *self._waiting]:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(
                            RuntimeError(f"replica of {self.lm.name} has ended; see its log")
                        )

    def _next(self) -> list[_Waiting] | None:
        """Take the next pass's requests off the queue; ``None`` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            # Who was never served comes first, then who was served in the earliest pass.
            order = sorted(self._waiting, key=lambda w: (self._served.get(w.asker, -1), w.arrival))
            group, positions = [order[0]], order[0].request.positions
            for other in order[1:]:
                more = other.request.positions
                alike = other.request.alike == group[0].request.alike
                if alike and positions + more <= self.most_positions:
                    group.append(other)
                    positions += more
            self._waiting = [waiting for waiting in self._waiting if waiting not in group]
            self.passes += 1
            for waiting in group:
                self._served[waiting.asker] = self.passes
            return group

    def _answer(self, group: list[_Waiting]) -> None:
        """Answer a group in one pass; where that fails, its halves.

        So one request's fault is nobody else's.
        """
        began = time.perf_counter()
        try:
            answers = group[0].request.answer(self.lm, [waiting.request for waiting in group])
        except Exception as error:
            if len(group) == 1:
                group[0].answer.set_exception(error)
                return
            # A pass of half as much may fit, and no later one is to be larger.
            if is_out_of_memory(error):
                self.most_positions = sum(waiting.request.positions for waiting in group) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            half = len(group) // 2
            del error  # its traceback holds the pass's tensors
            self._answer(group[:half])
            self._answer(group[half:])
            return
        seconds = time.perf_counter() - began
        total = max(1, sum(waiting.request.positions for waiting in group))
        with self._changed:
            for waiting in group:
                account = self.accounts.setdefault(waiting.asker, Account())
                account.requests += 1
                account.joined += len(group) > 1
                account.positions += waiting.request.positions
                share = waiting.request.positions / total if len(group) > 1 else 1
                account.seconds += seconds * share
                account.waited += began - waiting.since
        for waiting, answer in zip(group, answers, strict=True):
            waiting.answer.set_result(answer)
