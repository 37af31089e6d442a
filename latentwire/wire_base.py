"""Encoder, adapters, features and frozen receivers together, and how a receiver reads a message."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch

from latentwire.config import RunConfig
from latentwire.data.documents import TrainedOn
from latentwire.features import registry
from latentwire.features.base import Reading
from latentwire.message import Message
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.models.interlingua import Interlingua, ReceiverShape
from latentwire.models.slots import put_in_slots
from latentwire.pretrained.weights import ReceiverError, fingerprint
from latentwire.prompts.batch import SHARED_BY, Batch
from latentwire.prompts.sequences import PromptBuilder
from latentwire.receivers.base import Receiver
from latentwire.receivers.local import LocalReceiver

LENGTHS_AND_PLACES = {
    "model",
    "senders",
    "tune",
    "latent_len",
    "tokens_per_latent",
    "latent_dropout",
}
"""Knobs of the encoder that do not change what a latent means: its weights are hashed, wherever
they come from."""


class WireBase:
    """The parts of a wire, and the soft vectors and attachments with which its receivers read."""

    def __init__(self, run: RunConfig, receivers: Mapping[str, Receiver] | None = None) -> None:
        """Load the receivers and draw fresh trainable weights from ``run.training.seed``.

        ``receivers``: those of the run, by name, where they are held elsewhere. Raises
        :class:`~latentwire.pretrained.weights.ReceiverError` or
        :class:`~latentwire.prompts.sequences.PromptError`.
        """
        self.run = run
        if receivers is None:
            receivers = {receiver.name: LocalReceiver(receiver) for receiver in run.receivers}
        self.receivers: dict[str, Receiver] = dict(receivers)
        prefix = 0 if run.prefix is None else run.prefix.tokens
        self.builders: dict[str, PromptBuilder] = {}
        for name, lm in self.receivers.items():
            self.builders[name] = PromptBuilder(
                lm.tokenizer, lm.config, run.prompt, run.data.send, prefix
            )
        # After the receivers are loaded: no number that they draw changes the weights below.
        torch.manual_seed(run.training.seed)
        shapes: dict[str, ReceiverShape] = {}
        for name, lm in self.receivers.items():
            shapes[name] = ReceiverShape(lm.width, lm.embed_rms, lm.skeleton)
        # The interlingua lies on the first receiver's device; senders there are not loaded twice.
        device = next(iter(self.receivers.values())).device
        loaded = {lm.name: lm.lm for lm in self.local_receivers() if lm.device == device}
        self.interlingua = Interlingua(run, shapes, registry.build, loaded=loaded).to(device)
        if run.prefix is not None:
            self._begin_prefixes(run.prefix.text)
        self.trained_on = TrainedOn()
        """The documents that its weights have trained on."""
        self._encoder_id: tuple[Any, str] = (None, "")

    def _begin_prefixes(self, text: str) -> None:
        prefix: Any
        for name, prefix in self.interlingua.prefixes.items():
            lm = self.receivers[name]
            ids = lm.tokenizer(text, add_special_tokens=False).input_ids
            prefix.begin_as(lm.token_embeddings(torch.tensor(ids)))

    @property
    def encoder_id(self) -> str:
        """Id of the encoder in every packet: 32 hex digits of a hash of its weights.

        Features that refine its messages are hashed too. Computed again only after the weights have
        changed.
        """
        if not isinstance(self.interlingua.encoder, InterlinguaEncoder):
            return ""  # a text reader sends nothing
        parts = torch.nn.ModuleList([self.interlingua.encoder])
        feature: Any
        for feature in self.interlingua.features.values():
            if feature.acts_on_message:
                parts.append(feature)
        frozen = {f"0.{name}" for name in self.interlingua.encoder.frozen_parameters()}
        tensors = dict((*parts.named_parameters(), *parts.named_buffers()))
        # torch counts a tensor's changes in place; weights that are replaced have another id, or
        # lie elsewhere. Changes through ``.data`` it does not count: sums show those, of all but a
        # frozen backbone, which is large and which nothing changes.
        held = [(id(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors.values()]
        sums = [
            tensor.detach().sum(dtype=torch.float64)
            for name, tensor in tensors.items()
            if name not in frozen
        ]
        state = (held, torch.stack(sums).tolist() if sums else [])
        if self._encoder_id[0] != state:
            # Without defaults: a knob that a later version adds leaves the ids of what was trained
            # before it.
            knobs = self.run.encoder.model_dump_json(
                exclude=LENGTHS_AND_PLACES, exclude_defaults=True
            )
            identity = f"{fingerprint(parts)} {knobs} {self.run.data.send}"
            self._encoder_id = state, hashlib.sha256(identity.encode()).hexdigest()[:32]
        return self._encoder_id[1]

    def local_receiver(self, receiver: str) -> LocalReceiver:
        """Return a receiver whose weights are in this process.

        Raises :class:`~latentwire.pretrained.weights.ReceiverError` for a shared one.
        """
        lm = self.receivers[receiver]
        if not isinstance(lm, LocalReceiver):
            raise ReceiverError(
                f"this needs the weights of receiver {receiver} in this process, they are shared; load it here"
            )
        return lm

    def local_receivers(self) -> list[LocalReceiver]:
        """Return the receivers whose weights are in this process."""
        return [lm for lm in self.receivers.values() if isinstance(lm, LocalReceiver)]

    def fingerprints(self) -> dict[str, str]:
        """Return receiver → hash of its weights, which never change."""
        return {name: receiver.fingerprint() for name, receiver in self.receivers.items()}

    @property
    def reads_heads_alike(self) -> bool:
        """True where no feature changes how a receiver reads the text before a message."""
        return not any(feature.acts_on_text for feature in self.interlingua.features.values())

    @contextmanager
    def reading(
        self, receiver: str, batch: Batch, message: Message | None
    ) -> Iterator[torch.Tensor | None]:
        """Yield the soft vectors ``[N, D]`` of a batch, with features attached to its receiver.

        Without a message the prompts are text. Nothing is attached to text without a prefix, as
        for teachers and baselines; nor are there vectors then.
        """
        if message is None and not batch.prefix:
            yield None
            return
        lm, prefixes = self.receivers[receiver], self.interlingua.prefixes
        features: Any = self.interlingua.features.values()
        # Hooks stay as long as the caller's block: the receiver reads within it.
        with ExitStack() as stack:
            prefix: Any = prefixes[receiver] if batch.prefix else None
            if prefix is not None:
                stack.enter_context(prefix.attached(lm, batch))
            if self.run.adapter.kind == "keys_values" and message is not None:
                kv_NE = self._slot_latents(receiver, batch, message)
                here = self.local_receiver(receiver).lm
                stack.enter_context(put_in_slots(here, kv_NE, batch.latents_BS))
            if self.run.adapter.kind == "heads" and message is not None:
                stack.enter_context(self._in_heads(receiver, batch, message))
            acting = [feature for feature in features if feature.acts_inside]
            if acting and message is not None:
                reading = self._reading(receiver, batch, message)
                for feature in acting:
                    stack.enter_context(feature.attached(receiver, lm, reading))
            yield self.interlingua.soft_rows(receiver, message, batch)

    def parted(
        self,
        receiver: str,
        batch: Batch,
        side: Literal["right", "left"] = "right",
        *,
        further: int = 0,
    ) -> tuple[Batch, Batch] | None:
        """Part a batch whose rows share messages, where its receiver can read them once for all.

        ``batch``: padded to the right. ``side``: where padding stands in what follows the messages.
        ``further``: tokens that are decoded after the batch.
        None where it cannot: the receiver's weights are elsewhere, a feature looks at the question,
        a layer sees too few positions, or too few rows share a message for two passes to pay.
        """
        lm = self.receivers[receiver]
        features: Any = self.interlingua.features.values()
        asks = any(feature.reads_question for feature in features) and bool(batch.latents_BS.any())
        if not isinstance(lm, LocalReceiver) or asks:
            return None
        parts = batch.parted(side)
        # R rows of M messages: two passes pay from R ≥ SHARED_BY · M on.
        if parts is None or len(batch.ids_BS) < SHARED_BY * len(parts[0].ids_BS):
            return None
        # Cached positions count padding too: the longest beginning, then the longest rest.
        fits = lm.may_part(further + sum(part.ids_BS.shape[1] for part in parts))
        return parts if fits else None

    @contextmanager
    def reading_on(
        self, receiver: str, batch: Batch, message: Message | None
    ) -> Iterator[torch.Tensor | None]:
        """Yield the soft vectors of rows that go on after their messages, as :meth:`reading` does.

        ``batch``: the second of :meth:`parted`. Features that act on all positions are attached.
        """
        if message is None:
            yield None
            return
        features: Any = self.interlingua.features.values()
        with ExitStack() as stack:
            acting = [feature for feature in features if feature.acts_on_text]
            if acting:
                reading = self._reading(receiver, batch, message)
                for feature in acting:
                    stack.enter_context(
                        feature.attached(receiver, self.receivers[receiver], reading)
                    )
            yield self.interlingua.control_rows(receiver, batch)

    def slots(self, message: Message, receiver: str) -> list[int]:
        """Count the positions that each message takes in one receiver's prompt."""
        return self.interlingua.slots(receiver, message)

    def _in_heads(
        self, receiver: str, batch: Batch, message: Message
    ) -> AbstractContextManager[None]:
        """Let a batch's messages stand in a receiver's chosen heads."""
        adapter: Any = self.interlingua.adapters[receiver]
        # unique(): sorted, as rows of ``Batch.begun`` are. Each message's entries are made once.
        entry_NE = self.interlingua.entries(receiver, message, batch.message_R.unique())
        return self.receivers[receiver].heads_at_slots(entry_NE, adapter.heads)

    def _slot_latents(self, receiver: str, batch: Batch, message: Message) -> torch.Tensor:
        """Return the latent of each slot of a batch, row by row, ``[N, Z]``."""
        z_BLZ, keep_BL = message.read_by(receiver)
        message_R = batch.message_R.to(z_BLZ.device)
        # [B, L, Z] → [R, L, Z] → [N, Z]: real latents alone, which are as many as a row has slots.
        return z_BLZ[message_R][keep_BL[message_R]]

    def _reading(self, receiver: str, batch: Batch, message: Message) -> Reading:
        z_BLZ, keep_BL = message.read_by(receiver)
        message_R = batch.message_R.to(z_BLZ.device)
        # Questions of all rows, side by side from their first token: [R, S] → [R, Q].
        count_R = batch.question_BS.sum(1)
        keep_RQ = torch.arange(max(1, int(count_R.max())), device=count_R.device) < count_R[:, None]
        ids_RQ = keep_RQ.long().masked_scatter(keep_RQ, batch.ids_BS[batch.question_BS])
        return Reading(
            z_RLZ=z_BLZ[message_R],
            keep_RL=keep_BL[message_R],
            latents_RS=batch.latents_BS,
            embed=self.receivers[receiver].token_embeddings,
            question_RQ=ids_RQ,
            question_keep_RQ=keep_RQ,
        )
