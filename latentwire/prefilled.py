"""Messages that a receiver has read, kept for any number of later questions.

What is kept is the receiver's own cache: keys and values of the prompt's beginning, the prefix and
the message. It answers questions without reading the message anew, can be saved, and is an ordinary
``past_key_values`` for transformers' ``generate``.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from latentwire import exports
from latentwire.config.resolve import ConfigError
from latentwire.message import Message, WireError
from latentwire.models.decoded import Decoded, Sampling, Watch
from latentwire.models.head_slots import HeadEntries
from latentwire.models.interlingua import owner
from latentwire.models.past import Past
from latentwire.pretrained.weights import fingerprint_of
from latentwire.prompts.batch import Batch, collate
from latentwire.prompts.sequences import PromptBuilder, PromptSequence
from latentwire.receivers.base import AnswerScores
from latentwire.storage import Place, local, place, write
from latentwire.texts import check_one_dimension, shown_value, texts_of
from latentwire.wire_base import WireBase

if TYPE_CHECKING:
    from transformers import Cache

FORMAT = "latentwire-prefilled-1"
"""Marks a file of this kind."""


class Prefilled:
    """B messages as one receiver has read them.

    :meth:`latentwire.LatentWire.prefill` makes one.
    """

    def __init__(
        self,
        wire: WireBase,
        receiver: str,
        past: Past,
        end_B: torch.Tensor,
        message: Message | None,
    ) -> None:
        """Keep what was read.

        Args:
            wire: the one whose receiver it is.
            receiver: its name.
            past: keys and values.
            end_B: positions that each message's prompt takes up to the message's end.
            message: the messages, for features that go on looking at them. None: texts were read.
        """
        self.wire, self.receiver, self.past, self.message = wire, receiver, past, message
        self.end_B = end_B.cpu()

    def __len__(self) -> int:
        return len(self.end_B)

    # --------------------------------------------------------------------------------------- asking

    @torch.no_grad()
    def answer(
        self,
        questions: Iterable[str] | Iterable[Iterable[str]],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> Any:
        """Answer questions to the messages: a list for each message, or a flat list.

        A flat list has one question for each message, or, to a single message, any number of them.
        Answers come in the same shape.

        Args:
            questions: what is asked.
            max_new_tokens: the longest answer. None: ``evaluation.max_answer_tokens``.
            sampling: how tokens are drawn. None: the likeliest.

        Raises:
            ConfigError: questions that fit no messages, or a ``max_new_tokens`` below 1.
        """
        asked = by_message(questions, len(self))
        prompts = asked.prompts(self.wire.builders[self.receiver], self._slots())
        answers, _ = self.decode(prompts, asked.messages, max_new_tokens, sampling)
        return asked.shaped(answers)

    def _slots(self) -> list[int]:
        assert self.message is not None, "these are texts"
        return self.wire.slots(self.message, self.receiver)

    def decode(
        self,
        prompts: Sequence[PromptSequence],
        messages: Sequence[int],
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        watch: Watch | None = None,
    ) -> tuple[list[str], Decoded]:
        """Decode the text after each prompt, whose beginning has been read.

        Args:
            prompts: whole prompts.
            messages: the message that each one reads.
            max_new_tokens: the longest answer. None: ``evaluation.max_answer_tokens``.
            sampling: how tokens are drawn. None: the likeliest.
            watch: is told each step's tokens.
        """
        check_decoding(max_new_tokens, sampling)
        lm, builder = self.wire.local_receiver(self.receiver), self.wire.builders[self.receiver]
        rest = self._rest(prompts, messages, "left").to(lm.device)
        longest = self.wire.run.evaluation.answer_limit(max_new_tokens)
        with self.wire.reading_on(self.receiver, rest, self.message) as soft_ND:
            decoded = lm.generate(
                rest, builder.stop_ids, longest, soft_ND, self.past, sampling, watch
            )
        texts = lm.tokenizer.batch_decode(decoded.rows, skip_special_tokens=True)
        return [builder.answer_of(text) for text in texts], decoded

    def score(
        self, prompts: Sequence[PromptSequence], messages: Sequence[int]
    ) -> tuple[AnswerScores, Batch]:
        """Score the targets of whole prompts; return the batch that was read, too."""
        lm = self.wire.local_receiver(self.receiver)
        rest = self._rest(prompts, messages, "right").to(lm.device)
        with self.wire.reading_on(self.receiver, rest, self.message) as soft_ND:
            return lm.score_answers(rest, soft_ND, self.past), rest

    def _rest(self, prompts: Sequence[PromptSequence], messages: Sequence[int], side: Any) -> Batch:
        batch = collate(prompts, messages=list(messages))
        return batch.going_on(torch.tensor(messages, dtype=torch.long), side)

    # ------------------------------------------------------------------------- for other programs

    def cache(self, message: int = 0) -> Cache:
        """Return one message's keys and values as transformers' own cache, without padding.

        It is a copy: ``generate`` appends to what it is given. Raises
        :class:`~latentwire.config.resolve.ConfigError` for a message that is not there, and for
        messages that stand in some heads alone, which such a cache cannot say.
        """
        from transformers import DynamicCache

        self._check_number(message)
        if self.past.entries is not None:
            raise ConfigError(
                "a cache of transformers holds the same positions in every head, adapter.kind heads fills some heads "
                "alone; use answer"
            )
        # Rows are padded to the right: a message's own positions are the first ``end``.
        end = int(self.end_B[message])
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers()):
            one = slice(message, message + 1)
            # [B, heads, positions, width] → [1, heads, end, width].
            cache.update(keys[one, :, :end].clone(), values[one, :, :end].clone(), number)
        return cache

    def inputs(self, question: str, message: int = 0) -> dict[str, Any]:
        """Return what ``model.generate`` of transformers takes to answer a question.

        ``builders[receiver].stop_ids`` end the answer. Features that act on every position
        (``latent_adapters``, ``lora``) are not in it: use :meth:`answer`.
        """
        features: Any = self.wire.interlingua.features.items()
        if acting := [name for name, feature in features if feature.acts_on_text]:
            raise ConfigError(
                f"generate of transformers knows nothing of features.{acting[0]}, which acts on every position; use answer"
            )
        self._check_number(message)
        lm, builder = self.wire.local_receiver(self.receiver), self.wire.builders[self.receiver]
        (question_ids,) = builder.tokenize([], [question], [])["question_ids"]
        prompt = builder.latent(self._slots()[message], question_ids)
        end = int(self.end_B[message])
        # Ids of what was not read yet, and a mask over everything, as generate takes them.
        ids = torch.tensor([prompt.ids[end:]], device=lm.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones(1, len(prompt.ids), dtype=torch.long, device=lm.device),
            "past_key_values": self.cache(message),
        }

    def _check_number(self, message: int) -> None:
        # One below 0 would be an empty slice of rows: a cache that holds nothing.
        if not 0 <= message < len(self):
            raise ConfigError(
                f"message must be a number from 0 to {len(self) - 1}, got {message}; choose one"
            )

    def _layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        layers: Any = self.past.cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    # --------------------------------------------------------------------------------------- files

    def save(self, path: str | Place) -> None:
        """Write a safetensors file: keys and values, the latents, and what they belong to."""
        assert self.message is not None, "texts are not kept"
        tensors = {"attention": self.past.attention_MS, "end": self.end_B}
        tensors |= {"latents": self.message.z_BLZ, "length": self.message.length_B}
        for number, (keys, values) in enumerate(self._layers()):
            tensors |= {f"keys.{number}": keys, f"values.{number}": values}
        if self.past.entries is not None:
            tensors |= self.past.entries.tensors()
        private = {name: [part.start, part.stop] for name, part in self.message.private.items()}
        metadata = self._belongs_to(self.wire, self.receiver) | {"private": json.dumps(private)}
        # safetensors takes contiguous tensors alone.
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write(place(path), functools.partial(save_file, held, metadata=metadata))

    @classmethod
    def load(cls, wire: WireBase, path: str | Place) -> Prefilled:
        """Read a file of :meth:`save`.

        Raises:
            WireError: no such file, or one of another wire, or of other weights of the receiver.
        """
        from transformers import DynamicCache

        try:
            with local(place(path)) as file, safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise WireError(
                f"a prefilled message must be a file of Prefilled.save, got {path} ({error}); make it anew by wire.prefill"
            ) from error
        receiver = metadata.get("receiver", "")
        if metadata.get("format") != FORMAT or receiver not in wire.receivers:
            raise WireError(
                f"a prefilled message must be a {FORMAT} file for a receiver of this wire "
                f"({', '.join(wire.receivers)}), got {metadata.get('format')} for {receiver or 'none'} at {path}; "
                f"make it anew by wire.prefill"
            )
        for name, expected in cls._belongs_to(wire, receiver).items():
            if metadata[name] != expected:
                raise WireError(
                    f"{path} must be of this {name.replace('_', ' ')} ({expected[:12]}…), got {metadata[name][:12]}…; "
                    f"make it anew by wire.prefill"
                )
        lm = wire.local_receiver(receiver)
        private = {name: range(*part) for name, part in json.loads(metadata["private"]).items()}
        message = Message(tensors["latents"], tensors["length"], private, wire.encoder_id)
        cache = DynamicCache()
        for number in range(sum(name.startswith("keys.") for name in tensors)):
            pair = (tensors[f"{kind}.{number}"].to(lm.device) for kind in ("keys", "values"))
            cache.update(*pair, number)
        entries = HeadEntries.of_tensors(tensors)
        if entries is not None:
            entries = entries.to(lm.device)
        past = Past(cache, tensors["attention"].to(lm.device), entries)
        return cls(wire, receiver, past, tensors["end"], message.to(wire.interlingua.device))

    @staticmethod
    def _belongs_to(wire: WireBase, receiver: str) -> dict[str, str]:
        # Keys and values hang on the receiver, on what was trained, and on the prompt's beginning.
        head = json.dumps(wire.builders[receiver].head_ids).encode()
        return {
            "format": FORMAT,
            "receiver": receiver,
            "receiver_weights": wire.receivers[receiver].fingerprint(),
            "wire_weights": fingerprint_of(_weights_read(wire, receiver)),
            "prompt_head": hashlib.sha256(head).hexdigest(),
        }


def _weights_read(wire: WireBase, receiver: str) -> dict[str, torch.Tensor]:
    """Return the trained weights that one receiver reads by: all but those of others, which need not be loaded."""
    tensors = {}
    for file, module in exports.parts(wire).items():
        folder, _, name = file.removesuffix(".safetensors").rpartition("/")
        if folder in ("adapters", "prefixes") and name != receiver:
            continue
        for parameter, tensor in module.state_dict().items():
            # None: receivers share it.
            if owner(module, parameter) in (None, receiver):
                tensors[f"{file} {parameter}"] = tensor
    return tensors


@dataclass(frozen=True)
class Asked:
    """Questions to messages."""

    questions: list[str]
    messages: list[int]
    """The message that each of them is asked of."""
    nested: bool
    """True where they came as a list for each message."""

    def prompts(self, builder: PromptBuilder, slots: Sequence[int]) -> list[PromptSequence]:
        """Return the latent prompt of each question. ``slots``: soft positions of each message."""
        question_ids = builder.tokenize([], self.questions, [])["question_ids"]
        pairs = zip(self.messages, question_ids, strict=True)
        return [builder.latent(slots[number], ids) for number, ids in pairs]

    def shaped(self, answers: list[str]) -> list[Any]:
        """Return the answers in the shape of the questions."""
        if not self.nested:
            return answers
        # ``messages`` rises, and every message was asked something: groups are messages, in order.
        pairs = zip(self.messages, answers, strict=True)
        shaped: list[list[str]] = []
        for _, of_one in groupby(pairs, key=itemgetter(0)):
            shaped.append([text for _, text in of_one])
        return shaped


def check_decoding(max_new_tokens: Any, sampling: Any) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for what is no length of an answer, or no way to draw it."""
    if max_new_tokens is not None and (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise ConfigError(
            f"max_new_tokens must be a whole number of at least 1, got {shown_value(max_new_tokens)}; "
            f"leave it out for evaluation.max_answer_tokens"
        )
    if not isinstance(sampling, Sampling | None):
        raise ConfigError(
            f"sampling must be a Sampling, got {shown_value(sampling)}; give Sampling(temperature=…), "
            f"or leave it out for the likeliest tokens"
        )


def by_message(questions: Any, messages: int) -> Asked:
    """Say which message each question is asked of.

    Raises :class:`~latentwire.config.resolve.ConfigError` for questions that fit no messages.
    """
    given = questions
    check_one_dimension("questions", given)
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | bytearray | Mapping):
        given = list(given)
        if given and all(isinstance(one, list | tuple) for one in given):
            if len(given) != messages:
                raise ConfigError(
                    f"each message takes a list of questions, got {messages} messages and {len(given)} lists"
                )
            nested: list[str] = []
            numbers: list[int] = []
            for number, of_one in enumerate(given):
                texts = texts_of("questions", of_one)
                nested += texts
                numbers += [number] * len(texts)
            return Asked(nested, numbers, True)
    flat = texts_of("questions", given)
    if messages == 1:
        return Asked(flat, [0] * len(flat), False)
    if len(flat) != messages:
        raise ConfigError(
            f"each message takes one question, got {messages} messages and {len(flat)} questions"
        )
    return Asked(flat, list(range(messages)), False)
