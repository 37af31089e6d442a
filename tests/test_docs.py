"""The documentation builds as a site, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

from scripts import cli_page

REPOSITORY = Path(__file__).parent.parent
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def test_the_site_builds_and_every_link_in_it_leads_somewhere(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    build = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert build.returncode == 0, build.stdout + build.stderr
    page = (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    for name in ("LatentWire", "Message", "RunConfig", "SweepConfig", "train", "tune", "evaluate"):
        assert name in page
    assert "fonts.g" not in page  # it opens offline


def test_links_of_the_repositorys_own_pages_lead_somewhere() -> None:
    """The README's above all, which is no page of the site; anchors too."""
    for document in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")):
        for path, anchor in LINK.findall(
            re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        ):
            target = (document.parent / path).resolve() if path else document
            assert target.is_file(), (document, path)
            assert not anchor or anchor in anchors(target), (document, path, anchor)


def anchors(document: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles
    }


def test_the_page_of_the_command_line_is_current() -> None:
    assert cli_page.PAGE.read_text() == cli_page.page(), "run `python scripts/cli_page.py`"


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_bytes()) < 13_000
