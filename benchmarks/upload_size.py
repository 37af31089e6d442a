"""What `ray job submit --working-dir .` would upload: its size, and where it is large the largest files.

    python benchmarks/upload_size.py            # exit status 1 over 100 MB; Ray refuses 500 MB

Files are chosen by Ray's own rules: everything that neither .gitignore nor .rayignore names.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ray._private.runtime_env.packaging import _dir_travel

LIMIT_MB = 100
SHOWN = 10


def uploaded(folder: Path) -> list[tuple[int, Path]]:
    """Size in bytes and path of every file, the largest first."""
    files: list[tuple[int, Path]] = []

    def note(path: Path) -> None:
        if path.is_file():
            files.append((path.stat().st_size, path.relative_to(folder)))

    # Ray's own walk, which knows its rules; it warns of every large file.
    quiet = logging.getLogger("upload_size")
    quiet.setLevel(logging.ERROR)
    _dir_travel(folder, [], note, include_gitignore=True, logger=quiet)
    return sorted(files, reverse=True)


def main() -> int:
    """Print the size; over the limit, the largest files too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("."), help="the working directory of the job"
    )
    folder = parser.parse_args().folder.absolute()
    files = uploaded(folder)
    total = sum(size for size, _ in files) / 1e6
    print(f"{len(files)} files, {total:.1f} MB would be uploaded from {folder}")
    if total <= LIMIT_MB:
        return 0
    print(
        f"warning: over {LIMIT_MB} MB; name what no job needs in .rayignore. The largest:",
        file=sys.stderr,
    )
    for size, path in files[:SHOWN]:
        print(f"  {size / 1e6:9.1f} MB  {path}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
