"""Start Ray, or join the one that is there; what stands against it is one line instead of Ray's
traceback."""

from __future__ import annotations

import errno
import importlib
import os
import re
import socket

import ray
from ray.exceptions import AuthenticationError

from latentwire.distributed.driver_log import LOG
from latentwire.errors import UserError

CONNECT_SECONDS = 10.0
"""How long the machine of ``RAY_ADDRESS`` may take to accept a connection; Ray itself tries for
minutes."""
ADDRESS = re.compile(r"^(?P<host>[^/\s:]+|\[[^\]]+\]):(?P<port>\d+)$")
"""A ``RAY_ADDRESS`` that names a machine; it may also be ``auto``, ``local`` or a URI."""
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Error numbers of writing into another user's directory."""


class ClusterError(UserError):
    """Ray that cannot be started or joined; the message names the reason and the next move."""


def start_ray(verbose: bool = False, training: bool = False) -> None:
    """Join the cluster of ``RAY_ADDRESS``, which a submitted job has, else start Ray here.

    What Ray, its libraries and the workers say goes into the log of this process
    (:data:`~latentwire.distributed.driver_log.LOG`), which waits for a file. The dashboard stays on:
    the search for placement groups that ended jobs have left asks its State API.

    Args:
        verbose: let the console show all of that too.
        training: let it show what a training's workers print.

    Raises:
        ClusterError: the temporary directory's path is too long for sockets, or another user's; the cluster does not
            answer, has another version, or other tokens; this machine is too busy.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address and not ray.is_initialized():
        check_reached(address)
    # As it is imported its logger is given the console, which divert takes away.
    importlib.import_module("ray.data")
    LOG.divert(verbose, training)
    try:
        ray.init(ignore_reinit_error=True)
    except Exception as error:  # some of Ray's own are plain exceptions
        reason = explain(error, address)
        if reason is None:
            raise
        ray.shutdown()  # of what has been started before it failed
        raise ClusterError(reason) from error


def check_reached(address: str) -> None:
    """Raise :class:`ClusterError` where an address names a machine that accepts no connection."""
    named = ADDRESS.match(address)
    if named is None:
        return
    machine = named["host"].strip("[]"), int(named["port"])  # brackets are around IPv6 alone
    try:
        with socket.create_connection(machine, CONNECT_SECONDS):
            pass
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS must be a running Ray's address, got {address}, which does not answer "
            f"({error}); start one there by `ray start --head`, or unset RAY_ADDRESS to start one here"
        ) from error


def explain(error: Exception, address: str | None) -> str | None:
    """Return what an error of ``ray.init`` means and what to do; ``None`` for one that is not the user's."""
    # Ray has few classes of errors, so most are known by their words, on one line.
    text = " ".join(str(error).split())
    there = address or "the Ray that runs on this machine"
    shorter_place = f"export RAY_TMPDIR=/tmp/ray-{os.getuid()} (short: sockets lie below it)"
    if "AF_UNIX path length" in text:
        limit = "".join(re.findall(r"cannot exceed (\d+) bytes", text))
        place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
        return (
            f"paths of Ray's sockets may have {limit} bytes, got a temporary directory {place} that "
            f"is too long for that; {shorter_place}"
        )
    if isinstance(error, OSError) and error.errno in NOT_OURS:
        return f"Ray's files must be this user's to write, got {text}: they are another user's, or read-only; {shorter_place}"
    if "Version mismatch" in text:
        # The message has the cluster's pair first, then this process's.
        versions = re.findall(r"Ray: (\S+) Python: (\S+)", text)
        theirs, ours = (f"Ray {version} on Python {python}" for version, python in versions)
        return (
            f"a driver must have its cluster's versions of Ray and Python, got {ours} here and "
            f"{theirs} at {there}; install those, or RAY_ADDRESS=local to start a Ray of its own"
        )
    if isinstance(error, AuthenticationError):
        return (
            f"a driver must have its cluster's token, got another or none at {there}: put its token "
            f"into RAY_AUTH_TOKEN, or RAY_ADDRESS=local to start a Ray of its own"
        )
    if "timed out during startup" in text:
        return (
            "Ray must start in time, and its processes did not: other work keeps this machine busy; "
            "end some of it, or give Ray longer by RAY_raylet_start_wait_time_s=180"
        )
    if isinstance(error, ConnectionError):
        return f"RAY_ADDRESS must be a running Ray's address, got {address} ({text}); start one, or unset RAY_ADDRESS"
    return None
