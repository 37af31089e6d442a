"""Watch for the notice that a cloud will take this spot node away, and drain the node.

    python -m latentwire.distributed.spot            # runs beside Ray until a notice comes
    python -m latentwire.distributed.spot --now 60   # drains now: the node goes in 60 seconds

On a draining node Ray starts nothing new. A trial that runs there writes a checkpoint at once and
goes on elsewhere. EC2 gives notice two minutes ahead, Compute Engine half a minute.

The cluster files send this one file to nodes that do not have the package, so it needs Python and the
``ray`` command, and nothing else. It imports no Ray, which would hold some 100 MB on every node.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

METADATA = "http://169.254.169.254"
"""Address of the metadata service in both clouds; only the machine itself reaches it."""
FIND_SECONDS = 120.0
"""How long a service may take to answer for the first time: the network of a new node comes late."""
POLL_SECONDS = 2.0
"""Seconds between two looks for a notice, and between two attempts to drain."""
REQUEST_SECONDS = 2.0
"""How long one answer of the service may take."""
TOKEN_SECONDS = 21_600
"""How long a token of EC2's service is good for; six hours is the longest that it gives."""
GOOGLE_SECONDS = 30.0
"""Seconds from Compute Engine's notice to the end of the machine."""
LEAD_SECONDS = 5.0
"""Ray is told an end that is so much earlier: ``ray drain-node`` counts from when it has started, seconds later."""
LEAST_ATTEMPT_SECONDS = 15.0
"""How long an attempt to drain may take when the deadline is near or past: Ray's import alone takes seconds."""

log = logging.getLogger("latentwire.spot")


class MetadataError(Exception):
    """The metadata service answered with something that is no answer."""


@dataclass(frozen=True)
class Notice:
    """The word that the node goes."""

    text: str
    deadline: float
    """When it goes, in seconds since the epoch."""


class Cloud(Protocol):
    """A metadata service that tells of interruptions."""

    name: str

    def answers(self) -> bool:
        """Return whether the service at the address is this cloud's. Raises :class:`OSError` without an answer."""

    def notice(self) -> Notice | None:
        """Return the notice, if there is one. Raises :class:`OSError` or :class:`MetadataError`."""


class EC2:
    """EC2's service, version 2: a token first, then questions that carry it."""

    name = "EC2"

    def __init__(self, address: str) -> None:
        self._address = address
        self._token = ""

    def answers(self) -> bool:
        status, token = ask(
            f"{self._address}/latest/api/token",
            {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)},
            method="PUT",
        )
        self._token = token if status == 200 else ""
        return status == 200

    def notice(self) -> Notice | None:
        status, body = self._action()
        if status == 401 and self.answers():  # the token is too old
            status, body = self._action()
        if status == 404:  # there is no such document before EC2 takes the node
            return None
        if status != 200:
            raise MetadataError(f"status {status} for spot/instance-action")
        try:
            action = json.loads(body)
            deadline = datetime.fromisoformat(action["time"]).timestamp()
            return Notice(f"EC2 will {action['action']} the node at {action['time']}", deadline)
        except (ValueError, KeyError, TypeError) as error:
            raise MetadataError(f"spot/instance-action has no action and time: {body!r}") from error

    def _action(self) -> tuple[int, str]:
        return ask(
            f"{self._address}/latest/meta-data/spot/instance-action",
            {"X-aws-ec2-metadata-token": self._token},
        )


class ComputeEngine:
    """Compute Engine's service: one word, FALSE until the machine is preempted."""

    name = "Compute Engine"

    def __init__(self, address: str) -> None:
        self._address = address

    def answers(self) -> bool:
        return self._preempted()[0] == 200

    def notice(self) -> Notice | None:
        status, body = self._preempted()
        if status != 200 or body not in ("TRUE", "FALSE"):
            raise MetadataError(f"status {status} for instance/preempted, and the word {body!r}")
        if body == "FALSE":
            return None
        return Notice("Compute Engine preempts the node", time.time() + GOOGLE_SECONDS)

    def _preempted(self) -> tuple[int, str]:
        url = f"{self._address}/computeMetadata/v1/instance/preempted"
        return ask(url, {"Metadata-Flavor": "Google"})


def ask(url: str, headers: Mapping[str, str], method: str = "GET") -> tuple[int, str]:
    """Return the status and the stripped text of an answer.

    Raises:
        OSError: there is no answer in time.
    """
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    # No proxy, whatever http_proxy says: only the machine itself reaches the service.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=REQUEST_SECONDS) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except http.client.HTTPException as error:  # an answer that is no HTTP, which is no OSError
        raise OSError(f"{url}: {error!r}") from error


