"""``latentwire ask``: one question to an exported wire, from the text and from its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from latentwire.cli.flags import ReceiverAt, receiver_places
from latentwire.config.resolve import ConfigError
from latentwire.model import LatentWire
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts.sequences import PromptSequence


def ask(
    wire: str,
    *,
    question: str,
    context: str | None = None,
    context_file: Annotated[Path | None, Parameter(name="--context_file")] = None,
    receiver: str | None = None,
    receiver_at: ReceiverAt = [],  # noqa: B006  (never changed)
) -> int:
    """Ask one question of an exported wire; show what each receiver answers from the text and from the latents.

    Args:
        wire: Directory or Hub id of an export, or the name of a wire that is shipped: smollm2-qwen.
        question: The question.
        context: The text that is compressed.
        context_file: A UTF-8 file with the text.
        receiver: One receiver's name; all of them by default.
    """
    text = _context(context, context_file)
    # Of weights that take a moment to load.
    disable_progress_bar()
    places = receiver_places(receiver_at)
    loaded = LatentWire.from_pretrained(wire, receivers=receiver, receiver_at=places)
    # With data.send prompt the encoder reads the question too.
    message = loaded.encode([text], [question] if loaded.run.data.send == "prompt" else None)
    table = Table("receiver", "from", "positions", "answer")
    for name in loaded.receivers:
        (from_latents,) = loaded.answer(message, question, name)
        tokens = len(loaded.builders[name].tokenize([text], [], [])["context_ids"][0])
        for prefix, source in text_rows(loaded.builders[name].prefix).items():
            prompt = text_prompt(loaded, name, text, question, prefix)
            try:
                ((from_text,), _) = loaded.decode(name, [prompt])
            except ReceiverError as error:
                # A text may be too long for it where the message is not.
                from_text = f"none: {error}"
            # A model's own words may look like rich's markup: Text takes them as they are.
            table.add_row("" if prefix else name, source, f"{tokens} tokens", Text(from_text))
        table.add_row("", "latents", f"{message.slots(name)[0]} vectors", Text(from_latents))
    Console().print(table)
    print(
        f"message: {message.packed_size(16):,} bytes as fp16, {message.packed_size(8):,} as int8; text: {len(text.encode()):,}"
    )
    return 0


def text_rows(prefix: int) -> dict[int, str]:
    """Return vectors before the text → what the table calls that reading of it.

    Args:
        prefix: constant vectors that the wire has before its messages, with which the text can be read too.
    """
    readings = {0: "text"}
    if prefix:
        readings[prefix] = "text behind the wire's vectors"
    return readings


def text_prompt(
    wire: LatentWire, receiver: str, text: str, question: str, prefix: int
) -> PromptSequence:
    """Return the prompt by which a receiver reads the whole text, behind constant vectors or none."""
    ids = wire.builders[receiver].tokenize([text], [question], [])
    pieces = ids["context_ids"][0], ids["question_ids"][0]
    return wire.builders[receiver].text(*pieces, prefix=prefix)


def _context(context: str | None, file: Path | None) -> str:
    # Both, or neither.
    if (context is None) == (file is None):
        raise ConfigError(
            "a question needs --context TEXT or --context_file FILE, and not both; name one"
        )
    if file is None:
        return str(context)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--context_file must be a text in UTF-8, got {file} ({error}); name another one"
        ) from error
