"""Everything that is trained: one encoder, an adapter per receiver, and the features that are switched on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentwire.config import RunConfig
from latentwire.message import Message
from latentwire.models.adapter import Adapter
from latentwire.models.encoders import EncoderTokens, InterlinguaEncoder
from latentwire.prompts.sequences import ANSWER, Batch


@dataclass(frozen=True)
class ReceiverShape:
    """What adapters and features need to know of a receiver."""

    width: int
    """D, of one soft-prompt vector."""
    embed_rms: float
    skeleton: Callable[[], nn.Module]
    """Gives the model itself, whose layers' shapes features read; on the meta device where its weights are elsewhere."""


def owner(module: nn.Module, name: str) -> str | None:
    """The receiver that a parameter is for, by the name it has in ``module``: a feature, say. ``None``: all of them.

    What is made for each receiver lies in a ``ModuleDict`` or ``ParameterDict`` by their names, right in the module.
    """
    child, *rest = name.split(".")
    return rest[0] if isinstance(getattr(module, child, None), nn.ModuleDict | nn.ParameterDict) else None


class Interlingua(nn.Module):
    """The trainable wire: text → message → soft prompt of each receiver."""

    def __init__(
        self,
        run: RunConfig,
        receivers: Mapping[str, ReceiverShape],
        features: Callable[[RunConfig, Mapping[str, ReceiverShape]], nn.ModuleDict],
        *,
        load_weights: bool = True,
    ) -> None:
        """Weights are drawn from torch's global generator; ``load_weights=False`` builds shapes alone.

        ``features``: :func:`latentwire.features.registry.build`. Raises
        :class:`~latentwire.models.weights.ReceiverError` for a backbone or a feature that does not fit.
        """
        super().__init__()
        self.autocast = run.training.autocast
        self.trained: frozenset[str] = frozenset()
        names = {receiver.name: receiver for receiver in run.receivers}
        self.encoder = InterlinguaEncoder(run.encoder, names, load_weights=load_weights)
        fixed = (
            None
            if run.encoder.tokens_per_latent or run.encoder.split != "none"
            else run.encoder.latent_len + run.encoder.private_len
        )
        self.adapters = nn.ModuleDict(
            {
                name: Adapter(
                    run.adapter, d_z=run.encoder.d_z, d_model=shape.width, embed_rms=shape.embed_rms, slots=fixed
                )
                for name, shape in receivers.items()
            }
        )
        self.features = features(run, receivers)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.encoder.project.weight.device

    def encode(self, texts: Sequence[str] | EncoderTokens) -> Message:
        """Sender texts (or their tokens) → one message each. One message serves every receiver."""
        tokens = texts if isinstance(texts, EncoderTokens) else self.encoder.tokenize(texts)
        with self._precision():
            message = self.encoder(tokens.to(self.device))
            feature: Any
            for feature in self.features.values():
                message = feature.refine(message)
        return message.with_latents(message.z_BLZ.float())

    def train_only(self, names: Collection[str]) -> None:
        """Leave all parts as they are but those named: receivers (their adapters and parts of features), or ``encoder``.
        None named: all are trained.

        ``encoder`` stands for everything that is no single receiver's, which is the encoder and what refines its message.
        """
        self.trained = frozenset(names)
        for name, parameter in self.named_parameters() if names else ():
            kind, _, rest = name.partition(".")
            feature, _, own = rest.partition(".")
            found = owner(self, name) if kind != "features" else owner(self.features[feature], own)
            if (found or "encoder") not in names:
                parameter.requires_grad_(False)

    def training_receivers(self) -> list[str]:
        """Receivers whose reading teaches something: all where the encoder learns, else those that are trained."""
        learns = not self.trained or "encoder" in self.trained
        return [name for name in self.adapters if learns or name in self.trained]

    def train(self, mode: bool = True) -> Interlingua:
        """An encoder that is not trained stays in evaluation mode: its messages are those that a new receiver will get."""
        super().train(mode)
        if self.trained and "encoder" not in self.trained:
            self.encoder.eval()
        return self

    def prompt(self, receiver: str, message: Message) -> tuple[torch.Tensor, torch.Tensor]:
        """Soft prompt ``[B, L, D]`` of one receiver, and which of its positions are real ``[B, L]``."""
        z_BLZ, keep_BL = message.read_by(receiver)
        with self._precision():
            p_BLD = self.adapters[receiver](z_BLZ, keep_BL)
        return p_BLD.float(), keep_BL

    def soft_rows(self, receiver: str, message: Message, batch: Batch) -> torch.Tensor:
        """Vectors ``[N, D]`` for all soft slots of a batch of sequences, row by row: latents, then a control."""
        p_BLD, keep_BL = self.prompt(receiver, message)
        message_R = batch.message_R.to(p_BLD.device)
        control_R = batch.control_R.to(p_BLD.device)
        p_RLD, keep_RL = p_BLD[message_R], keep_BL[message_R]
        adapter: Any = self.adapters[receiver]
        control_R1D = adapter.control_CD[control_R.clamp(min=0)][:, None]
        return torch.cat((p_RLD, control_R1D), 1)[torch.cat((keep_RL, (control_R != ANSWER)[:, None]), 1)]

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
