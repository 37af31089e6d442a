"""The one place where text becomes a token sequence.

Training, teacher, evaluation and decoding all read sequences from here. A prompt is a row of pieces, each tokenised on
its own (:mod:`latentwire.prompts.pieces`) and joined as ids::

    [BOS] head | prefix | context or soft slots | mid | question | tail | anchor | answer | stop

A text prompt puts the context's tokens where a latent prompt has its soft slots; every other position is equal token
by token, because it *is* the same piece. The prefix is soft too, and the same in every row: most prompts have none.
With ``send: prompt`` the message replaces ``context | mid | question``.
Nothing outside this package counts positions: the index maps of :class:`PromptSequence` and
:class:`~latentwire.prompts.batch.Batch` say where things are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from latentwire.config import PromptConfig, ReceiverConfig
from latentwire.prompts import templates
from latentwire.prompts.pieces import Pieces
from latentwire.prompts.templates import PromptError as PromptError

PROMPT_VERSION = 2
"""Raised whenever the same text would give other ids or positions; part of every shard's and evaluation's hash."""

ANSWER, RECONSTRUCT, CONTINUE = -1, 0, 1
"""A row's targets: the answer, or the text that a control embedding right after the message asks for, which is the message's own
or what follows it. The numbers of controls are their places among a receiver's control embeddings."""
CONTROLS = (RECONSTRUCT, CONTINUE)

SLOT_ID = 0
"""Stands at soft slots, whose embedding is replaced; any id inside the vocabulary will do."""

RECITE = "\n\nRepeat the previous context exactly."
RECITE_FROM = "\n\nRepeat the part of the previous context exactly, starting with"
RECITE_CUE = 8
"""How a text is asked for, or a later part of it, by as many tokens before that (KVzip, arXiv 2505.23416)."""

_PROBE_ANSWERS = ("Paris", "the red house", "1912", "$5", "(a)", '"so"', "Ärzte", "-3")


@dataclass(frozen=True)
class PromptSequence:
    """Token ids of one prompt and where its parts stand (half-open ranges of positions)."""

    ids: list[int]
    bos: int | None
    message: range
    """Positions of the sender's text or, in a latent prompt, of the soft slots."""
    question: range
    anchor: range
    answer: range
    stop: int | None
    """Position of the stop token; ``None`` where there is none."""
    supervised: range
    """Positions that are targets: answer and stop, or the reconstructed message; empty in a prompt to be answered."""
    soft: bool
    """True where ``message`` is to be filled with a soft prompt."""
    control: int = ANSWER
    """The one of :data:`CONTROLS` right after the message; :data:`ANSWER` where there is none."""
    prefix: range = range(0)
    """Positions of the constant vectors right before the message; empty where there are none."""

    @property
    def head(self) -> int:
        """Positions before everything that is soft or that changes from row to row."""
        return self.message.start - len(self.prefix)


def sender_text(send: Literal["context", "prompt"], context: str, question: str) -> str:
    """Return the text that the encoder compresses. It knows no receiver: one message serves all of them."""
    return context if send == "context" else f"{context}\nQuestion: {question}"


