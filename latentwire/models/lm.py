"""A frozen causal LM that reads soft prompts."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from latentwire.config import ReceiverConfig
from latentwire.models import head_slots
from latentwire.models.decoded import Decoded, Sampling, Watch
from latentwire.models.decoding import Stopwatch, decoding_settings, seeded
from latentwire.models.frozen_lm import FrozenLM
from latentwire.models.head_slots import HeadEntries, Heads
from latentwire.models.key_heads import check_rotary
from latentwire.models.past import Past
from latentwire.models.slots import added_to_slots
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts.batch import Batch

if TYPE_CHECKING:  # at run time where a model is loaded: see pretrained/weights.py
    from transformers import Cache
    from transformers.modeling_layers import GradientCheckpointingLayer


class LMWrapper(FrozenLM):
    """One receiver: logits at the supervised positions of a soft prompt, and generation.

    Differentiable in the soft prompt, never in its own weights.
    """

    def __init__(self, config: ReceiverConfig) -> None:
        """Load weights and tokenizer. Raises :class:`ReceiverError` with cause and next move."""
        super().__init__(config)
        self._head: tuple[list[int], Cache] | None = None
        self._at_slots: tuple[torch.Tensor, Heads] | None = None
        self._heads_checked = False
        self._recomputed: list[GradientCheckpointingLayer] = []

    # -------------------------------------------------------------- messages in keys and values

    def added_to_slots(
        self, added_NE: torch.Tensor, latents_RS: torch.Tensor
    ) -> AbstractContextManager[None]:
        """Add ``added_NE`` to keys and values at the latents, until this context ends.

        See :func:`latentwire.models.slots.added_to_slots`.
        """
        return added_to_slots(self.lm, added_NE, latents_RS)

    @contextmanager
    def heads_at_slots(self, kv_NE: torch.Tensor, heads: Heads) -> Iterator[None]:
        """Let messages stand in these heads alone, until this context ends.

        Sequences with latents are then read without their places, and ``soft_ND`` has no vectors
        for them.

        Args:
            kv_NE: keys before rotary positions and values, for each latent of each message; see
                :func:`latentwire.models.head_slots.entries_of`.
            heads: the heads.
        """
        self.check_heads()
        assert self._at_slots is None, "messages stand in the heads already"
        self._at_slots = kv_NE, heads
        try:
            yield
        finally:
            self._at_slots = None

    def check_heads(self) -> None:
        """Raise :class:`ReceiverError` where keys in some heads alone would be turned wrongly."""
        if not self._heads_checked:
            check_rotary(self.lm, self.name)
            self._heads_checked = True

    def _beside(self, batch: Batch) -> tuple[Batch, HeadEntries | None]:
        """Take latents that stand in some heads alone out of a batch."""
        if self._at_slots is None or not bool(batch.latents_BS.any()):
            return batch, None
        kv_NE, heads = self._at_slots
        longest = int(batch.attention_BS.sum(1).max())
        self.check_length(longest)
        self._check_sight(longest)
        entries = head_slots.entries_of(
            self.lm, heads, kv_NE.to(self.device), batch, self.embed_tokens.weight.dtype
        )
        return batch.without_latents(), entries

    # -------------------------------------------------------------------------------------- forward

    def supervised_logits(
        self, batch: Batch, soft_ND: torch.Tensor | None = None, past: Past | None = None
    ) -> torch.Tensor:
        """Return logits ``[N, V]`` for ``batch.target_N``; no other position meets the head."""
        return self.logits(self.supervised_states(batch, soft_ND, past=past)[0])

    def supervised_states(
        self,
        batch: Batch,
        soft_ND: torch.Tensor | None = None,
        depths: Sequence[float] = (),
        past: Past | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the states ``[N, D]`` that predict ``batch.target_N``.

        First those of the last layer, for :meth:`logits`; then those at each of ``depths``,
        fractions of all layers. A batch without its head (:meth:`read_head`) finds the head's keys
        and values ready, one that goes on from others (:meth:`Batch.parted`) those in ``past``.
        """
        batch, entries = self._beside(batch)
        cache, attention_BS = self._head_cache(batch), batch.attention_BS.to(self.device)
        position_BS = batch.position_BS  # None: counted from the beginning
        if position_BS is not None:
            position_BS = position_BS.to(self.device)
        if past is not None:
            cache, attention_BS = past.of_rows(batch)
            entries = past.entries_of(batch)
            assert batch.end_R is not None
            # Padding stands between what was read and this: positions go on as if it did not.
            width = batch.ids_BS.shape[1]
            position_BS = batch.end_R.to(self.device)[:, None] + torch.arange(
                width, device=self.device
            )
        for layer in self._recomputed:
            # The layer's own flag switches recomputing on; no dropout inside follows it.
            layer.training = torch.is_grad_enabled() and cache is None
        with head_slots.seen(self.lm, entries):
            output = self.lm.base_model(
                inputs_embeds=self.embed(batch, soft_ND),
                attention_mask=attention_BS,
                position_ids=position_BS,
                past_key_values=cache,
                use_cache=False,
                output_hidden_states=bool(depths),
            )

        def at_targets(state_BSD: torch.Tensor) -> torch.Tensor:
            predict_N = batch.predict_N.to(state_BSD.device)  # flat indices into B × S
            return state_BSD.flatten(0, 1).index_select(0, predict_N).to(self.device)

        layers = []
        for depth in depths:
            # hidden_states holds the embeddings, then each layer's output.
            number = round(depth * (len(output.hidden_states) - 1))
            layers.append(at_targets(output.hidden_states[number]))
        return at_targets(output.last_hidden_state), layers

    def prefill(self, batch: Batch, soft_ND: torch.Tensor | None = None) -> Past:
        """Read the beginnings of sequences, and keep their keys and values, with their gradient.

        ``batch``: the first of :meth:`Batch.parted`, with or without its head.
        """
        for layer in self._recomputed:
            layer.training = False  # what is computed again leaves no cache
        messages = len(batch.ids_BS)
        batch, entries = self._beside(batch)
        if entries is not None and messages > 1:  # what is left is the same before every message
            batch = batch.row(0)
            soft_ND = None if soft_ND is None else soft_ND[: len(soft_ND) // messages]
        cache, attention_MS = self._head_cache(batch), batch.attention_BS.to(self.device)
        if batch.ids_BS.shape[1]:  # else there is nothing after the head, as in a closed book
            output = self.lm.base_model(
                inputs_embeds=self.embed(batch, soft_ND),
                attention_mask=attention_MS,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
        assert cache is not None, "these sequences begin with nothing"
        if entries is not None and messages > 1:
            # One row was read for all of them; each message goes on from a copy.
            cache.batch_repeat_interleave(messages)
            attention_MS = attention_MS.expand(messages, -1)
        return Past(cache, attention_MS, entries)

    def _check_sight(self, positions: int) -> None:
        if not self.may_part(positions):
            raise ReceiverError(
                f"receiver {self.name} has layers that see {self.window} positions, a message in some heads alone needs all of "
                f"its prompt's {positions:,} to be seen; lower data.max_context_bytes, or choose adapter.kind mlp"
            )

    def may_part(self, positions: int) -> bool:
        """Return whether sequences of so many positions, padding included, may be read in two passes.

        A layer with a window counts padding between the passes as positions: it must see all of them.
        """
        return self.window is None or positions < self.window

    def recompute_activations(self) -> None:
        """Keep one state per layer for the backward pass and compute the others again.

        Features must stay attached until then (arXiv 1604.06174).
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.lm.activation_checkpointing_enable({"use_reentrant": False})
        self._recomputed = []
        for module in self.lm.modules():
            if isinstance(module, GradientCheckpointingLayer):
                self._recomputed.append(module)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile the receiver's layers by ``torch.compile``; the first steps take minutes."""
        self.lm.base_model.compile(dynamic=True, backend=backend)

    @torch.no_grad()
    def read_head(self, batch: Batch) -> Batch:
        """Return the batch without its head, after computing the head's keys and values.

        Call it where no feature is attached: the head is read as plain text, once for as long as it
        stays the same.
        """
        batch = batch.after_head()
        assert batch.head_H is not None
        ids = batch.head_H.tolist()
        if ids and (self._head is None or self._head[0] != ids):
            output = self.lm.base_model(input_ids=batch.head_H[None], use_cache=True)
            self._head = ids, output.past_key_values
        return batch

    def _head_cache(self, batch: Batch) -> Cache | None:
        """Return the keys and values that :meth:`read_head` left, repeated for every row."""
        if batch.head_H is None or not len(batch.head_H):
            return None
        if self._head is None or self._head[0] != batch.head_H.tolist():
            raise ValueError(
                f"receiver {self.name} has not read this batch's head; take it off with read_head"
            )
        cache = copy.deepcopy(self._head[1])  # a forward appends to the cache that it is given
        cache.batch_repeat_interleave(len(batch.ids_BS))
        return cache

    # ------------------------------------------------------------------------------------- decoding

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        stop_ids: tuple[int, ...],
        max_new_tokens: int,
        soft_ND: torch.Tensor | None = None,
        past: Past | None = None,
        sampling: Sampling | None = None,
        watch: Watch | None = None,
    ) -> Decoded:
        """Decode continuations of left-padded prompts, or of what follows ``past``.

        ``sampling``: how tokens are drawn; ``None``: the likeliest. ``watch``: is told each step's
        tokens.
        """
        batch, entries = self._beside(batch)
        e_BSD, attention_BS = self.embed(batch, soft_ND), batch.attention_BS.to(self.device)
        cache, position_BS = None, batch.position_BS
        if past is not None:
            cache, attention_BS = past.of_rows(batch)
            entries = past.entries_of(batch)
            missing = attention_BS.shape[1] - e_BSD.shape[1]
            # transformers wants embeddings of the whole, and cuts off what is in the cache.
            e_BSD = F.pad(e_BSD, (0, 0, missing, 0))
            if entries is not None:  # stand between the cache and these rows
                assert batch.end_R is not None
                end_R1 = batch.end_R.to(self.device)[:, None]
                position_BS = F.pad(end_R1 + batch.positions(), (missing, 0))
        positions: dict[str, Any] = {}  # None: counted from the beginning
        if position_BS is not None:
            positions["position_ids"] = position_BS.to(self.device)
        longest = attention_BS.shape[1] + max_new_tokens
        if entries is not None:
            # Their positions come before these rows', though they take no place among them.
            longest += entries.longest
            self._check_sight(longest)
        self.check_length(longest)
        for layer in self._recomputed:
            layer.training = False  # decoding needs its cache
        settings = decoding_settings(stop_ids, max_new_tokens, sampling)
        stopwatch = Stopwatch(watch)
        with seeded(self.device, sampling), head_slots.seen(self.lm, entries):
            output_BK = self.lm.generate(
                inputs_embeds=e_BSD,
                attention_mask=attention_BS,
                **positions,
                past_key_values=cache,
                generation_config=settings,
                streamer=stopwatch,
            )
        return stopwatch.decoded(output_BK, stop_ids)
