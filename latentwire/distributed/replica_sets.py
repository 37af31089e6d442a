"""The replicas of a sweep: as many as there is room for now, and more as the cluster grows.

The wait for the first ones has a limit.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import last_stage
from latentwire.distributed.replicas import ASKING, ReplicaActor, Served
from latentwire.distributed.trial import ZERO_COPY
from latentwire.distributed.waiting import room
from latentwire.planning.autoscaler import cluster_resources
from latentwire.planning.devices import hold
from latentwire.planning.sharing import Sharing
from latentwire.pretrained.weights import ReceiverError

SAY_SECONDS = 30
"""Seconds between two lines that say what the first replicas wait for."""
GROW_SECONDS = 15
"""Seconds between two looks at whether the cluster has grown."""
ANSWER_SECONDS = 60
"""Seconds that a replica has at a sweep's end to give its account: its node may be gone for
good."""


class Fleet:
    """The replicas of every receiver of a run, in sets of one of each."""

    def __init__(
        self, run: RunConfig, sharing: Sharing, expected: Mapping[str, str] | None
    ) -> None:
        """Prepare the fleet, and begin nothing; ``expected``: hashes that the weights must have."""
        self.run, self.sharing, self.expected = run, sharing, expected
        self.served: dict[str, list[Served]] = {receiver.name: [] for receiver in run.receivers}
        """Replicas that trials may ask: their weights are loaded, and have the expected hash."""
        self.hashes: dict[str, str] = dict(expected or {})
        self.sets = 0
        self._begun: dict[str, list[Any]] = {receiver.name: [] for receiver in run.receivers}
        self._joining: list[tuple[str, Any, Any, Any]] = []
        """Replicas that are still loading: receiver, actor, and references to its node and its
        weights' facts."""
        self._planned_gpus = cluster_resources().get("GPU", 0.0)
        self._ends = threading.Event()
        self._watch: threading.Thread | None = None

    # ------------------------------------------------------------------------------------ beginning

    def start(self, minutes: float) -> None:
        """Begin the replicas that there is room for, at least one set, and wait until they are loaded.

        Raises :class:`~latentwire.pretrained.weights.ReceiverError` where the first replicas have found
        no room in so many minutes, or have other weights than they should.
        """
        self._begin(self._sets_on(ray.available_resources()))
        self._wait_for_room(minutes)
        # A replica names its node (2) as soon as it has a place; to join is to wait for its weights.
        for joining in [joining for joining in self._joining if _is_there(joining[2])]:
            self._join(*joining)
        self._watch = threading.Thread(target=self._grow, name="replicas", daemon=True)
        self._watch.start()

    def _sets_on(self, resources: Mapping[str, float]) -> int:
        """Count the sets that belong on some resources: their part of all that was planned for."""
        replicas = self.sharing.replicas
        if not any(self.sharing.gpus_per_replica.values()):
            return replicas
        # replicas × (GPUs here / GPUs of the plan), and fewer where their parts of GPUs do not fit
        # on whole devices. One set is begun in any case, and waits for its room.
        gpus = resources.get("GPU", 0.0)
        sets = min(replicas, math.floor(replicas * gpus / max(1.0, self._planned_gpus)))
        while sets > 1 and not hold(gpus, self.sharing.gpus_of_replicas(sets)):
            sets -= 1
        return max(1, sets)

    def _begin(self, sets: int) -> None:
        # Threads of an actor by kind of call: more may ask than its queue holds, and wait for room
        # there, while two remain for reports.
        group = {"asking": 2 * ASKING, "reporting": 2}
        remote = ray.remote(concurrency_groups=group)(ReplicaActor)
        settings = self.run.training.model_dump(
            mode="json", include={"gradient_checkpointing", "compile"}
        )
        for _ in range(self.sets, sets):
            for receiver in self.run.receivers:
                # A replica that dies is started again, and its calls are made again: they change
                # nothing, so twice is as once.
                actor = remote.options(
                    num_cpus=0,
                    num_gpus=self.sharing.gpus_per_replica[receiver.name],
                    scheduling_strategy="SPREAD",
                    max_restarts=-1,
                    max_task_retries=-1,
                    runtime_env={"env_vars": ZERO_COPY},
                ).remote(
                    receiver.model_dump(mode="json"),
                    settings,
                    self.sharing.most_positions,
                    self.sharing.threads,
                )
                self._begun[receiver.name].append(actor)
                joining = (receiver.name, actor, actor.node.remote(), actor.facts.remote())
                self._joining.append(joining)
        self.sets = max(self.sets, sets)

    def _wait_for_room(self, minutes: float) -> None:
        """Wait until a replica of each receiver has a place."""
        began = time.monotonic()
        while True:
            left = 60 * minutes - (time.monotonic() - began)
            nodes = [node for _, _, node, _ in self._joining]
            # Until all have a place, or it is time for a line or the end.
            ray.wait(nodes, num_returns=len(nodes), timeout=max(0.0, min(SAY_SECONDS, left)))
            without = dict.fromkeys(name for name, _, _, _ in self._joining)
            for name, _, node, _ in self._joining:
                if _is_there(node):
                    without.pop(name, None)
            if not without:  # one of each is enough to begin with
                return
            needed = {"GPU": sum(self.sharing.gpus_per_replica[name] for name in without)}
            what = f"room for {' and '.join(without)}, {needed['GPU']:g} GPU: {room(needed)}"
            if left <= 0:
                raise ReceiverError(
                    f"shared receivers must find room within tune.wait_minutes ({minutes:g}), "
                    f"there was no {what}; free some, add nodes, raise tune.wait_minutes, or set "
                    "tune.receivers: own"
                )
            print(f"shared receivers wait for {what}; {left / 60:.1f} minutes are left", flush=True)

    def _join(self, name: str, actor: Any, node: Any, facts: Any) -> None:
        """Let trials ask a replica that has loaded its weights. Raises as :meth:`start` does."""
        # Whatever comes of it: one that cannot be loaded is not looked at again.
        self._joining = [joining for joining in self._joining if joining[1] is not actor]
        try:
            fingerprint = ray.get(facts).fingerprint
        except RayTaskError as error:
            raise error.cause from error
        # Without a hash from outside, the first replica's is the one that the others must have.
        expected = self.hashes.setdefault(name, fingerprint)
        if fingerprint != expected:
            source = " as in the manifest" if self.expected else ", as the first has"
            raise ReceiverError(
                f"replicas of receiver {name} must have hash {expected}{source}, got {fingerprint}"
            )
        self.served[name].append(Served(ray.get(node), actor))

    # -------------------------------------------------------------------------------- while it runs

    def _grow(self) -> None:
        while not self._ends.wait(GROW_SECONDS):
            try:
                self.look()
            except (RayError, ReceiverError) as error:
                print(f"shared receivers: a replica does not join: {error}", flush=True)

    def look(self) -> None:
        """Begin replicas on what the cluster has grown by, and let trials know the loaded ones."""
        self._begin(self._sets_on(ray.cluster_resources()))
        # Facts (3) are there when the weights are loaded: nobody waits here.
        for joining in [joining for joining in self._joining if _is_there(joining[3])]:
            self._join(*joining)
            print(
                f"shared receivers: {joining[0]} has {len(self.served[joining[0]])} replicas now",
                flush=True,
            )
        # Trials know the first replica from their beginning, and ask it for the others.
        for served in self.served.values():
            served[0].actor.meet.remote(list(served))

    # ------------------------------------------------------------------------------------------ end

    def account(self) -> None:
        """Print what each receiver's replicas did. Raises RuntimeError for changed weights."""
        self._end_watch()
        for name, served in self.served.items():
            reports = _answers([replica.actor.report.remote() for replica in served])
            print(usage(name, reports), flush=True)
            hashes = _answers([replica.actor.fingerprint.remote() for replica in served])
            if set(hashes) - {self.hashes[name]}:
                raise RuntimeError(f"frozen receivers must not change, {name} did")
            gone = len(served) - len(hashes)
            if gone:
                print(f"shared {name}: {gone} replica(s) are gone and were not checked", flush=True)

    def stop(self) -> None:
        """End all replicas."""
        self._end_watch()
        for actors in self._begun.values():
            for actor in actors:
                ray.kill(actor)

    def _end_watch(self) -> None:
        self._ends.set()
        if self._watch is not None:
            self._watch.join()


