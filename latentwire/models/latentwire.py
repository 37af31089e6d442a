"""The whole wire in one object: encoder, adapters, frozen receivers, and the layout of their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from latentwire.config import RunConfig
from latentwire.data.layout import SequenceBuilder, collate, sender_text
from latentwire.models.interlingua import Interlingua
from latentwire.models.lm import LMWrapper


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
        widths = {name: (lm.width, lm.embed_rms) for name, lm in self.receivers.items()}
        self.interlingua = Interlingua(run, widths).to(next(iter(self.receivers.values())).device)

    @torch.no_grad()
    def encode(self, contexts: Sequence[str], questions: Sequence[str] | None = None) -> torch.Tensor:
        """Latents ``z_BLZ``; ``questions`` are part of the message with ``send: prompt`` only."""
        self.interlingua.eval()
        questions = questions if questions is not None else [""] * len(contexts)
        texts = [sender_text(self.run.data.send, c, q) for c, q in zip(contexts, questions, strict=True)]
        return self.interlingua.encode(texts)

    @torch.no_grad()
    def answer(self, z_BLZ: torch.Tensor, questions: Sequence[str], receiver: str) -> list[str]:
        """Greedy answers of one receiver to one question per message."""
        if receiver not in self.receivers:
            raise KeyError(f"receiver must be one of {', '.join(self.receivers)}, got {receiver}")
        builder = self.builders[receiver]
        question_ids = builder.tokenize([], list(questions), [])["question_ids"]
        prompts = [builder.latent(z_BLZ.shape[1], ids) for ids in question_ids]
        return self.decode(receiver, prompts, z_BLZ)

    @torch.no_grad()
    def decode(self, receiver: str, prompts: list[Any], z_BLZ: torch.Tensor | None = None) -> list[str]:
        """Free-running greedy text after each prompt; latent prompts need their ``z_BLZ``."""
        lm, builder = self.receivers[receiver], self.builders[receiver]
        self.interlingua.eval()
        p_BLD = None if z_BLZ is None else self.interlingua.prompt(receiver, z_BLZ.to(self.interlingua.device))
        batch = collate(prompts, side="left").to(lm.device)
        outputs = lm.generate(
            batch,
            builder.stop_ids,
            self.run.evaluation.max_answer_tokens,
            None if p_BLD is None else p_BLD.to(lm.device),
        )
        texts = lm.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        # A plain answer is one line; some tokenisers join its newline with a punctuation mark that is no stop token.
        return [text.strip().split("\n")[0].strip() for text in texts]
