"""Frozen receivers as a service of one sweep: replicas that trials share, and the way to them."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayTaskError

from latentwire.config import ReceiverConfig, RunConfig
from latentwire.pretrained.weights import pick_device
from latentwire.receivers.base import Receiver
from latentwire.receivers.local import LocalReceiver
from latentwire.receivers.remote import Facts, RemoteReceiver
from latentwire.receivers.replica import Replica
from latentwire.receivers.requests import LookUp, Request

ASKING = 64
"""Requests that a replica holds in its queue; who asks beyond that waits until there is room."""


ANSWER_SECONDS = 10
"""Seconds that a trial waits for a replica to say which others there are."""

# Tensors that came through shared memory are read-only, and nothing here writes into one.
for message in (
    "Zero-copy tensor serialization is enabled",
    "The given NumPy array is not writable",
):
    warnings.filterwarnings("ignore", message=message)


@dataclass(frozen=True)
class Served:
    """One replica, as trials know it."""

    node: str
    actor: Any


class ReplicaActor:
    """A :class:`~latentwire.receivers.replica.Replica` in a process of its own.

    It loads its weights in a thread, so that it can say at once that there was room for it. All
    other calls wait for the weights.
    """

    def __init__(
        self, receiver: dict[str, Any], training: dict[str, Any], most_positions: int, threads: int
    ) -> None:
        """Begin to load the weights.

        ``receiver``, ``training``: dumped sections; ``training`` says how activations are kept and
        whether layers are compiled. ``most_positions``: rows times positions of a joined pass.
        """
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        self.peers: list[Served] = []
        self._loading = ThreadPoolExecutor(1).submit(_load, receiver, training, most_positions)

    def node(self) -> str:
        """Return the id of the node that this replica is on."""
        return str(ray.get_runtime_context().get_node_id())

    @ray.method(concurrency_group="asking")
    def ask(self, asker: str, request: Request | LookUp) -> Any:
        """Answer one request."""
        return self._loading.result()[0].ask(asker, request)

    @ray.method(concurrency_group="reporting")
    def facts(self) -> Facts:
        """Return the facts of the weights, as they were when loaded."""
        return self._loading.result()[1]

    @ray.method(concurrency_group="reporting")
    def fingerprint(self) -> str:
        """Return the hash of the weights, as they are now."""
        return self._loading.result()[0].lm.fingerprint()

    @ray.method(concurrency_group="reporting")
    def report(self) -> dict[str, Any]:
        """Return the accounts of all trials, the passes so far, and how many requests wait."""
        replica = self._loading.result()[0]
        return {"accounts": replica.usage(), "passes": replica.passes, "waiting": replica.waiting}

    @ray.method(concurrency_group="reporting")
    def meet(self, peers: list[Served]) -> None:
        """Learn which replicas of the receiver there are now."""
        self.peers = peers

    @ray.method(concurrency_group="reporting")
    def met(self) -> list[Served]:
        """Return the replicas of the receiver that this one has heard of; none after a restart."""
        return self.peers


def _load(
    receiver: dict[str, Any], training: dict[str, Any], most_positions: int
) -> tuple[Replica, Facts]:
    lm = LocalReceiver(ReceiverConfig.model_validate(receiver))
    if training["gradient_checkpointing"]:
        lm.recompute_activations()
    if training["compile"]:
        lm.compile_layers()
    facts = Facts.of(lm)
    return Replica(lm, most_positions=most_positions, most_waiting=ASKING), facts


class RayChannel:
    """The way from one trial to the nearest replica of a receiver.

    Ray starts a replica that died again, and asks it again.
    """

    def __init__(self, replicas: Sequence[Served], asker: str) -> None:
        """Choose a replica for ``asker``: one on this node where there is any."""
        here = ray.get_runtime_context().get_node_id()
        near = [replica for replica in replicas if replica.node == here] or list(replicas)
        # Spread by name. Unlike hash(), crc32 is the same in every process of Python.
        self.actor, self.asker = near[zlib.crc32(asker.encode()) % len(near)].actor, asker

    def facts(self) -> Facts:
        """Return the facts of the replica's weights, as they were when loaded."""
        return ray.get(self.actor.facts.remote())

    def ask(self, request: Request | LookUp) -> Any:
        """Return the answer to a request; raises what answering it raised on the replica."""
        try:
            return ray.get(self.actor.ask.remote(self.asker, request))
        except RayTaskError as error:
            # The replica's own error, for which callers look, and not Ray's around it.
            raise error.cause from error


def current(served: Sequence[Served]) -> Sequence[Served]:
    """Return the replicas that there are now: the sweep's first, or more that the first knows."""
    try:
        return ray.get(served[0].actor.met.remote(), timeout=ANSWER_SECONDS) or served
    except GetTimeoutError:  # it is being started again
        return served


def shared_receivers(
    run: RunConfig, served: Mapping[str, Sequence[Served]], asker: str
) -> dict[str, Receiver]:
    """Return a run's receivers, each through the nearest of its replicas."""
    device = pick_device()
    alone = not run.training.gradient_checkpointing  # which allows no cache
    receivers: dict[str, Receiver] = {}
    for receiver in run.receivers:
        channel = RayChannel(current(served[receiver.name]), asker)
        receivers[receiver.name] = RemoteReceiver(receiver, channel, device, head_is_text=alone)
    return receivers
