"""Checks of texts that a caller hands over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from latentwire.config.resolve import ConfigError


def texts_of(what: str, given: Any) -> list[str]:
    """Return texts as a list: a text alone is one of them.

    Raises :class:`~latentwire.config.resolve.ConfigError` for anything else than texts that hold
    something and can be written as UTF-8, and for none at all.
    """
    if isinstance(given, bytes | bytearray | Mapping) or not isinstance(given, str | Iterable):
        raise ConfigError(
            f"{what} must be a text or a list of texts, got {shown_value(given)}; give a str, or a list of them"
        )
    check_one_dimension(what, given)
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise ConfigError(
            f"{what} must hold at least one text, got none; give a str, or a list of them"
        )
    for place, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(
                f"{what} must be texts that hold something, got {shown_value(text)} at {place}; leave it out"
            )
        # A str may hold half of a surrogate pair, which UTF-8 cannot write.
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{what} must be texts that UTF-8 can write, got a lone surrogate at {place} "
                f"({error.reason}); decode it anew"
            ) from error
    return texts


def check_one_dimension(what: str, given: Any) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for a table, which is walked by its columns' names."""
    if not isinstance(given, str) and (count := getattr(given, "ndim", 1)) != 1:
        raise ConfigError(
            f"{what} must be a text or a list of texts, got a {type(given).__name__} of {count} dimensions; "
            f"name one column, or give .tolist()"
        )


def shown_value(value: Any) -> str:
    """Show a value that is no text, in a few words."""
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    return f"a {type(value).__name__}"
