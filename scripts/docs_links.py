"""Show files of the repository's root in the site that ``mkdocs`` builds from ``docs/``.

Links in ``docs/`` are relative to the repository, so that they work wherever its files are read.
``mkdocs`` knows ``docs/`` alone: the files below join the site, and links to them are turned.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parent.parent
JOINING = (
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "cluster.yaml", "cluster.gcp.yaml",
    "cluster/requirements.txt",
)  # fmt: skip
# :class:`~a.b.C` as mkdocstrings leaves it: the role, then code whose last name is kept.
ROLE = re.compile(r":[a-z]+:<code>~?[\w.]*?(\w+)</code>")
# The target in [text](target), unless it is a URL or a place on the same page.
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the files of the root to those of ``docs/``."""
    for name in JOINING:
        files.append(File.generated(config, name, abs_src_path=str(REPOSITORY / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between ``docs/`` and the root into links within the site."""
    name = page.file.src_uri
    folder = posixpath.dirname(name if name in JOINING else f"docs/{name}")

    def turned(link: re.Match[str]) -> str:
        # As the repository has it; then from the page, in a site whose root is docs/.
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(name) or ".")

    return LINK.sub(turned, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show docstrings' roles, such as ``:class:`~latentwire.model.LatentWire```, as the name alone."""
    return ROLE.sub(r"<code>\1</code>", html)
