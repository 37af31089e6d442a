"""Sending messages of a wire, and asking its receivers about them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from latentwire.config.resolve import ConfigError
from latentwire.message import Message, WireError, from_bytes
from latentwire.models.decoded import Decoded, Sampling, Watch
from latentwire.models.past import Past
from latentwire.prefilled import Prefilled, by_message, check_decoding
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts import sequences
from latentwire.prompts.batch import SHARED_BY, Batch, collate
from latentwire.prompts.sequences import sender_text
from latentwire.texts import shown_value, texts_of
from latentwire.wire_base import WireBase

_CALLER = 3  # frames from a warning to the caller: torch's own wrapper stands between


class Messaging(WireBase):
    """A wire that sends messages and answers; :class:`~latentwire.model.LatentWire` is one."""

    # -------------------------------------------------------------------------------------- sending

    @torch.no_grad()
    def encode(
        self, contexts: str | Iterable[str], questions: str | Iterable[str] | None = None
    ) -> Message:
        """Encode contexts into one message each, to be sent by its ``to_bytes``.

        ``questions`` are part of it with ``send: prompt`` only. A text alone is one context. Warns
        of contexts longer than the wire was trained for (``data.max_context_bytes``). Raises
        :class:`~latentwire.config.resolve.ConfigError` for what is no text or empty, for another
        number of questions, where that wire is given none, and for a text reader.
        """
        self._check_sends()
        self.interlingua.eval()
        contexts = texts_of("contexts", contexts)
        if questions is None and self.run.data.send == "prompt":
            raise ConfigError(
                "this wire's messages hold the questions (data.send prompt), got none; give encode one a context"
            )
        no_questions = [""] * len(contexts)
        questions = no_questions if questions is None else texts_of("questions", questions)
        if len(questions) != len(contexts):
            raise ConfigError(
                f"each context takes one question, got {len(contexts)} contexts and {len(questions)} questions"
            )
        pairs = zip(contexts, questions, strict=True)
        texts = [sender_text(self.run.data.send, *pair) for pair in pairs]
        sizes, limit = [len(text.encode()) for text in texts], self.run.data.max_context_bytes
        if longer := sum(size > limit for size in sizes):
            warnings.warn(
                f"contexts should have at most {limit:,} bytes, as this wire was trained for "
                f"(data.max_context_bytes), got {longer} longer, the longest of {max(sizes):,}: "
                f"its message is a guess; cut it, or train with a higher limit",
                stacklevel=_CALLER,
            )
        return replace(self.interlingua.encode(texts), encoder=self.encoder_id)

    def receive(self, packet: bytes) -> Message:
        """Read a packet of this wire's encoder. Raises :class:`~latentwire.message.WireError`."""
        self._check_sends()
        message = from_bytes(packet, expect=self.encoder_id)
        self._check_width(message)
        return message

    def _check_sends(self) -> None:
        if self.run.is_reader:
            raise ConfigError(
                f"a wire that sends messages is needed, got a text reader (prompt.reads {self.run.prompt.reads}); "
                f"score it by latentwire evaluate --checkpoint …"
            )

    def _check_width(self, message: Message) -> None:
        if (d_z := message.z_BLZ.shape[2]) != self.run.encoder.d_z:
            raise WireError(
                f"a message's latents must be {self.run.encoder.d_z} wide, got {d_z}; its sender must check them"
            )

    # --------------------------------------------------------------------------------------- asking

    @torch.no_grad()
    def answer(
        self,
        message: Message | bytes,
        questions: str | Iterable[str] | Iterable[Iterable[str]],
        receiver: str,
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        on_text: Callable[[str], object] | None = None,
    ) -> Any:
        """Answer questions to messages by one receiver, which reads each message once.

        A packet is received first. A text alone is one question.

        Args:
            message: what was sent.
            questions: a flat list with one question for each message, or any number of them to a
                single one; or a list of questions for each message.
            receiver: the one that answers.
            max_new_tokens: the longest answer. None: ``evaluation.max_answer_tokens``.
            sampling: how tokens are drawn. None: the likeliest one.
            on_text: gets the answer to a single question piece by piece, while it is decoded.

        Returns:
            Answers in the shape of the questions: a list, or a list of lists.

        Raises:
            ConfigError: an unknown receiver, questions that fit no messages, several of them with
                ``on_text``, a ``max_new_tokens`` below 1, or a text reader.
            WireError: a message of another encoder, or a packet that is none.
        """
        message = self._received(message, receiver)
        asked = by_message(questions, len(message))
        if on_text is not None and len(asked.questions) != 1:
            raise ConfigError(
                f"on_text follows the answer to one question, got {len(asked.questions)}; ask one at a time"
            )
        prompts = asked.prompts(self.builders[receiver], self.slots(message, receiver))
        teller = None if on_text is None else _Teller(self, receiver, on_text)
        watch = None if teller is None else teller.watch
        # None where too few questions share a message, or a feature reads it anew for each.
        begun = self.begin(receiver, prompts, asked.messages, message, max_new_tokens)
        if begun is not None:
            answers, _ = begun.decode(prompts, asked.messages, max_new_tokens, sampling, watch)
        else:
            answers, _ = self.decode(
                receiver,
                prompts,
                message,
                messages=asked.messages,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                watch=watch,
            )
        if teller is not None:
            teller.tell(answers[0])
        return asked.shaped(answers)

    @torch.no_grad()
    def prefill(self, message: Message | bytes, receiver: str) -> Prefilled:
        """Let one receiver read messages once, for any number of later questions.

        A packet is received first. Raises :class:`~latentwire.config.resolve.ConfigError` for an
        unknown receiver and where what it keeps would hang on the question, and
        :class:`~latentwire.pretrained.weights.ReceiverError` where its weights are elsewhere or a layer
        sees fewer positions than the message takes.
        """
        message = self._received(message, receiver)
        features: Any = self.interlingua.features.items()
        if asking := [name for name, feature in features if feature.reads_question]:
            raise ConfigError(
                f"a prefilled message serves every question, features.{asking[0]} makes it anew for each; use answer"
            )
        lm, builder = self.local_receiver(receiver), self.builders[receiver]
        batch = collate([builder.message_alone(slots) for slots in self.slots(message, receiver)])
        positions = batch.ids_BS.shape[1] + self.run.evaluation.max_answer_tokens
        if not lm.may_part(positions):
            raise ReceiverError(
                f"receiver {receiver} has layers that see {lm.window} positions, a prefilled message "
                f"needs {positions} and more; use answer"
            )
        assert batch.end_R is not None
        # end_R: positions of each message's prompt, all of it but padding.
        past = self._past(receiver, batch.begun(), message)
        return Prefilled(self, receiver, past, batch.end_R, message)

    def begin(
        self,
        receiver: str,
        prompts: Sequence[sequences.PromptSequence],
        messages: Sequence[int],
        message: Message | None,
        max_new_tokens: int | None = None,
    ) -> Prefilled | None:
        """Let a receiver read what prompts share once, where it can (:meth:`parted`); else None.

        Args:
            receiver: the one that reads.
            prompts: latent prompts, or texts.
            messages: the message, or the text, that each of them reads, counted from 0.
            message: None for texts.
            max_new_tokens: the longest answer. None: ``evaluation.max_answer_tokens``.
        """
        # The cheap half of what ``parted`` asks, before prompts are made tensors.
        if len(messages) < SHARED_BY * len(set(messages)):
            return None
        batch = collate(prompts, messages=list(messages))
        longest = self.run.evaluation.answer_limit(max_new_tokens)
        parts = self.parted(receiver, batch, further=longest)
        if parts is None:
            return None
        begun, _ = parts
        assert begun.end_R is not None
        return Prefilled(self, receiver, self._past(receiver, begun, message), begun.end_R, message)

    def _past(self, receiver: str, begun: Batch, message: Message | None) -> Past:
        lm = self.local_receiver(receiver)
        begun = begun.to(lm.device)
        # Where all prompts begin alike, the receiver has read that beginning before.
        if self.reads_heads_alike:
            begun = lm.read_head(begun)
        with self.reading(receiver, begun, message) as soft_ND:
            return lm.prefill(begun, soft_ND)

    @torch.no_grad()
    def prompt_embeds(
        self, message: Message | bytes, questions: str | Iterable[str], receiver: str
    ) -> list[torch.Tensor]:
        """Return one receiver's prompt to each question as input embeddings ``[positions, D]``.

        They hold the whole prompt, in the receiver's type, on the CPU. For engines that take
        embeddings in place of tokens: ``model.generate(inputs_embeds=…)``, vLLM's
        ``prompt_embeds``. ``builders[receiver].stop_ids`` end the answer. Raises
        :class:`~latentwire.config.resolve.ConfigError` as :meth:`answer` does, and where a feature
        acts inside the receiver, which no embedding can carry.
        """
        features: Any = self.interlingua.features.items()
        if (kind := self.run.adapter.kind) in ("keys_values", "heads"):
            raise ConfigError(
                f"prompt_embeds needs a wire whose latents become embeddings, got adapter.kind {kind}; use answer"
            )
        if acting := [name for name, feature in features if feature.acts_inside]:
            raise ConfigError(
                f"prompt_embeds needs a wire whose features end before the receiver, got "
                f"{', '.join(acting)}; use answer, or train one without features.{acting[0]}"
            )
        message, prompts = self._prompts(message, questions, receiver)
        lm, batch = self.local_receiver(receiver), collate(prompts, side="left")
        e_BSD = lm.embed(batch, self.interlingua.soft_rows(receiver, message, batch)).cpu()
        # Padded to the left: each prompt is the end of its row.
        return [e_SD[-len(prompt.ids) :] for e_SD, prompt in zip(e_BSD, prompts, strict=True)]

    def _prompts(
        self, message: Message | bytes, questions: str | Iterable[str], receiver: str
    ) -> tuple[Message, list[sequences.PromptSequence]]:
        """Return a message on this wire's device, and the prompt of each question to it."""
        message = self._received(message, receiver)
        questions = texts_of("questions", questions)
        builder, slots = self.builders[receiver], self.slots(message, receiver)
        if len(questions) != len(slots):
            raise ConfigError(
                f"each message takes one question, got {len(slots)} messages and {len(questions)} questions"
            )
        question_ids = builder.tokenize([], questions, [])["question_ids"]
        pairs = zip(slots, question_ids, strict=True)
        return message, [builder.latent(count, ids) for count, ids in pairs]

    def _received(self, message: Message | bytes, receiver: str) -> Message:
        """Return a message, or a packet's, on this wire's device, for one of its receivers."""
        self._check_sends()
        if not isinstance(receiver, str) or receiver not in self.receivers:
            raise ConfigError(
                f"receiver must be one of {', '.join(self.receivers)}, got {receiver}; name one of them"
            )
        if not isinstance(message, Message | bytes | bytearray | memoryview):
            raise ConfigError(
                f"a message must be what encode gives, or its packet as bytes, got "
                f"{shown_value(message)}; one for all questions"
            )
        if not isinstance(message, Message):
            message = self.receive(message)
        elif message.encoder not in ("", self.encoder_id):
            raise WireError(
                f"a message must come from encoder {self.encoder_id}, got one of encoder {message.encoder}; "
                f"load the wire that made it"
            )
        else:
            self._check_width(message)
        self.interlingua.eval()
        # A caller may have kept it in half precision; adapters take fp32.
        return message.with_latents(message.z_BLZ.float()).to(self.interlingua.device)

    @torch.no_grad()
    def decode(
        self,
        receiver: str,
        prompts: list[Any],
        message: Message | None = None,
        vectors_ND: torch.Tensor | None = None,
        *,
        messages: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        watch: Watch | None = None,
    ) -> tuple[list[str], Decoded]:
        """Decode the text after each prompt, which is read whole; see :meth:`begin` for what they share.

        ``prefill_ms`` counts from here: adapter and features run before the receiver does, and
        belong to a message's cost.

        Args:
            receiver: the one that answers.
            prompts: latent prompts, or texts.
            message: what latent prompts read.
            vectors_ND: the caller's own soft vectors, in its place.
            messages: the message that each prompt reads, counted from 0. None: each its own, in order.
            max_new_tokens: the longest answer. None: ``evaluation.max_answer_tokens``.
            sampling: how tokens are drawn. None: the likeliest one.
            watch: is told each step's tokens.
        """
        check_decoding(max_new_tokens, sampling)
        lm, builder = self.receivers[receiver], self.builders[receiver]
        self.interlingua.eval()
        if lm.device.type == "cuda":  # earlier work on the device is none of this prompt's cost
            torch.cuda.synchronize(lm.device)
        began = time.perf_counter()
        longest = self.run.evaluation.answer_limit(max_new_tokens)
        numbers = None if messages is None else list(messages)
        # To the left: every row's next token then has the same place.
        batch = collate(prompts, side="left", messages=numbers).to(lm.device)
        with self.reading(receiver, batch, message) as soft_ND:
            soft_ND = soft_ND if vectors_ND is None else vectors_ND
            prepared_ms = 1000 * (time.perf_counter() - began)
            # What shared weights elsewhere can do; sampling and watching need the weights here.
            if sampling is None and watch is None:
                decoded = lm.generate(batch, builder.stop_ids, longest, soft_ND)
            else:
                decoded = self.local_receiver(receiver).generate(
                    batch, builder.stop_ids, longest, soft_ND, None, sampling, watch
                )
        decoded = replace(decoded, prefill_ms=prepared_ms + decoded.prefill_ms)
        texts = lm.tokenizer.batch_decode(decoded.rows, skip_special_tokens=True)
        return [builder.answer_of(text) for text in texts], decoded


class _Teller:
    """Hands on what each step adds to the text of an answer."""

    def __init__(self, wire: WireBase, receiver: str, on_text: Callable[[str], object]) -> None:
        self.tokenizer = wire.receivers[receiver].tokenizer
        self.builder, self.on_text = wire.builders[receiver], on_text
        self.ids: list[int] = []
        self.told = ""

    def watch(self, tokens: list[int]) -> None:
        """Take a step's tokens."""
        # All ids anew: the text of one token may hang on those before it.
        self.ids.extend(tokens)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        # In the middle of a character the text ends in a mark that the next token takes away.
        if not text.endswith("\ufffd"):
            self.tell(self.builder.answer_of(text))

    def tell(self, answer: str) -> None:
        """Hand on what goes beyond what was told; the answer may have ended within a character."""
        # Space that may be the end is left out of an answer, which is then no longer.
        if len(answer) > len(self.told):
            self.on_text(answer[len(self.told) :])
            self.told = answer
