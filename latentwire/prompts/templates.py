"""The text around a message, as a receiver's chat template or a plain one writes it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from latentwire.config import ReceiverConfig
from latentwire.errors import UserError

CONTEXT, QUESTION, ANSWER = "⟦context⟧", "⟦question⟧", "⟦answer⟧"

TODAY = datetime.date(2024, 7, 26)
"""The date that every chat template is told: one that changes would change every prompt overnight. It
is the one that Llama 3.1's own template writes where nobody names another."""
DATE_CODES = "aAbBcdDeFgGhHIjmMnpSTuUVwWxXyYZ"


class PromptError(UserError):
    """Pieces that cannot be joined as token ids."""


@dataclass(frozen=True)
class Around:
    """The fixed text of a prompt: before the context, between it and the question, and after that."""

    head: str
    mid: str
    tail: str


def is_chat(tokenizer: Any, receiver: ReceiverConfig) -> bool:
    """Return whether prompts are turns of a chat.

    Raises :class:`PromptError` for knobs that need a chat template and have none.
    """
    by_itself = receiver.template == "auto" and bool(tokenizer.chat_template)
    chat = receiver.template == "chat" or by_itself
    if chat and not tokenizer.chat_template:
        raise PromptError(
            f"template: chat needs a tokenizer with a chat template, {receiver.model} has none; use plain"
        )
    if receiver.template_options and not chat:
        raise PromptError(
            f"template_options need a chat template, receiver {receiver.name} is read as plain and "
            f"has {', '.join(receiver.template_options)}; leave them out"
        )
    return chat


def around(tokenizer: Any, receiver: ReceiverConfig) -> Around:
    """Return the text around context and question.

    Raises :class:`PromptError` for a template that changes them.
    """
    lead = f"{receiver.instruction}\n" if receiver.instruction else ""
    content = f"{lead}Passage:\n{CONTEXT}\nQuestion: {QUESTION}"
    rendered = content + "\n"
    if is_chat(tokenizer, receiver):
        turns = [{"role": "user", "content": content}]
        rendered = _apply(tokenizer, receiver, turns, add_generation_prompt=True)
    if rendered.count(CONTEXT) != 1 or rendered.count(QUESTION) != 1:
        raise PromptError(
            f"the chat template of {receiver.model} must write the user's text once, unchanged; use template: plain"
        )
    # head ⟦context⟧ mid ⟦question⟧ tail
    head, rest = rendered.split(CONTEXT)
    mid, tail = rest.split(QUESTION)
    return Around(head, mid, tail)


def after_answer(tokenizer: Any, receiver: ReceiverConfig) -> str:
    """Return what the chat template writes after an assistant's turn, without white space before it."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    return _apply(tokenizer, receiver, turns).rpartition(ANSWER)[2].lstrip()


def rendered(tokenizer: Any, receiver: ReceiverConfig) -> list[str] | None:
    """Return all that a chat template writes around a prompt's parts; ``None`` for a plain prompt.

    For hashes: a template's variables and dates are in it, which the template's own text does not show.
    """
    if not is_chat(tokenizer, receiver):
        return None
    text = around(tokenizer, receiver)
    return [text.head, text.mid, text.tail, after_answer(tokenizer, receiver)]


def _apply(
    tokenizer: Any, receiver: ReceiverConfig, turns: list[dict[str, str]], **options: Any
) -> str:
    template = tokenizer.chat_template
    # Several by name, of which this one is for a chat without tools.
    if isinstance(template, dict):
        template = template.get("default", "")
    if "strftime_now" in template:
        options["chat_template"] = _fixed_clock() + template
    return tokenizer.apply_chat_template(
        turns, tokenize=False, **options, **receiver.template_options
    )


def _fixed_clock() -> str:
    """Return a macro of the name by which templates ask for the date, that answers :data:`TODAY`.

    transformers lets templates be given values but no functions; a macro goes before the function of
    its name.
    """
    noon = datetime.datetime.combine(TODAY, datetime.time(12), datetime.UTC)
    codes = [*(f"%-{code}" for code in "dmHIMSj"), *(f"%{code}" for code in DATE_CODES), "%%"]
    # Jinja: format | replace('%d', '26') | replace('%m', '07') | …
    replaced = "".join(f" | replace({code!r}, {noon.strftime(code)!r})" for code in codes)
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro -%}{{ '' }}"