def _is_there(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])


def _answers(references: Sequence[Any]) -> list[Any]:
    """Return the answers that come within :data:`ANSWER_SECONDS`."""
    answered, _ = ray.wait(list(references), num_returns=len(references), timeout=ANSWER_SECONDS)
    return ray.get(answered)


@contextmanager
def serving(
    space: SweepConfig, sharing: Sharing | None, expected: Mapping[str, str] | None = None
) -> Iterator[dict[str, list[Served]] | None]:
    """Run replicas of every receiver while the block lasts; yields ``None`` without ``sharing``.

    They die with this driver. ``expected``: hashes that the weights must have. Raises
    :class:`~latentwire.pretrained.weights.ReceiverError` where they have others, replicas differ, or
    the first have found no room within ``tune.wait_minutes``, and RuntimeError for weights that
    have changed at the end.
    """
    if sharing is None:
        yield None
        return
    fleet = Fleet(last_stage(space.run), sharing, expected)
    try:
        fleet.start(space.tune.wait_minutes)
        print(f"shared receivers: {sharing}", flush=True)
        yield fleet.served
        fleet.account()
    finally:
        fleet.stop()


def usage(name: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """Describe in one line what a receiver's replicas did."""
    accounts: list[Mapping[str, Any]] = []  # one for each trial and replica that it has asked
    for report in reports:
        accounts += report["accounts"].values()
    total = dict.fromkeys(("requests", "joined", "seconds", "waited"), 0)
    for account in accounts:
        for count in total:
            total[count] += account[count]
    passes = sum(report["passes"] for report in reports)
    return (
        f"shared {name}: {total['requests']:,} requests of {len(accounts)} trials in {passes:,} "
        f"passes, {total['joined']:,} of them joined; {total['seconds']:.1f} s of passes, "
        f"{total['waited']:.1f} s of waiting; {sum(report['waiting'] for report in reports)} wait "
        "still"
    )
