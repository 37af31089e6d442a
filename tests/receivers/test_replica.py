"""Requests that wait are joined, fairly, and one's fault is nobody else's."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.batches import TrainingCollator
from latentwire.losses.bundles import term_counts, weights_at
from latentwire.model import LatentWire
from latentwire.prompts.batch import collate
from latentwire.receivers.base import LossTask
from latentwire.receivers.replica import Replica
from latentwire.receivers.requests import (
    GenerateRequest,
    LossRequest,
    Prompt,
    Request,
    ScoreRequest,
)
from tests.conftest import shard_table

UNLIKE = (
    {"encoder.latent_len": 3, "losses.answer_ce_weight": 0.7},
    {"encoder.latent_len": 9, "losses.kd_weight": 1.0, "losses.k": 2, "prompt.anchor": "A: "},
    {
        "losses.first_token_ce_weight": 0.5,
        "losses.reconstruction_ce_weight": 1.0,
        "training.logit_rows": 2,
    },
)
"""Trials that differ in all that may differ."""


def loss_request(
    run: RunConfig, name: str, rows: int, seed: int, *, added: bool = False
) -> LossRequest:
    """One step's request of a run, with a soft prompt drawn by the seed."""
    wire = LatentWire(run)
    (batch,) = TrainingCollator(run, wire.builders, wire.interlingua.encoder)(
        shard_table(run, rows, seed), 0
    )
    sequences, weights = batch.sequences[name], weights_at(run.losses, 0)
    teacher = batch.teacher[name] if weights.needs_teacher else None
    task = LossTask(
        sequences,
        weights,
        term_counts(weights, sequences),
        teacher,
        run.losses,
        run.training.logit_rows,
    )
    generator = torch.Generator().manual_seed(seed)
    lm = wire.receivers[name]
    soft_ND = (
        torch.randn(int(sequences.slots_BS.sum()), lm.width, generator=generator) * lm.embed_rms
    )
    wide = sum(
        p.out_features for n, p in lm.skeleton().named_modules() if n.endswith(("k_proj", "v_proj"))
    )
    added_NE = (
        torch.randn(int(sequences.latents_BS.sum()), wide, generator=generator) * 0.1
        if added
        else None
    )
    return LossRequest(task, Prompt(soft_ND, added_NE), True, True)


@pytest.mark.parametrize("name", ["llama", "qwen"])
@pytest.mark.parametrize("added", [False, True])
def test_joined_losses_and_gradients_are_those_of_each_alone(
    run: RunConfig, replicas: dict[str, Replica], name: str, added: bool
) -> None:
    lm = replicas[name].lm
    requests = [
        loss_request(with_values(run, values), name, 2 + seed, seed, added=added)
        for seed, values in enumerate(UNLIKE)
    ]
    assert len({request.alike for request in requests}) == 1
    joined = LossRequest.answer(lm, requests)
    for request, together in zip(requests, joined, strict=True):
        (alone,) = LossRequest.answer(lm, [request])
        torch.testing.assert_close(together.shares_T, alone.shares_T, atol=1e-5, rtol=1e-5)
        for own, other in (
            (together.gradient.soft_ND, alone.gradient.soft_ND),
            (together.gradient.added_NE, alone.gradient.added_NE),
        ):
            assert (own is None) == (other is None)
            if own is not None and other is not None:
                torch.testing.assert_close(
                    own, other, atol=1e-5 * float(other.abs().max()), rtol=1e-4
                )
                assert float(own.abs().max()) > 0


