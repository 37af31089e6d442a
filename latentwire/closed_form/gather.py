"""One pass over texts: senders' states, each receiver's keys and values there, and the gradients.

A token of the message is one of the first sender's tokenizer. What stands for it at a receiver is
that receiver's own token which ends where it ends, or first after it: bytes are the common ruler.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import torch

from latentwire.closed_form.moments import Moments
from latentwire.data.batches import once
from latentwire.evaluation.own_heads import heads_of, own_entries
from latentwire.losses.terms import token_ce
from latentwire.model import LatentWire
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.models.head_slots import Heads
from latentwire.models.senders import reads_at
from latentwire.models.unfolding import Unfolding
from latentwire.prompts.batch import Batch, collate
from latentwire.receivers.local import LocalReceiver

TEXTS_AT_ONCE = 8
"""Texts that are read together."""


@torch.no_grad()
def add_tokens(moments: Moments, wire: LatentWire, table: pa.Table) -> None:
    """Add the tokens of a table's texts, each text once: states, keys and values.

    Args:
        moments: sums that are added to, of some receivers.
        wire: a wire in which they have chosen heads.
        table: training rows, as columns of a shard.
    """
    encoder = wire.interlingua.encoder
    assert isinstance(encoder, InterlinguaEncoder)
    wire.interlingua.eval()
    heads = heads_of(wire, moments.receivers)
    for rows in texts_of(table):
        tokens = encoder.tokens_of(rows["encoder_ids"])
        on_device = tokens.to(wire.interlingua.device)
        x_BTM = encoder.states(**on_device.tensors, length_B=on_device.length_B)
        keep_BT = torch.arange(x_BTM.shape[1]) < tokens.length_B[:, None]
        # The byte at which each of the sender's tokens ends.
        end_BT = tokens.bytes_BS.cumsum(1)
        targets = {}
        for name, chosen in heads.items():
            texts = rows[f"{name}_context_ids"]
            entries = own_entries(wire, name, texts, chosen)
            lm = wire.local_receiver(name)
            at_ruler = []
            for entry_TE, ids, end_T, count in zip(
                entries, texts, end_BT, tokens.length_B.tolist(), strict=True
            ):
                # U: the receiver's own tokens, of which place_T is one for each of the sender's.
                end_U = lm.token_bytes[torch.tensor(ids)].cumsum(0)
                place_T = reads_at(end_T[:count].to(end_U), end_U)
                at_ruler.append(entry_TE[place_T.to(entry_TE.device)])
            targets[name] = torch.cat(at_ruler)
        moments.add_tokens(x_BTM[keep_BT.to(x_BTM.device)], targets)


def add_gradients(moments: Moments, wire: LatentWire, table: pa.Table) -> None:
    """Add the gradients of the answers' loss by each receiver's own keys and values of the texts.

    Only the chosen heads see the text; the loss is the sum over all tokens of all answers to it.

    Args:
        moments: sums that are added to, of some receivers.
        wire: a wire in which they have chosen heads.
        table: training rows, as columns of a shard.
    """
    wire.interlingua.eval()
    heads = heads_of(wire, moments.receivers)
    for rows in texts_of(table, with_questions=True):
        for name, chosen in heads.items():
            lm, batch = wire.local_receiver(name), asked(wire, name, rows)
            entry_NE = torch.cat(own_entries(wire, name, rows["texts"][name], chosen))
            # A leaf of a new graph: its gradient is by the entries, whatever they were made from.
            leaf_NE = entry_NE.to(lm.device).requires_grad_()
            loss = answers_loss(wire, lm, batch, leaf_NE, chosen)
            (gradient_NE,) = torch.autograd.grad(loss, leaf_NE)
            moments.add_gradients(name, gradient_NE)


def answers_loss(
    wire: LatentWire, lm: LocalReceiver, batch: Batch, kv_NE: torch.Tensor, heads: Heads
) -> torch.Tensor:
    """Return the answers' summed loss where these entries stand for the texts."""
    # begun has a row for each message, in the order of the numbers that unique gives to rows.
    begun, numbers = batch.begun(), torch.unique(batch.message_R, return_inverse=True)[1]
    begun = begun.to(lm.device)
    if wire.reads_heads_alike:
        begun = lm.read_head(begun)
    # Without a message what is attached, and the soft vectors, are the prefix alone.
    with lm.heads_at_slots(kv_NE, heads), wire.reading(lm.name, begun, None) as soft_ND:
        past = lm.prefill(begun, soft_ND)
    rest = batch.going_on(numbers).to(lm.device)
    logits_NV = lm.supervised_logits(rest, None, past)
    return token_ce(logits_NV, rest.target_N).sum()


def asked(wire: LatentWire, name: str, rows: dict[str, Any]) -> Batch:
    """Return the questions to some texts, with a slot for each of the receiver's own tokens."""
    builder = wire.builders[name]
    columns = rows["text_R"], rows[f"{name}_question_ids"], rows[f"{name}_answer_ids"]
    prompts = []
    for text, question, answer in zip(*columns, strict=True):
        slots = len(rows["texts"][name][text])
        prompts.append(builder.latent(slots, question, answer))
    return collate(prompts, messages=rows["text_R"])


def texts_of(table: pa.Table, *, with_questions: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a few texts at a time, as columns.

    Without questions each text has one row. With them a text's rows follow each other wherever they
    stood; ``text_R`` is the text of each row, and ``texts`` each receiver's tokens of the texts.
    """
    columns = table.to_pydict()
    text_R, first_T = once([[text] for text in columns["context"]])
    # The rows of each text, T of them.
    of_text: list[list[int]] = [[] for _ in first_T]
    for row, text in enumerate(text_R):
        of_text[text].append(row)
    for start in range(0, len(first_T), TEXTS_AT_ONCE):
        some = of_text[start : start + TEXTS_AT_ONCE]
        chosen: list[int] = []
        text_of_row: list[int] = []
        for number, rows in enumerate(some):
            of_this = rows if with_questions else rows[:1]
            chosen += of_this
            text_of_row += [number] * len(of_this)
        part: dict[str, Any] = {}
        for name, values in columns.items():
            part[name] = [values[row] for row in chosen]
        if with_questions:
            part["text_R"], part["texts"] = text_of_row, {}
            for name, values in columns.items():
                if name.endswith("_context_ids"):
                    # All rows of a text hold the same tokens of it.
                    receiver = name.removesuffix("_context_ids")
                    part["texts"][receiver] = [values[rows[0]] for rows in some]
        yield part


def empty_moments(wire: LatentWire, receivers: Collection[str] | None = None) -> Moments:
    """Return sums of nothing, as wide as a wire's states and its adapters' entries.

    ``receivers``: those of the wire whose targets are summed; None: all.
    """
    names = wire.receivers if receivers is None else receivers
    encoder, adapters = wire.interlingua.encoder, wire.interlingua.adapters
    assert isinstance(encoder, InterlinguaEncoder)
    entries: dict[str, int] = {}
    for name, adapter in adapters.items():
        if isinstance(adapter, Unfolding) and name in names:
            entries[name] = adapter.linear.out_features
    return Moments.empty(encoder.states.width, entries)
