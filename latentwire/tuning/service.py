"""Frozen receivers as a service of one sweep: replicas that trials share, and the way to them."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from latentwire.config import ReceiverConfig, RunConfig, SpaceFile
from latentwire.models.weights import ReceiverError, pick_device
from latentwire.receivers.base import Receiver
from latentwire.receivers.own import OwnReceiver
from latentwire.receivers.replica import Replica
from latentwire.receivers.requests import LookUp, Request
from latentwire.receivers.shared import Facts, SharedReceiver
from latentwire.tuning.sharing import Sharing
from latentwire.tuning.trial import ZERO_COPY

ASKING = 64
"""Requests that a replica holds in its queue; who asks beyond that waits until there is room."""


# Tensors that came through shared memory are read-only, and so they are used: nothing here writes into one.
for told in ("Zero-copy tensor serialization is enabled", "The given NumPy array is not writable"):
    warnings.filterwarnings("ignore", message=told)


@dataclass(frozen=True)
class Served:
    """One replica, as trials are told of it."""

    node: str
    actor: Any


class ReplicaActor:
    """A :class:`~latentwire.receivers.replica.Replica` in a process of its own."""

    def __init__(self, receiver: dict[str, Any], training: dict[str, Any], most_positions: int, threads: int) -> None:
        """``receiver``, ``training``: dumped sections; ``training`` says how activations are kept and layers compiled."""
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        self.lm = OwnReceiver(ReceiverConfig.model_validate(receiver))
        if training["gradient_checkpointing"]:
            self.lm.recompute_activations()
        if training["compile"]:
            self.lm.fuse()
        self.loaded = Facts.of(self.lm)
        self.replica = Replica(self.lm, most_positions=most_positions, most_waiting=ASKING)

    @ray.method(concurrency_group="asking")
    def ask(self, asker: str, request: Request | LookUp) -> Any:
        """The answer to one request."""
        return self.replica.ask(asker, request)

    @ray.method(concurrency_group="telling")
    def facts(self) -> Facts:
        """Of the weights, when they were loaded."""
        return self.loaded

    @ray.method(concurrency_group="telling")
    def fingerprint(self) -> str:
        """Of the weights, as they are now."""
        return self.lm.fingerprint()

    @ray.method(concurrency_group="telling")
    def told(self) -> dict[str, Any]:
        """Accounts of all trials, passes so far, and what waits; and where this replica is."""
        found = {"accounts": self.replica.told(), "passes": self.replica.passes, "waiting": self.replica.waiting}
        return found | {"node": ray.get_runtime_context().get_node_id()}


class RayChannel:
    """The way from one trial to the nearest replica of a receiver. Ray starts a replica that died again, and asks it again."""

    def __init__(self, replicas: Sequence[Served], asker: str) -> None:
        here = ray.get_runtime_context().get_node_id()
        near = [replica for replica in replicas if replica.node == here] or list(replicas)
        self.actor, self.asker = near[zlib.crc32(asker.encode()) % len(near)].actor, asker

    def facts(self) -> Facts:
        """Of its weights, when they were loaded."""
        return ray.get(self.actor.facts.remote())

    def ask(self, request: Request | LookUp) -> Any:
        """The answer; raises what answering it raised there."""
        try:
            return ray.get(self.actor.ask.remote(self.asker, request))
        except RayTaskError as error:
            raise error.cause from error


def shared_receivers(run: RunConfig, served: Mapping[str, Sequence[Served]], asker: str) -> dict[str, Receiver]:
    """A run's receivers, each through the nearest of its replicas."""
    device = pick_device()
    alone = not run.training.gradient_checkpointing  # which allows no cache
    return {
        receiver.name: SharedReceiver(receiver, RayChannel(served[receiver.name], asker), device, head_is_text=alone)
        for receiver in run.receivers
    }


@contextmanager
def serving(
    space: SpaceFile, sharing: Sharing | None, expected: Mapping[str, str] | None = None
) -> Iterator[dict[str, list[Served]] | None]:
    """Replicas of every receiver for as long as this context lasts; ``None`` where trials have their own.

    They die with this driver. ``expected``: hashes that the weights must have. Raises
    :class:`~latentwire.models.weights.ReceiverError` where they have others, or replicas differ, and RuntimeError where they
    have changed at the end.
    """
    if sharing is None:
        yield None
        return
    run = space.run
    group = {"asking": 2 * ASKING, "telling": 2}
    remote = ray.remote(concurrency_groups=group)(ReplicaActor)
    settings = run.training.model_dump(mode="json", include={"gradient_checkpointing", "compile"})
    actors = {
        receiver.name: [
            remote.options(
                num_cpus=0,
                num_gpus=sharing.gpus_per_replica[receiver.name],
                scheduling_strategy="SPREAD",
                max_restarts=-1,
                max_task_retries=-1,
                runtime_env={"env_vars": ZERO_COPY},
            ).remote(receiver.model_dump(mode="json"), settings, sharing.most_positions, sharing.threads)
            for _ in range(sharing.replicas)
        ]
        for receiver in run.receivers
    }
    try:
        served = {
            name: [Served(told["node"], actor) for told, actor in zip(ray.get([a.told.remote() for a in own]), own, strict=True)]
            for name, own in actors.items()
        }  # fmt: skip
        loaded = {}
        for name, own in actors.items():
            hashes = {facts.fingerprint for facts in ray.get([actor.facts.remote() for actor in own])}
            if len(hashes) > 1 or (expected is not None and hashes != {expected[name]}):
                wanted = "one hash" if expected is None else f"hash {expected[name]} as in the manifest"
                raise ReceiverError(f"replicas of receiver {name} must have {wanted}, got {', '.join(sorted(hashes))}")
            loaded[name] = hashes
        print(f"shared receivers: {sharing}", flush=True)
        yield served
        for name, own in actors.items():
            print(usage(name, ray.get([actor.told.remote() for actor in own])), flush=True)
            if set(ray.get([actor.fingerprint.remote() for actor in own])) != loaded[name]:
                raise RuntimeError(f"frozen receivers must not change, {name} did")
    finally:
        for actor in (actor for own in actors.values() for actor in own):
            ray.kill(actor)


def usage(name: str, told: Sequence[Mapping[str, Any]]) -> str:
    """A line on what a receiver's replicas did."""
    accounts = [account for one in told for account in one["accounts"].values()]
    requests, joined = (sum(account[what] for account in accounts) for what in ("requests", "joined"))
    seconds, waited = (sum(account[what] for account in accounts) for what in ("seconds", "waited"))
    return (
        f"shared {name}: {requests:,} requests of {len(accounts)} trials in {sum(one['passes'] for one in told):,} passes, "
        f"{joined:,} of them joined; {seconds:.1f} s of passes, {waited:.1f} s of waiting; "
        f"{sum(one['waiting'] for one in told)} wait still"
    )