def test_joined_answers_and_judgements_are_those_of_each_alone(
    run: RunConfig, replicas: dict[str, Replica]
) -> None:
    lm = replicas["llama"].lm
    asked: list[tuple[GenerateRequest, ScoreRequest]] = []
    for seed, slots in enumerate((2, 7, 4)):
        wire = LatentWire(run)
        builder, columns = wire.builders["llama"], shard_table(run, 1 + seed, seed).to_pydict()
        ids = list(zip(columns["llama_question_ids"], columns["llama_answer_ids"], strict=True))
        soft_ND = (
            torch.randn(slots * len(ids), lm.width, generator=torch.Generator().manual_seed(seed))
            * lm.embed_rms
        )
        left = collate([builder.latent(slots, question) for question, _ in ids], side="left")
        gold = collate([builder.latent(slots, question, answer) for question, answer in ids])
        asked.append(
            (
                GenerateRequest(left, Prompt(soft_ND, None), builder.stop_ids, 5),
                ScoreRequest(gold, Prompt(soft_ND, None)),
            )
        )
    assert (
        len({generate.alike for generate, _ in asked})
        == len({judge.alike for _, judge in asked})
        == 1
    )
    said = GenerateRequest.answer(lm, [generate for generate, _ in asked])
    judged = ScoreRequest.answer(lm, [judge for _, judge in asked])
    for (generate, judge), own_said, own_judged in zip(asked, said, judged, strict=True):
        assert own_said.rows == GenerateRequest.answer(lm, [generate])[0].rows
        alone = ScoreRequest.answer(lm, [judge])[0]
        torch.testing.assert_close(own_judged.ce_N, alone.ce_N, atol=1e-4, rtol=1e-4)
        assert own_judged.likelier_N.tolist() == alone.likelier_N.tolist()


class Job(Request):
    """A request whose answer is its own name, that notes who was answered together, and can wait or fail."""

    def __init__(self, name: str, log: list[list[str]], *, size: int = 1, hold: threading.Event | None = None,
                 fails: Callable[[list[str]], Exception | None] = lambda names: None) -> None:  # fmt: skip
        self.name, self.log, self.size, self.hold, self.fails = name, log, size, hold, fails

    @property
    def positions(self) -> int:
        return self.size

    @property
    def alike(self) -> Any:
        return Job

    @staticmethod
    def answer(lm: Any, requests: Any) -> list[Any]:
        names = [request.name for request in requests]
        for request in requests:
            if request.hold is not None:
                assert request.hold.wait(10)
            if (error := request.fails(names)) is not None:
                raise error
        requests[0].log.append(names)
        return names


class Desk:
    """A replica without a model, and trials that ask it from threads of their own."""

    def __init__(self, most_positions: int, most_waiting: int = 100) -> None:
        class Nobody:
            name = "nobody"

        self.replica = Replica(Nobody(), most_positions=most_positions, most_waiting=most_waiting)  # type: ignore[arg-type]
        self.log: list[list[str]] = []
        self.answers: dict[str, Any] = {}
        self.threads: list[threading.Thread] = []

    def ask(self, asker: str, name: str, **options: Any) -> None:
        """In the background; waits until the request is in the queue, or taken off it."""

        def run() -> None:
            try:
                self.answers[name] = self.replica.ask(asker, Job(name, self.log, **options))
            except Exception as error:
                self.answers[name] = error

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()
        time.sleep(0.02)

    def finish(self) -> None:
        """Wait for all answers."""
        for thread in self.threads:
            thread.join(10)
        self.replica.close()


def test_the_longest_unserved_comes_first_and_what_fits_goes_with_it() -> None:
    desk, open_ = Desk(most_positions=2), threading.Event()
    desk.ask("a", "a1", hold=open_)
    for name in ("a2", "a3", "b1", "a4", "c1"):
        desk.ask(name[0], name)
    assert desk.replica.waiting == 5
    open_.set()
    desk.finish()
    assert desk.log == [["a1"], ["b1", "c1"], ["a2", "a3"], ["a4"]]
    told = desk.replica.usage()
    assert (told["a"]["requests"], told["a"]["joined"], told["b"]["joined"]) == (4, 2, 1)
    assert told["b"]["waited"] > 0 and desk.replica.passes == 4 and desk.replica.waiting == 0


def test_a_trial_that_asks_without_pause_does_not_starve_others() -> None:
    desk, open_ = Desk(most_positions=1), threading.Event()
    desk.ask("greedy", "g0", hold=open_)
    for number in range(1, 6):
        desk.ask("greedy", f"g{number}")
    desk.ask("modest", "m")
    open_.set()
    desk.finish()
    assert desk.log.index(["m"]) == 1


def test_who_asks_a_full_queue_waits_for_room() -> None:
    desk, open_ = Desk(most_positions=1, most_waiting=2), threading.Event()
    for name in ("a1", "b1", "c1", "d1"):
        desk.ask(name[0], name, hold=open_)
    assert desk.replica.waiting == 1  # one is being answered, one waits, two are held at the door
    open_.set()
    desk.finish()
    assert sorted(name for group in desk.log for name in group) == ["a1", "b1", "c1", "d1"]


