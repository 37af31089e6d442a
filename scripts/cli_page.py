"""Write docs/reference/cli.md: every command with its flags, as ``latentwire --help`` has them.

python scripts/cli_page.py
"""

from __future__ import annotations

import re
from pathlib import Path

from latentwire.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
HEAD = """# Command line

Made from the commands themselves by `python scripts/cli_page.py`; CI checks that it is current.
`python -m latentwire` is the same as `latentwire`. The same flag means the same in every command.
`--set <path>=<value>` reaches [every knob](knobs.md). `latentwire --install-completion` has the shell
complete commands and flags.

The commands of earlier versions are these with the same flags, and keep working:

| earlier | now |
|---|---|
| `python ray_jobs/tune.py` | `latentwire tune` |
| `python latentwire/train.py` | `latentwire train` |
| `python ray_jobs/train.py` | `latentwire train --ray`, with `--config toy` where none is named; goes on in a directory that is there |
| `python latentwire/evaluate.py` | `latentwire evaluate` |
| `python ray_jobs/evaluate.py` | `latentwire evaluate --ray` |
| `python ray_jobs/preprocess.py` | `latentwire preprocess` |
| `python latentwire/report.py` | `latentwire report` |

`--space FILE` is `--config`, `--output_dir DIR` is `--output`. Exit status: 0, or 2 for an error that is
yours to mend. A sweep also ends with 1 where every trial has failed or its time budget is over, with
130 after Ctrl-C and 143 after SIGTERM ([Stopping](../guides/search.md#stopping)).
"""


def page() -> str:
    """Return the whole page."""
    # Between the app's own head and the command that installs completion, which HEAD names.
    text = app.generate_docs(output_format="markdown")
    commands = text[
        text.index("\n## latentwire tune") : text.index("\n## latentwire --install-completion")
    ]
    return HEAD + re.sub(r"\n{3,}", "\n\n", commands).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
