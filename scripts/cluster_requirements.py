"""Write cluster/requirements.txt: what a node of a cluster installs, each package at its pin.

    python scripts/cluster_requirements.py

These are the packages of the project and of its extras ``aws`` and ``gcp``, with all that they need, at the versions of
constraints.txt. ``ray up`` sends the directory of this one file to every node: it hashes all that it sends, so the
repository itself would be hashed with its environments and runs.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "cluster" / "requirements.txt"
EXTRAS = ("aws", "gcp")
HEADER = """\
# What a node of a cluster installs. Written by scripts/cluster_requirements.py from pyproject.toml and constraints.txt.
"""


def pins() -> dict[str, str]:
    """Canonical name → line of constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}


def asked_for() -> list[Requirement]:
    """The project's own requirements, and those of the clouds."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def needs(requirements: list[Requirement]) -> list[tuple[str, Requirement]]:
    """Return who needs what, from these on: by the metadata of what is installed here."""
    pairs: list[tuple[str, Requirement]] = []
    # (package, extra) whose requirements are in; "" stands for those without an extra.
    seen: set[tuple[str, str]] = set()
    waiting = [("latentwire", requirement) for requirement in requirements]
    while waiting:
        pairs.append(waiting.pop())
        requirement = pairs[-1][1]
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in importlib.metadata.requires(name) or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append((name, needed))
    return pairs


def page() -> str:
    """The file's text. Raises :class:`KeyError` for a package without a pin."""
    pinned = pins()
    # Each once, however many need it.
    names = sorted({canonicalize_name(requirement.name) for _, requirement in needs(asked_for())})
    return HEADER + "".join(f"{pinned[name]}\n" for name in names)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