def test_a_pass_that_does_not_fit_is_split_and_the_next_ones_are_smaller() -> None:
    def too_large(names: list[str]) -> Exception | None:
        return RuntimeError("DefaultCPUAllocator: not enough memory") if len(names) > 2 else None

    desk, open_ = Desk(most_positions=8), threading.Event()
    desk.ask("z", "z", hold=open_)
    for name in "abcd":
        desk.ask(name, name, fails=too_large)
    open_.set()
    desk.finish()
    assert desk.log == [["z"], ["a", "b"], ["c", "d"]] and desk.replica.most_positions == 2
    assert desk.answers == {name: name for name in "zabcd"}


def test_a_request_that_fails_is_its_own_trials_error() -> None:
    desk, open_ = Desk(most_positions=8), threading.Event()
    desk.ask("z", "z", hold=open_)
    for name in "abc":
        desk.ask(name, name, fails=lambda names: ValueError("b is wrong") if "b" in names else None)
    open_.set()
    desk.finish()
    assert isinstance(desk.answers.pop("b"), ValueError) and desk.answers == {
        "z": "z",
        "a": "a",
        "c": "c",
    }
    assert desk.replica.most_positions == 8  # memory was not the matter


def test_a_closed_replica_says_so() -> None:
    desk = Desk(most_positions=1)
    desk.finish()
    with pytest.raises(RuntimeError, match="replica of nobody is closed"):
        desk.replica.ask("a", Job("a", desk.log))


def test_requests_of_one_asker_with_tensors_wait_together() -> None:
    """Two workers of one trial: what waits is told apart by itself, since tensors do not compare."""

    @dataclass(frozen=True)
    class Holding(Request):
        ids_BS: torch.Tensor
        hold: threading.Event | None = None

        @property
        def positions(self) -> int:
            return self.ids_BS.numel()

        @property
        def alike(self) -> Any:
            return self.ids_BS.numel()

        @staticmethod
        def answer(lm: Any, requests: Any) -> list[Any]:
            for request in requests:
                assert request.hold is None or request.hold.wait(10)
            return [int(request.ids_BS.sum()) for request in requests]

    desk, open_ = Desk(most_positions=2), threading.Event()
    found: dict[int, Any] = {}

    def ask(number: int, hold: threading.Event | None = None) -> threading.Thread:
        request = Holding(torch.full((1, 2), number), hold)
        thread = threading.Thread(
            target=lambda: found.update({number: desk.replica.ask("a", request)}), daemon=True
        )
        thread.start()
        time.sleep(0.02)
        return thread

    threads = [ask(1, open_), ask(2), ask(3)]
    open_.set()
    for thread in threads:
        thread.join(10)
    desk.finish()
    assert found == {1: 2, 2: 4, 3: 6}


def test_a_fault_of_the_replica_is_everybodys_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    desk = Desk(most_positions=1)

    def failing() -> None:
        desk.replica._changed.wait_for(lambda: desk.replica.waiting)
        raise KeyError("planted")

    with desk.replica._changed:
        monkeypatch.setattr(desk.replica, "_next", failing)
    desk.ask("a", "first")  # taken by the call that was under way
    with desk.replica._changed:
        desk.replica._changed.notify_all()
    desk.ask("a", "second")
    for thread in desk.threads:
        thread.join(10)
    assert "replica of nobody" in str(desk.answers["second"])


def test_a_fault_in_a_pass_is_the_error_of_all_that_are_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU that has failed raises again where its cache is emptied: outside of the pass itself."""

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def too_large(names: list[str]) -> Exception | None:
        return RuntimeError("CUDA out of memory") if len(names) > 1 else None

    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    desk, open_ = Desk(most_positions=2), threading.Event()
    desk.ask("z", "z", hold=open_)
    for name in "abc":  # a and b are in one pass, c is in the queue behind it
        desk.ask(name, name, fails=too_large)
    open_.set()
    desk.finish()
    assert desk.answers.pop("z") == "z" and sorted(desk.answers) == ["a", "b", "c"]
    assert all("has ended; see its log" in str(error) for error in desk.answers.values())
