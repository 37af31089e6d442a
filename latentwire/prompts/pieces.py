"""The pieces of a prompt as token ids that can be joined."""

from __future__ import annotations

from typing import Any

from latentwire.prompts.templates import PromptError

LEADS = ("\n", ".")
"""Texts that a piece is tokenised behind: the second where the first would be one token with its
beginning."""


class Pieces:
    """Tokenises pieces so that their ids, joined, are those of the whole text.

    SentencePiece tokenizers such as Llama 2's write a ``▁`` before a text's first word, which is one too
    many before a piece from the middle of a prompt. Such a piece is tokenised behind a line's end, whose
    own ids are taken off.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Take a receiver's tokenizer; ``name`` is the receiver's, for messages."""
        self.tokenizer, self.name = tokenizer, name
        # "a" behind a line's end has a "▁" less than "a" at a beginning, where the mark is written.
        line, whole = self.first("\n"), self.first("\na")
        self.marks_beginnings = whole[: len(line)] == line and whole[len(line) :] != self.first("a")

    def first(self, text: str) -> list[int]:
        """Return the ids of our own text at a prompt's beginning.

        Special tokens are recognised, none is added.
        """
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def following(self, text: str) -> list[int]:
        """Return the ids of our own text behind other text."""
        return self._behind([text], add_special_tokens=False)[0] if text else []

    def all_following(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of several such texts."""
        return self._behind(texts, add_special_tokens=False) if texts else []

    def after(self, before: str, text: str) -> list[int]:
        """Return the ids of our own text behind ``before``, which may end with a special token.

        Raises :class:`PromptError` where the two share a token.
        """
        if not self.marks_beginnings:
            return self.following(text)
        start, whole = self.following(before), self.following(before + text)
        if whole[: len(start)] != start:
            raise PromptError(
                f"receiver {self.name}: {before!r} and {text!r} must not share a token, and do; "
                f"end the first without a space"
            )
        return whole[len(start) :]

    def begins_anew(self, before: str, text: str) -> bool:
        """Return whether text behind ``before`` is tokenised as at a beginning.

        Some tokenizers do so behind a special token.
        """
        return self.marks_beginnings and self.after(before, text) != self.following(text)

    def of_user(self, texts: list[str], *, anew: bool = False) -> list[list[int]]:
        """Return the ids of a user's texts: what looks like a special token stays plain text.

        ``anew``: they stand where the tokenizer begins anew, else behind other text. Equal texts are
        read once.
        """
        different = list(dict.fromkeys(texts))
        if not different:
            return []
        options = {
            "add_special_tokens": False,
            "split_special_tokens": True,
            "return_attention_mask": False,
        }
        ids = (
            self.tokenizer(different, **options).input_ids
            if anew
            else self._behind(different, **options)
        )
        known = dict(zip(different, ids, strict=True))
        return [known[text] for text in texts]

    def _behind(self, texts: list[str], **options: Any) -> list[list[int]]:
        if not self.marks_beginnings:
            return self.tokenizer(texts, **options).input_ids
        ids: list[list[int] | None] = [None] * len(texts)
        for lead in LEADS:
            # Those that no lead before this one stood apart from.
            left = [place for place, tokens in enumerate(ids) if tokens is None]
            if not left:
                break
            start = self.tokenizer(lead, **options).input_ids
            wholes = self.tokenizer([lead + texts[place] for place in left], **options).input_ids
            for place, whole in zip(left, wholes, strict=True):
                # The lead's own ids come off, unless its last one goes on into the text.
                if whole[: len(start)] == start:
                    ids[place] = whole[len(start) :]
        complete = [tokens for tokens in ids if tokens is not None]
        if len(complete) < len(ids):
            text = texts[ids.index(None)]
            raise PromptError(
                f"receiver {self.name}: the tokens of {text[:40]!r} must be its own, its first joins "
                f"what is before it; use another tokenizer, or leave such rows out"
            )
        return complete
