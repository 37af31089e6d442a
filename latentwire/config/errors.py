"""The error of a configuration that breaks a rule, and the nearest name that is known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from latentwire.errors import UserError


class ConfigError(UserError):
    """A configuration that breaks a rule: the message quotes rule, value and place."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the known one that is nearest, else a list of them.

    Of a dotted path the last part counts too, so that ``latent_len`` finds ``encoder.latent_len``.
    """
    options = list(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if not close:
        # Where several paths end alike, the last of them is named.
        by_leaf = {option.split(".")[-1]: option for option in options}
        leaves = difflib.get_close_matches(name.split(".")[-1], by_leaf, n=1, cutoff=0.6)
        close = [by_leaf[leaf] for leaf in leaves]
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(sorted(options)[:16])}"
