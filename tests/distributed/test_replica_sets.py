"""Replicas begin where there is room now, are waited for in a limit, and grow with the cluster."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from latentwire.config import RunConfig, SweepConfig
from latentwire.distributed import replica_sets, waiting
from latentwire.distributed.replica_sets import Fleet, serving
from latentwire.planning.sharing import Sharing
from latentwire.pretrained.weights import ReceiverError


class Reference(SimpleNamespace):
    """What a call will give: nothing while its actor has no place."""


class FakeRay:
    """A cluster whose actors begin in order, and have a place while free GPUs last."""

    def __init__(self, gpus: float, free: float, most: float) -> None:
        self.gpus, self.free, self.most, self.used = gpus, free, most, 0.0
        self.actors: list[Any] = []
        self.fingerprints: dict[int, Any] = {}
        """Of those that differ: number of the actor → hash, or error."""

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": self.gpus}

    def available_resources(self) -> dict[str, float]:
        return {"GPU": self.free - self.used}

    def remote(self, **_: Any) -> Any:
        return lambda _: SimpleNamespace(options=self.options)

    def options(self, num_gpus: float, **_: Any) -> Any:
        def begin(receiver: dict[str, Any], *_: Any) -> Any:
            number = len(self.actors)
            actor = SimpleNamespace(
                number=number, name=receiver["name"], gpus=num_gpus, placed=False, met=[]
            )
            facts = SimpleNamespace(fingerprint=self.fingerprints.get(number, receiver["name"]))
            for method, value in {
                "node": f"node-{number}",
                "facts": facts,
                "report": account(),
                "fingerprint": facts.fingerprint,
            }.items():
                setattr(
                    actor,
                    method,
                    SimpleNamespace(remote=lambda value=value: Reference(actor=actor, value=value)),
                )
            actor.meet = SimpleNamespace(remote=actor.met.append)
            self.actors.append(actor)
            return actor

        return SimpleNamespace(remote=begin)

    def wait(
        self, references: list[Reference], num_returns: int = 1, timeout: float = 0
    ) -> tuple[list, list]:
        for actor in self.actors:
            if not actor.placed and self.used + actor.gpus <= self.free:
                actor.placed, self.used = True, self.used + actor.gpus
        ready = [reference for reference in references if reference.actor.placed]
        return ready, [reference for reference in references if not reference.actor.placed]

    def get(self, references: Any) -> Any:
        if isinstance(references, list):
            return [self.get(reference) for reference in references]
        if isinstance(getattr(references.value, "fingerprint", None), Exception):
            raise RayTaskError("facts", "…", references.value.fingerprint)
        return references.value

    def kill(self, actor: Any) -> None:
        actor.placed = False


def account() -> dict[str, Any]:
    return {"accounts": {}, "passes": 0, "waiting": 0}


def sharing(replicas: int, gpus: float = 0.25) -> Sharing:
    return Sharing(replicas, {"llama": 1, "qwen": 1}, {"llama": gpus, "qwen": gpus}, 0, 1, 1, 0.1)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Two GPUs of at most eight, both free."""
    fake = FakeRay(gpus=2, free=2, most=8)
    monkeypatch.setattr(replica_sets, "ray", fake)
    monkeypatch.setattr(waiting, "ray", fake)
    monkeypatch.setattr(replica_sets, "cluster_resources", lambda: {"GPU": fake.most})
    monkeypatch.setattr(replica_sets, "GROW_SECONDS", 3600)
    return fake


def counts(served: dict[str, Any]) -> dict[str, int]:
    return {name: len(replicas) for name, replicas in served.items()}


def test_what_is_asked_for_is_what_there_is_room_for_now_and_more_as_the_cluster_grows(
    run: RunConfig, cluster: FakeRay
) -> None:
    fleet = Fleet(run, sharing(8), None)
    fleet.start(minutes=1)
    assert counts(fleet.served) == {"llama": 2, "qwen": 2} and len(cluster.actors) == 4
    cluster.gpus = cluster.free = 4
    fleet.look()
    fleet.look()
    assert counts(fleet.served) == {"llama": 4, "qwen": 4}
    first = fleet.served["llama"][0].actor
    assert len(first.met[-1]) == 4  # where trials that begin from now on learn of them
    cluster.gpus = 2  # nodes that go take replicas with them, and no further ones are begun
    fleet.look()
    assert len(cluster.actors) == 8
    fleet.account()
    fleet.stop()
    assert not any(actor.placed for actor in cluster.actors)


def test_a_cluster_without_gpus_yet_is_asked_for_one_set(
    run: RunConfig, cluster: FakeRay, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where it does not come the sweep says what it waited for, within its limit."""
    cluster.gpus = cluster.free = 0
    space = SweepConfig.model_validate({"tune": {"wait_minutes": 0.001}}).model_copy(
        update={"run": run}
    )
    with (
        pytest.raises(
            ReceiverError,
            match=r"room within tune\.wait_minutes \(0\.001\), there was no room for llama and qwen, 0\.5 GPU: the cluster "
            r"has 0 GPU \(0 free\); free some, add nodes, raise tune\.wait_minutes, or set tune\.receivers: own",
        ),
        serving(space, sharing(8)),
    ):
        raise AssertionError("no trial begins without a receiver")
    assert len(cluster.actors) == 2
    assert (
        "shared receivers wait for room for llama and qwen, 0.5 GPU: the cluster"
        in capsys.readouterr().out
    )


def test_others_on_a_busy_cluster_are_not_waited_for(run: RunConfig, cluster: FakeRay) -> None:
    cluster.gpus, cluster.free = 8, 1
    fleet = Fleet(run, sharing(8), None)
    fleet.start(minutes=1)
    assert counts(fleet.served) == {"llama": 1, "qwen": 1}
    fleet.look()  # as many as the cluster has GPUs are begun now, and wait for what others hold
    assert len(cluster.actors) == 16 and counts(fleet.served)["llama"] < 8
    cluster.free = 8
    fleet.look()
    assert counts(fleet.served) == {"llama": 8, "qwen": 8}
    fleet.stop()


def test_replicas_of_other_weights_do_not_serve(run: RunConfig, cluster: FakeRay) -> None:
    cluster.fingerprints = {2: "other"}  # the second of llama
    fleet = Fleet(run, sharing(8), None)
    with pytest.raises(
        ReceiverError,
        match="replicas of receiver llama must have hash llama, as the first has, got other",
    ):
        fleet.start(minutes=1)
    fleet.stop()


def test_a_receiver_that_cannot_be_loaded_is_the_users_error(
    run: RunConfig, cluster: FakeRay
) -> None:
    cluster.fingerprints = {0: ReceiverError("receiver llama: no decoder")}
    fleet = Fleet(run, sharing(8), None)
    with pytest.raises(ReceiverError, match="receiver llama: no decoder"):
        fleet.start(minutes=1)
    fleet.stop()


def test_without_gpus_all_replicas_begin_at_once(run: RunConfig, cluster: FakeRay) -> None:
    cluster.gpus = cluster.free = cluster.most = 0
    fleet = Fleet(run, sharing(3, gpus=0.0), None)
    fleet.start(minutes=1)
    assert counts(fleet.served) == {"llama": 3, "qwen": 3}
    fleet.stop()
