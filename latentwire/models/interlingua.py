"""The trained parts: one encoder, an adapter per receiver, a prefix, and the features that are on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from latentwire.config import RunConfig
from latentwire.message import Message
from latentwire.models.adapter import Adapter
from latentwire.models.encoders import (
    EncoderTokens,
    InterlinguaEncoder,
    MessageLengths,
    encoder_tokenizers,
)
from latentwire.models.key_heads import shape_of
from latentwire.models.prefix import Prefix
from latentwire.models.unfolding import Unfolding
from latentwire.prompts.batch import Batch
from latentwire.prompts.sequences import ANSWER
from latentwire.tokens import ByteTokenizer


@dataclass(frozen=True)
class ReceiverShape:
    """Properties of a receiver that adapters and features need."""

    width: int
    """D, of one soft-prompt vector."""
    embed_rms: float
    skeleton: Callable[[], nn.Module]
    """Returns the model, for the shapes of its layers; on the meta device where it is remote."""


def owner(module: nn.Module, name: str) -> str | None:
    """Return the receiver that a parameter of ``module`` is for; ``None``: all of them.

    ``name``: the parameter's name in the module. Parts for single receivers lie in a ``ModuleDict``
    or ``ParameterDict`` by their names, right in the module.
    """
    child, *rest = name.split(".")
    by_receiver = isinstance(getattr(module, child, None), nn.ModuleDict | nn.ParameterDict)
    return rest[0] if by_receiver else None


class Interlingua(nn.Module):
    """The trainable wire: text → message → soft prompt of each receiver.

    A text reader has a prefix alone: its ``encoder`` counts lengths, and there are no adapters.
    """

    def __init__(
        self,
        run: RunConfig,
        receivers: Mapping[str, ReceiverShape],
        features: Callable[[RunConfig, Mapping[str, ReceiverShape]], nn.ModuleDict],
        *,
        load_weights: bool = True,
        loaded: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Draw weights from torch's global generator; ``load_weights=False`` builds shapes alone.

        ``features``: :func:`latentwire.features.registry.build`. ``loaded``: receiver → its LM, where it is in this process on
        this module's device: senders may use its weights. Raises :class:`~latentwire.pretrained.weights.ReceiverError` for a
        backbone or a feature that does not fit.
        """
        super().__init__()
        self.autocast = run.training.autocast
        self.trained: frozenset[str] = frozenset()
        names = {receiver.name: receiver for receiver in run.receivers}
        self.receivers = tuple(names)
        self.encoder: InterlinguaEncoder | MessageLengths
        if run.is_reader:
            tokenizers = encoder_tokenizers(run.encoder, run.receivers) or (ByteTokenizer(),)
            self.encoder = MessageLengths(run.encoder, names, tokenizers)
        else:
            # As many heads give keys and values as a message stands in.
            self.encoder = InterlinguaEncoder(
                run.encoder,
                names,
                load_weights=load_weights,
                loaded=loaded,
                head_share=run.cache_share if run.encoder.sender_heads else None,
            )
        slots: int | None = run.encoder.latent_len + run.encoder.private_len
        if run.encoder.tokens_per_latent or run.encoder.split != "none":
            slots = None  # they vary from text to text
        # Encoder, adapters, features: a seed draws the weights in this order.
        self.adapters, self.prefixes = nn.ModuleDict(), nn.ModuleDict()
        if not run.is_reader:
            for name, shape in receivers.items():
                if run.adapter.kind == "heads":
                    self.adapters[name] = self._unfolding(run, shape)
                    continue
                self.adapters[name] = Adapter(
                    run.adapter,
                    d_z=run.encoder.d_z,
                    d_model=shape.width,
                    embed_rms=shape.embed_rms,
                    slots=slots,
                )
        self.features = features(run, receivers)
        if (config := run.prefix) is not None:
            for name, shape in receivers.items():
                skeleton = shape.skeleton() if config.layers else None
                self.prefixes[name] = Prefix(config, shape.width, shape.embed_rms, skeleton)

    @staticmethod
    def _unfolding(run: RunConfig, shape: ReceiverShape) -> Unfolding:
        return Unfolding(
            run.adapter,
            d_z=run.encoder.d_z,
            tokens=run.encoder.tokens_per_latent or 1,
            mixed=run.encoder.code_mixing,
            attention_heads=run.encoder.heads,
            shape=shape_of(shape.skeleton()),
            width=shape.width,
            embed_rms=shape.embed_rms,
        )

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def encode(self, texts: Sequence[str] | EncoderTokens) -> Message:
        """Encode sender texts (or their tokens) into one message each, for every receiver."""
        assert isinstance(self.encoder, InterlinguaEncoder), "a text reader sends no message"
        tokens = texts if isinstance(texts, EncoderTokens) else self.encoder.tokenize(texts)
        with self._precision():
            message = self.encoder(tokens.to(self.device))
            feature: Any
            for feature in self.features.values():
                message = feature.refine(message)
        return message.with_latents(message.z_BLZ.float())

    def train_only(self, names: Collection[str]) -> None:
        """Freeze all parts but those named; without names all are trained.

        A name is a receiver (its adapter and its parts of features), or ``encoder``: everything
        that is no single receiver's, which is the encoder and what refines its message.
        """
        self.trained = frozenset(names)
        if not names:
            return
        for name, parameter in self.named_parameters():
            kind, _, rest = name.partition(".")
            if kind == "features":
                # One level deeper: features.<feature>.<part>.<receiver>.<…>
                feature, _, inner = rest.partition(".")
                part = owner(self.features[feature], inner)
            else:
                part = owner(self, name)
            if (part or "encoder") not in names:
                parameter.requires_grad_(False)

    def training_receivers(self) -> list[str]:
        """Return receivers to train through: all where the encoder learns, else those trained."""
        learns = not self.trained or "encoder" in self.trained
        return [name for name in self.receivers if learns or name in self.trained]

    def train(self, mode: bool = True) -> Interlingua:
        """Switch modes; an encoder that is not trained stays in evaluation mode.

        Its messages are then those that a new receiver will get.
        """
        super().train(mode)
        if self.trained and "encoder" not in self.trained:
            assert isinstance(self.encoder, InterlinguaEncoder)
            self.encoder.eval()
        return self

    def prompt(self, receiver: str, message: Message) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one receiver's soft prompt ``[B, L, D]``, and its real positions ``[B, L]``."""
        z_BLZ, keep_BL = message.read_by(receiver)
        with self._precision():
            p_BLD = self.adapters[receiver](z_BLZ, keep_BL)
        return p_BLD.float(), keep_BL

    def entries(self, receiver: str, message: Message, message_M: torch.Tensor) -> torch.Tensor:
        """Return keys and values ``[N, E]`` of some messages in a receiver's heads, one by one."""
        z_BLZ, keep_BL = message.read_by(receiver)
        adapter: Any = self.adapters[receiver]
        with self._precision():
            entry_NE = adapter.rows(z_BLZ, keep_BL, message_M.to(z_BLZ.device))
        return entry_NE.float()

    def slots(self, receiver: str, message: Message) -> list[int]:
        """Count the positions that each message takes in one receiver's prompt."""
        adapter: Any = self.adapters[receiver]
        if isinstance(adapter, Unfolding):
            return adapter.tokens_of(*message.read_by(receiver)).sum(1).tolist()
        return message.slots(receiver)

    def budgets(self, receiver: str, slots: Sequence[int], *, of_text: bool = False) -> list[int]:
        """Return the positions that fill as much of a receiver's cache as messages of so many slots.

        ``of_text``: those that cut text gets, which are no fewer.
        """
        adapter: Any = dict(self.adapters.items()).get(receiver)  # a text reader has none
        if isinstance(adapter, Unfolding):
            budget = adapter.text_budget if of_text else adapter.budget
            return [budget(count) for count in slots]
        return list(slots)

    def soft_rows(self, receiver: str, message: Message | None, batch: Batch) -> torch.Tensor:
        """Return vectors ``[N, D]`` for all soft slots of a batch, row by row.

        A row's slots are the prefix where it has one, its message's latents, then its control
        embedding where it has one. A batch has a message or a prefix, or both.
        """
        vectors: list[torch.Tensor] = []  # each [R, slots, D], side by side in a row
        keeps: list[torch.Tensor] = []  # and [R, slots]: which of them stand in the row
        rows = len(batch.message_R)
        if batch.prefix:
            prefix_PD = self.prefixes[receiver]()
            vectors.append(prefix_PD.expand(rows, -1, -1))
            keeps.append(prefix_PD.new_ones(rows, len(prefix_PD), dtype=torch.bool))
        if message is not None:
            adapter: Any = self.adapters[receiver]
            if not isinstance(adapter, Unfolding):  # whose messages have no vectors
                p_BLD, keep_BL = self.prompt(receiver, message)
                message_R = batch.message_R.to(p_BLD.device)
                vectors.append(p_BLD[message_R])
                keeps.append(keep_BL[message_R])
            control_R = batch.control_R.to(adapter.control_CD.device)
            # The control is one more position; rows that answer questions do without. Theirs is −1,
            # for which any vector is looked up and then left out.
            vectors.append(adapter.control_CD[control_R.clamp(min=0)][:, None])
            keeps.append((control_R != ANSWER)[:, None])
        # [R, slots, D] → [N, D]: a mask picks row by row, as slots are filled.
        return torch.cat(vectors, 1)[torch.cat(keeps, 1)]

    def control_rows(self, receiver: str, batch: Batch) -> torch.Tensor | None:
        """Return vectors ``[N, D]`` for the controls of rows that go on after their messages."""
        asks_R = batch.control_R != ANSWER
        if not bool(asks_R.any()):
            return None
        adapter: Any = self.adapters[receiver]
        return adapter.control_CD[batch.control_R[asks_R].to(adapter.control_CD.device)]

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
