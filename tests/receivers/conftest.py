"""Replicas in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from latentwire.config import RunConfig
from latentwire.model import LatentWire
from latentwire.receivers.local import LocalReceiver
from latentwire.receivers.remote import Facts, RemoteReceiver
from latentwire.receivers.replica import Replica
from latentwire.receivers.requests import Request


class Direct:
    """A channel to a replica in this process."""

    def __init__(self, replica: Replica, asker: str) -> None:
        self.replica, self.asker = replica, asker

    def facts(self) -> Facts:
        return Facts.of(self.replica.lm)

    def ask(self, request: Request) -> Any:
        return self.replica.ask(self.asker, request)


@pytest.fixture
def replicas(run: RunConfig) -> Iterator[dict[str, Replica]]:
    """One replica of each receiver of the toy pair."""
    made = {
        r.name: Replica(LocalReceiver(r), most_positions=10_000, most_waiting=8)
        for r in run.receivers
    }
    yield made
    for replica in made.values():
        replica.close()


@pytest.fixture
def sharing_wire(replicas: dict[str, Replica]) -> Callable[[RunConfig, str], LatentWire]:
    """Makes a wire for a run whose receivers are those replicas."""

    def make(run: RunConfig, asker: str) -> LatentWire:
        receivers = {
            r.name: RemoteReceiver(
                r, Direct(replicas[r.name], asker), torch.device("cpu"), head_is_text=True
            )
            for r in run.receivers
        }
        return LatentWire(run, receivers)

    return make