class PromptBuilder:
    """Builds sequences for one receiver under one prompt configuration."""

    def __init__(
        self,
        tokenizer: Any,
        receiver: ReceiverConfig,
        prompt: PromptConfig,
        send: Literal["context", "prompt"],
        prefix: int = 0,
    ) -> None:
        """Tokenise what all prompts share; ``prefix``: constant soft positions before every message."""
        self.tokenizer, self.receiver, self.send = tokenizer, receiver, send
        self.prefix = prefix
        self.anchor_text = prompt.anchor.rstrip()
        self.answer_lead = prompt.anchor[len(self.anchor_text) :]
        self.chat = templates.is_chat(tokenizer, receiver)
        """True where a prompt is a turn of a chat, whose answer ends with the turn. Else it is a list of
        lines, whose answer is one."""
        text = templates.around(tokenizer, receiver)
        self._mid_text, self._tail_text = text.mid.rstrip(" "), text.tail
        # A space before the question belongs to its first word, as in running text.
        self._question_lead = text.mid[len(self._mid_text) :]
        self._pieces = Pieces(tokenizer, receiver.name)
        bos_id = tokenizer.bos_token_id
        self.head_ids = self._pieces.first(text.head)
        self.bos: int | None = 0 if self._wants_bos(text.head) else None
        if self.bos == 0 and self.head_ids[:1] != [bos_id]:
            self.head_ids = [bos_id, *self.head_ids]
        if receiver.bos == "no" and bos_id is not None and self.head_ids[:1] == [bos_id]:
            self.head_ids = self.head_ids[1:]  # the template's own
        # A chat's own template says how often the token stands; a plain head has it once.
        if self.head_ids.count(bos_id) > 1 and self.bos == 0 and not self.chat:
            raise PromptError(
                f"BOS must stand once, at position 0, got {self.head_ids.count(bos_id)} in the head of {receiver.name}"
            )
        self.mid_ids = self._pieces.following(self._mid_text)
        self.tail_ids = self._pieces.following(self._tail_text)
        self.anchor_ids = self._pieces.after(self._tail_text, self.anchor_text)
        closing = self._tail_text + self.anchor_text
        self._answers_anew = self._pieces.begins_anew(closing, f"{self.answer_lead}a")
        self._before_answer = (
            closing if self._pieces.marks_beginnings else self.anchor_text or self._tail_text
        )
        self.newline_ids = self._pieces.following("\n")
        self.stop_id, self.stop_ids = self._stops()
        self._probe()

    # ------------------------------------------------------------------------------------------------- tokenising

    def tokenize(
        self, contexts: list[str], questions: list[str], answers: list[str]
    ) -> dict[str, list[list[int]]]:
        """Return the ids of the three pieces that change from row to row, for a column of rows."""
        return {
            "context_ids": self._pieces.of_user(contexts),
            "question_ids": self._pieces.of_user(
                [self._question_lead + question for question in questions]
            ),
            "answer_ids": self._pieces.of_user(
                [self.answer_lead + answer for answer in answers], anew=self._answers_anew
            ),
        }

    def check_boundaries(self, answers: list[str], answer_ids: list[list[int]]) -> list[bool]:
        """Return for each answer whether anchor and answer, tokenised as one text, give the same ids as joined."""
        before_ids = self._template_ids(self._before_answer)
        joint = self._pieces.all_following(
            [self._before_answer + self.answer_lead + answer for answer in answers]
        )
        return [whole == before_ids + ids for whole, ids in zip(joint, answer_ids, strict=True)]

    def answer_of(self, text: str) -> str:
        """Return the answer in decoded text: a chat's whole turn, a plain continuation's first line.

        Some tokenizers join a plain answer's newline with a punctuation mark, which is no stop token
        then.
        """
        return text.strip() if self.chat else text.strip().split("\n")[0].strip()

    # --------------------------------------------------------------------------------------------------- sequences

    def text(
        self,
        context_ids: list[int],
        question_ids: list[int],
        answer_ids: list[int] | None = None,
        prefix: int = 0,
    ) -> PromptSequence:
        """Return the full-text prompt; an empty context makes it the closed book. Answer and stop follow where given.

        ``prefix``: constant soft positions before the text, for a text reader; others read it as it is.
        """
        message = self.message_ids(context_ids, question_ids)
        # With send: prompt they are part of the message.
        mid, question = ([], []) if self.send == "prompt" else (self.mid_ids, question_ids)
        return self._join(message, mid, question, answer_ids, soft=False, prefix=prefix)

    def text_alone(self, message_ids: list[int], prefix: int = 0) -> PromptSequence:
        """Return a text prompt up to the text's end, with nothing to predict.

        Args:
            message_ids: the text, where a message would stand.
            prefix: constant soft positions before it.
        """
        return self._begun(message_ids, prefix, soft=False)

    def message_alone(self, slots: int) -> PromptSequence:
        """Return a latent prompt up to its last slot, with nothing to predict."""
        return self._begun([SLOT_ID] * slots, self.prefix, soft=True)

    def _begun(self, message_ids: list[int], prefix: int, soft: bool) -> PromptSequence:
        start = len(self.head_ids) + prefix
        end = start + len(message_ids)
        nowhere = range(end, end)
        return PromptSequence(
            ids=[*self.head_ids, *[SLOT_ID] * prefix, *message_ids],
            bos=self.bos,
            message=range(start, end),
            question=nowhere,
            anchor=nowhere,
            answer=nowhere,
            stop=None,
            supervised=nowhere,
            soft=soft,
            prefix=range(start - prefix, start),
        )

    def message_ids(self, context_ids: list[int], question_ids: list[int]) -> list[int]:
        """Return the tokens that a latent prompt's slots stand for."""
        if self.send == "prompt":
            return [*context_ids, *self.mid_ids, *question_ids]
        return context_ids

    def latent(
        self,
        slots: int,
        question_ids: list[int],
        answer_ids: list[int] | None = None,
        prefix: int | None = None,
    ) -> PromptSequence:
        """Return the same prompt with ``slots`` soft positions in place of the message.

        ``prefix``: constant soft positions before them; ``None``: as many as the wire has.
        """
        mid, question = ([], []) if self.send == "prompt" else (self.mid_ids, question_ids)
        prefix = self.prefix if prefix is None else prefix
        return self._join([SLOT_ID] * slots, mid, question, answer_ids, soft=True, prefix=prefix)

    def controlled(
        self, slots: int, control: int, text_ids: list[int], given: int = 0
    ) -> PromptSequence:
        """Return soft slots, a control embedding, and a text as targets.

        Args:
            slots: soft positions.
            control: :data:`RECONSTRUCT`, for the message's own text, or :data:`CONTINUE`, for what follows it.
            text_ids: that text.
            given: its first tokens that are read and not predicted.
        """
        begun = self.message_alone(slots)
        # The control takes the position after the slots, and the text those after it.
        text = len(begun.ids) + 1
        return replace(
            begun,
            ids=[*begun.ids, SLOT_ID, *text_ids],
            supervised=range(text + given, text + len(text_ids)),
            control=control,
        )

    def recital(self, message_ids: list[int], part: range, prefix: int = 0) -> PromptSequence:
        """Return a text, a request to repeat some of its tokens, and those tokens as targets.

        Args:
            message_ids: the text, where a message would stand.
            part: the tokens to be repeated.
            prefix: constant soft positions before the text.
        """
        begun = self.text_alone(message_ids, prefix)
        asked = self._template_ids(RECITE if part.start == 0 else RECITE_FROM)
        # Head, text, request, cue and tail are read; what is repeated is predicted.
        cue = message_ids[max(0, part.start - RECITE_CUE) : part.start]
        repeated = message_ids[part.start : part.stop]
        ids = [*begun.ids, *asked, *cue, *self.tail_ids, *repeated]
        return replace(begun, ids=ids, supervised=range(len(ids) - len(repeated), len(ids)))

    def _join(
        self,
        message: list[int],
        mid: list[int],
        question: list[int],
        answer: list[int] | None,
        *,
        soft: bool,
        prefix: int,
    ) -> PromptSequence:
        # Positions of the parts, counted in the order in which ids are joined below.
        start = len(self.head_ids) + prefix
        question_at = start + len(message) + len(mid)
        anchor_at = question_at + len(question) + len(self.tail_ids)
        answer_at = anchor_at + len(self.anchor_ids)
        before = [*self.head_ids, *[SLOT_ID] * prefix, *message, *mid, *question]
        ids = [*before, *self.tail_ids, *self.anchor_ids]
        stop: int | None = None
        supervised = range(0)
        if answer is not None:
            ids += [*answer, self.stop_id]
            # The stop token follows the answer, and both are targets.
            stop, supervised = answer_at + len(answer), range(answer_at, len(ids))
        return PromptSequence(
            ids=ids,
            bos=self.bos,
            message=range(start, start + len(message)),
            question=range(question_at, question_at + len(question)),
            anchor=range(anchor_at, answer_at),
            answer=range(answer_at, answer_at + len(answer or [])),
            stop=stop,
            supervised=supervised,
            soft=soft,
            prefix=range(start - prefix, start),
        )

    # ----------------------------------------------------------------------------------------------------- template

    def _wants_bos(self, head: str) -> bool:
        token = self.tokenizer.bos_token
        if self.receiver.bos == "yes" and token is None:
            raise PromptError(
                f"bos: yes needs a tokenizer with a BOS token, {self.receiver.model} has none"
            )
        if self.receiver.bos != "auto" or token is None:
            return self.receiver.bos == "yes"
        if self.chat:
            return head.startswith(token)
        return self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id]

    def _stops(self) -> tuple[int, tuple[int, ...]]:
        """Return the supervised stop token, and every token that ends decoding.

        A plain prompt is a list of lines, so its answer ends with the line; a chat turn ends with the special token that the
        template writes after it, which for some models is not EOS.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise PromptError(
                f"the tokenizer of {self.receiver.model} must have an EOS token, it has none"
            )
        if self.chat:
            end = self._turn_end()
            stop = eos if end is None else end
            # Each once, the supervised one first.
            return stop, tuple(dict.fromkeys((stop, eos)))
        if len(self.newline_ids) != 1:
            raise PromptError(
                f"template: plain needs a newline that is one token, {self.receiver.model} gives {self.newline_ids}"
            )
        return self.newline_ids[0], (self.newline_ids[0], eos)

    def _turn_end(self) -> int | None:
        """Return the special token right after an assistant's turn; None where the template writes none."""
        after = templates.after_answer(self.tokenizer, self.receiver)
        ids = self._template_ids(after)[:1]
        # A special token decodes to nothing where special ones are skipped.
        return ids[0] if ids and not self.tokenizer.decode(ids, skip_special_tokens=True) else None

    def _probe(self) -> None:
        """Raise :class:`PromptError` for an anchor that merges with answers, before any row is read: try one of every kind."""
        answers = list(_PROBE_ANSWERS)
        ids = self.tokenize([], [], answers)["answer_ids"]
        for answer, good in zip(answers, self.check_boundaries(answers, ids), strict=True):
            if not good:
                raise PromptError(
                    f"anchor and answer must tokenise alike alone and joined, {self.anchor_text + self.answer_lead!r} "
                    f"+ {answer!r} does not for {self.receiver.name}; end the anchor with a space or a newline"
                )

    def _template_ids(self, text: str) -> list[int]:
        """Return the ids of our own text behind other text."""
        return self._pieces.following(text)
