"""The whole wire in one object: encoder, adapters, frozen receivers, and the layout of their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from latentwire.config import RunConfig
from latentwire.data.layout import Batch, SequenceBuilder, collate, sender_text
from latentwire.features import registry
from latentwire.features.base import Reading
from latentwire.models.interlingua import Interlingua, ReceiverShape
from latentwire.models.lm import LMWrapper
from latentwire.models.message import Message


class LatentWire:
    """Text → one message → answers from every receiver.

    ``interlingua`` (encoder and adapters) is trained; ``receivers`` are frozen. Build one from a configuration, or
    load an export with :func:`latentwire.training.checkpoints.load_wire`.
    """

    def __init__(self, run: RunConfig) -> None:
        """Loads the receivers and draws fresh trainable weights from ``run.training.seed``.

        Raises :class:`~latentwire.models.weights.ReceiverError` or :class:`~latentwire.data.layout.LayoutError`.
        """
        self.run = run
        self.receivers = {receiver.name: LMWrapper(receiver) for receiver in run.receivers}
        self.builders = {
            name: SequenceBuilder(lm.tokenizer, lm.config, run.prompt, run.data.send)
            for name, lm in self.receivers.items()
        }
        torch.manual_seed(run.training.seed)
        shapes = {name: ReceiverShape(lm.width, lm.embed_rms, lm.lm) for name, lm in self.receivers.items()}
        self.interlingua = Interlingua(run, shapes, registry.build).to(next(iter(self.receivers.values())).device)

    @torch.no_grad()
    def encode(self, contexts: Sequence[str], questions: Sequence[str] | None = None) -> Message:
        """One message a context; ``questions`` are part of it with ``send: prompt`` only."""
        self.interlingua.eval()
        questions = questions if questions is not None else [""] * len(contexts)
        return self.interlingua.encode(
            [sender_text(self.run.data.send, c, q) for c, q in zip(contexts, questions, strict=True)]
        )

    @torch.no_grad()
    def answer(self, message: Message, questions: Sequence[str], receiver: str) -> list[str]:
        """Greedy answers of one receiver to one question per message."""
        if receiver not in self.receivers:
            raise KeyError(f"receiver must be one of {', '.join(self.receivers)}, got {receiver}")
        builder = self.builders[receiver]
        question_ids = builder.tokenize([], list(questions), [])["question_ids"]
        slots = message.slots(receiver)
        prompts = [builder.latent(slots[row], ids) for row, ids in enumerate(question_ids)]
        return self.decode(receiver, prompts, message)

    @property
    def reads_heads_alike(self) -> bool:
        """Whether a receiver computes the text before a message as it would without one: no feature acts on it."""
        return not any(feature.acts_on_text for feature in self.interlingua.features.values())

    @contextmanager
    def reading(self, receiver: str, batch: Batch, message: Message | None) -> Iterator[torch.Tensor | None]:
        """The soft vectors ``[N, D]`` of a batch, with the features attached to the receiver that is about to read it.

        Without a message the prompts are text: nothing is attached, as for teachers and baselines.
        """
        if message is None:
            yield None
            return
        lm, interlingua = self.receivers[receiver].lm, self.interlingua
        with ExitStack() as stack:
            if len(interlingua.features):
                reading = self._reading(receiver, batch, message)
                feature: Any
                for feature in interlingua.features.values():
                    stack.enter_context(feature.attached(receiver, lm, reading))
            yield interlingua.soft_rows(receiver, message, batch)

    def _reading(self, receiver: str, batch: Batch, message: Message) -> Reading:
        lm = self.receivers[receiver]
        z_BLZ, keep_BL = message.read_by(receiver)
        message_R = batch.message_R.to(z_BLZ.device)
        count_R = batch.question_BS.sum(1)
        keep_RQ = torch.arange(max(1, int(count_R.max())), device=count_R.device) < count_R[:, None]
        ids_RQ = keep_RQ.long().masked_scatter(keep_RQ, batch.ids_BS[batch.question_BS])
        return Reading(
            z_RLZ=z_BLZ[message_R],
            keep_RL=keep_BL[message_R],
            latents_RS=batch.latents_BS,
            question_RQD=lm.embed_tokens(ids_RQ.to(lm.device)),
            question_keep_RQ=keep_RQ,
        )

    @torch.no_grad()
    def decode(
        self,
        receiver: str,
        prompts: list[Any],
        message: Message | None = None,
        own_ND: torch.Tensor | None = None,
    ) -> list[str]:
        """Free-running greedy text after each prompt; latent prompts need their message, or vectors of the caller's own."""
        lm, builder = self.receivers[receiver], self.builders[receiver]
        self.interlingua.eval()
        batch = collate(prompts, side="left").to(lm.device)
        with self.reading(receiver, batch, message) as soft_ND:
            soft_ND = soft_ND if own_ND is None else own_ND
            outputs = lm.generate(batch, builder.stop_ids, self.run.evaluation.max_answer_tokens, soft_ND)
        texts = lm.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        # A plain answer is one line; some tokenisers join its newline with a punctuation mark that is no stop token.
        return [text.strip().split("\n")[0].strip() for text in texts]
