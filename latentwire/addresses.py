"""Addresses as people write them: variables are filled in, credentials are refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

SECRETS = re.compile(
    r"^\w+://[^/?]*@|[?&](access_key|secret_key|session_token|token|password|sig)=", re.IGNORECASE
)
"""Pattern of credentials in a URI: configurations are written into results, logs and reports."""


def refuse_secrets(uri: str) -> str:
    """Return the URI if it holds no credentials.

    Raises :class:`ValueError`, which does not quote them.
    """
    if SECRETS.search(uri):
        shown = re.sub(r"^(\w+://)[^/?]*@", r"\1…@", uri).partition("?")[0]
        raise ValueError(
            "a URI must not hold credentials, they would stand in every manifest and report, got "
            f"{shown}; give them by the node's role, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in its environment"
        )
    return uri


def expanded(address: str) -> str:
    """Return an address with ``~`` and ``$NAME`` replaced, as no shell does after ``=``.

    Raises :class:`ValueError` for a name that the environment does not have.
    """
    # expandvars leaves a name that is not set as it stands, so what is left is an error.
    address = os.path.expandvars(address)
    if unset := re.search(r"\$(\w+|\{\w+\})", address):
        raise ValueError(
            f"a path's variables must be set, {unset[0]} is not; set it, or write the path out"
        )
    return address if "://" in address else os.path.expanduser(address)


def cache_dir() -> Path:
    """Return the directory of what later runs use again (``$LATENTWIRE_CACHE``)."""
    return Path(expanded(os.environ.get("LATENTWIRE_CACHE", "~/.cache/latentwire")))
