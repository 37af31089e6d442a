"""A message's cache given to all its questions, beside its questions as branches of one sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.measure import Row, in_turns
from latentwire.config import FeaturesConfig, RunConfig
from latentwire.data.batches import TrainingCollator
from latentwire.losses.terms import token_ce
from latentwire.model import LatentWire
from latentwire.prompts.batch import Batch
from latentwire.receivers.local import LocalReceiver


@dataclass(frozen=True)
class Branches:
    """One sequence a message: what its rows begin with, then what follows of each row, a branch."""

    places_M: list[list[tuple[int, int]]]
    """Message → the row of ``rest`` and the place in it that each place after the message holds."""
    position_MS: torch.Tensor
    """Each branch begins where the message ends."""
    seen_MSS: torch.Tensor
    """True where a place sees another: the message and its own branch, up to itself."""
    predict_N: torch.Tensor
    """Flat index into M × S of each target's place, in the order of ``rest``."""


def branches(begun: Batch, rest: Batch) -> Branches:
    """Lay the rows of ``rest`` out behind the beginnings that they go on from.

    Args:
        begun: beginnings, one row a message, padded to the right.
        rest: what follows them, likewise.
    """
    assert begun.end_R is not None and rest.past_R is not None
    # Places of each beginning, and of what follows in each row, without padding.
    ends, lengths = begun.end_R.tolist(), rest.attention_BS.sum(1).tolist()
    positions, branch_of, places_M = [], [], []
    place_of: dict[tuple[int, int], tuple[int, int]] = {}
    for message, end in enumerate(ends):
        rows_R = (rest.past_R == message).nonzero()[:, 0].tolist()
        # The sequence of a message: itself, then its rows one after another, P places in all.
        places: list[tuple[int, int]] = []
        for row in rows_R:
            places += [(row, place) for place in range(lengths[row])]
        place_of |= {key: (message, end + index) for index, key in enumerate(places)}
        places_M.append(places)
        # Every branch counts on from the message's end, wherever it stands in the sequence.
        positions.append(torch.tensor([*range(end), *(end + place for _, place in places)]))
        # 0: the message; 1 + row: that row's branch; −1 below: padding.
        branch_of.append(torch.tensor([0] * end + [1 + row for row, _ in places]))
    position_MS = pad_sequence(positions, batch_first=True)
    branch_MS = pad_sequence(branch_of, batch_first=True, padding_value=-1)
    width, rest_width = position_MS.shape[1], rest.ids_BS.shape[1]
    # [message, query, key]
    same_MSS = branch_MS[:, :, None] == branch_MS[:, None, :]
    message_MS = branch_MS == 0
    before_SS = torch.ones(width, width, dtype=torch.bool).tril()
    # predict_N indexes rest as [R · S]: row = flat // S, place = flat % S.
    predict = [place_of[int(flat) // rest_width, int(flat) % rest_width] for flat in rest.predict_N]
    return Branches(
        places_M,
        position_MS,
        (same_MSS | message_MS[:, None, :]) & before_SS,
        torch.tensor([message * width + place for message, place in predict]),
    )


@dataclass(frozen=True)
class Step:
    """What one receiver reads in a step: beginnings, what follows them, and the vectors in both."""

    lm: LocalReceiver
    begun: Batch
    rest: Batch
    soft_ND: torch.Tensor
    rest_ND: torch.Tensor | None

    def by_branches(self) -> torch.Tensor:
        """Return the mean cross-entropy, read in one pass over :func:`branches`."""
        assert self.begun.end_R is not None
        layout = branches(self.begun, self.rest)
        begun_MSD = self.lm.embed(self.begun, self.soft_ND)
        rest_RTD = self.lm.embed(self.rest, self.rest_ND)
        sequences = []
        for message, end in enumerate(self.begun.end_R.tolist()):
            # [P, 2] → two [P]
            row_P, place_P = torch.tensor(layout.places_M[message]).T
            sequences.append(torch.cat((begun_MSD[message, :end], rest_RTD[row_P, place_P])))
        embeds_MSD = pad_sequence(sequences, batch_first=True)
        # Added to the scores, which eager attention asks for: 0 where seen. [M, 1, S, S]: for all heads.
        unseen_MSS = torch.zeros_like(layout.seen_MSS, dtype=embeds_MSD.dtype)
        unseen_MSS.masked_fill_(~layout.seen_MSS, torch.finfo(embeds_MSD.dtype).min)
        hidden_MSD = self.lm.lm.base_model(
            inputs_embeds=embeds_MSD,
            attention_mask=unseen_MSS[:, None],
            position_ids=layout.position_MS,
            use_cache=False,
        ).last_hidden_state
        # [M, S, D] → [M · S, D] → [N, D]
        hidden_ND = hidden_MSD.flatten(0, 1).index_select(0, layout.predict_N)
        return token_ce(self.lm.logits(hidden_ND), self.rest.target_N).mean()

    def by_caches(self) -> torch.Tensor:
        """Return the same as training reads it: the messages, then the rows that go on from them."""
        past = self.lm.prefill(self.begun, self.soft_ND)
        logits_NV = self.lm.supervised_logits(self.rest, self.rest_ND, past)
        return token_ce(logits_NV, self.rest.target_N).mean()

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss's gradient with respect to the messages' vectors."""
        (gradient_ND,) = torch.autograd.grad(loss, self.soft_ND)
        return gradient_ND

    def check(self) -> None:
        """Raise :class:`ValueError` where the two ways differ by more than their type explains."""
        ours, theirs = self.by_caches(), self.by_branches()
        ours_ND, theirs_ND = self.gradient(ours), self.gradient(theirs)
        # bfloat16 has 8 bits of mantissa, and sums are taken in another order.
        tolerance = 1e-4 if self.lm.lm.dtype == torch.float32 else 0.1
        far = max(
            float((ours - theirs).detach().abs() / ours.detach().abs()),
            float((ours_ND - theirs_ND).norm() / ours_ND.norm()),
        )
        if far > tolerance:
            raise ValueError(
                f"caches and branches must agree to {tolerance}, got {far:.2g} for receiver "
                f"{self.lm.name}; layers with a window, or a feature, may see another distance"
            )


def rows(run: RunConfig, batch: pa.Table, repeats: int) -> list[Row]:
    """Forward and back through each receiver: caches for all questions over branches.

    Args:
        run: its soft prompts are read, without features.
        batch: rows of a step, questions to the same context side by side.
        repeats: measured turns of each side.
    """
    wire = LatentWire(run.model_copy(update={"features": FeaturesConfig()}))
    collate = TrainingCollator(wire.run, wire.builders, wire.interlingua.encoder)
    # Past every schedule, and in one part.
    whole = collate(batch, 10**6)[0]
    message = wire.interlingua.encode(whole.tokens)
    measured = []
    for name in wire.receivers:
        parts = wire.parted(name, whole.sequences[name])
        assert parts is not None, "rows share no message"
        with torch.no_grad(), wire.reading(name, parts[0], message) as soft_ND:
            assert soft_ND is not None
        with torch.no_grad(), wire.reading_on(name, parts[1], message) as rest_ND:
            begun, rest = parts
        step = Step(wire.local_receiver(name), begun, rest, soft_ND.requires_grad_(), rest_ND)
        step.check()
        ours, theirs = in_turns(
            partial(_there_and_back, step, step.by_caches),
            partial(_there_and_back, step, step.by_branches),
            repeats,
        )
        detail = (
            f"{name}, {len(rest.ids_BS)} rows of {len(begun.ids_BS)} messages: "
            f"{1e3 * ours:.0f} / {1e3 * theirs:.0f} ms"
        )
        what = "a message's cache for its rows ÷ branches in one sequence"
        measured.append(Row(what, ours / theirs, "report", detail))
    return measured


def _there_and_back(step: Step, read: Callable[[], torch.Tensor]) -> None:
    step.gradient(read())