def find_cloud(address: str, seconds: float = FIND_SECONDS) -> Cloud | None:
    """Return the cloud whose metadata service is at the address; None where none answers in time."""
    end = time.monotonic() + seconds
    while True:
        clouds: tuple[Cloud, ...] = (EC2(address), ComputeEngine(address))
        for cloud in clouds:
            try:
                if cloud.answers():
                    return cloud
            except OSError:  # not there yet, or never
                continue
        if time.monotonic() >= end:
            return None
        time.sleep(POLL_SECONDS)


def wait_for_notice(cloud: Cloud) -> Notice:
    """Return the notice as soon as there is one. A service that fails for a while is asked again."""
    failing = False
    while True:
        try:
            notice = cloud.notice()
        except (OSError, MetadataError) as error:
            if not failing:
                log.warning("%s gives no answer, and is asked again: %s", cloud.name, error)
            failing = True
        else:
            if failing:
                log.info("%s answers again", cloud.name)
            failing = False
            if notice is not None:
                return notice
        time.sleep(POLL_SECONDS)


def drain(notice: Notice, address: str | None = None, node_id: str | None = None) -> bool:
    """Have Ray drain a node; try again until it has or the deadline is past.

    Args:
        notice: why, and by when.
        address: of the cluster; None: that of the Ray that runs on this machine.
        node_id: None: the node that this machine is.

    Returns:
        Whether Ray has taken the order.
    """
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", notice.text]
    command += ["--address", address] if address else []
    command += ["--node-id", node_id] if node_id else []
    # Without a node's id the command connects to ask for it, and looks for the cluster in RAY_ADDRESS alone. Where that is
    # unset or "local" it may start a Ray of its own and drain that node: the cluster accepts ids that it does not know.
    set_address = os.environ.get("RAY_ADDRESS", "local")
    cluster = address or ("auto" if set_address == "local" else set_address)
    while True:
        # The end of the node stays where it is: each attempt tells Ray the seconds that are left.
        left = notice.deadline - time.time()
        remaining = max(1, int(left - LEAD_SECONDS))
        try:
            done = subprocess.run(
                [*command, "--deadline-remaining-seconds", str(remaining)],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"RAY_ADDRESS": cluster},
                capture_output=True,
                text=True,
                timeout=max(LEAST_ATTEMPT_SECONDS, left),
            )
            if done.returncode == 0:
                log.info("the node drains: its trials save a checkpoint and go on elsewhere")
                return True
            reason = " ".join((done.stdout + done.stderr).split())[-300:]
        except subprocess.TimeoutExpired:
            reason = "`ray drain-node` did not end in time"
        if notice.deadline - time.time() <= POLL_SECONDS:
            log.error("the node was not drained in time: %s", reason)
            return False
        log.warning("the node is not drained yet, and Ray is asked again: %s", reason)
        time.sleep(POLL_SECONDS)


def main(words: Sequence[str] | None = None) -> int:
    """Watch and drain; return 0 once the node drains, 1 where nothing will drain it, 2 for a wrong call."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--now", type=float, metavar="SECONDS", help="drain now: the node goes then"
    )
    parser.add_argument("--address", help="of the cluster; default: the Ray on this machine")
    parser.add_argument("--node_id", help="default: the node that this machine is")
    parser.add_argument("--metadata", default=METADATA, help="the metadata service (%(default)s)")
    flags = parser.parse_args(words)
    if flags.now is not None and flags.now <= 0:
        parser.error(f"--now must be the seconds until the node goes, got {flags.now:g}")
    if shutil.which("ray") is None:
        parser.error("`ray` must be on the PATH, which drains the node; activate its environment")
    logging.basicConfig(format="%(asctime)s spot: %(message)s", level=logging.INFO)
    if flags.now is not None:
        notice = Notice("the node is told to stop", time.time() + flags.now)
    else:
        cloud = find_cloud(flags.metadata)
        if cloud is None:
            log.error(
                "neither EC2 nor Compute Engine answers at %s: no notice can come, watching ends",
                flags.metadata,
            )
            return 1
        log.info("watching for %s's notice at %s", cloud.name, flags.metadata)
        notice = wait_for_notice(cloud)
    log.warning("notice: %s, in %.0f s; draining it", notice.text, notice.deadline - time.time())
    return 0 if drain(notice, flags.address, flags.node_id) else 1


if __name__ == "__main__":
    sys.exit(main())
