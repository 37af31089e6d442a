"""What a submitted job uploads is counted by the rules that Ray uploads by."""

import subprocess
import sys
from pathlib import Path

from benchmarks.upload_size import uploaded

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "upload_size.py"


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False
    )


def test_large_files_are_named_and_ignored_ones_are_not(tmp_path: Path) -> None:
    for name, size in {
        "small.py": 10,
        "weights.bin": 150_000_000,
        "runs/old.bin": 200_000_000,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    (tmp_path / ".rayignore").write_text("runs/\n")
    found = run(tmp_path)
    assert found.returncode == 1 and "150.0 MB would be uploaded" in found.stdout
    assert "150.0 MB  weights.bin" in found.stderr and "old.bin" not in found.stderr
    (tmp_path / ".gitignore").write_text("*.bin\n")
    assert run(tmp_path).returncode == 0


def test_this_repository_is_small_enough() -> None:
    assert run(SCRIPT.parent.parent).returncode == 0


def test_the_whole_package_is_uploaded() -> None:
    """Patterns for folders of outputs must not name folders of the package."""
    repository = SCRIPT.parent.parent
    sent = {path for _, path in uploaded(repository)}
    package = {
        path.relative_to(repository)
        for path in (repository / "latentwire").rglob("*")
        if path.is_file()
    }
    assert {path for path in package if "__pycache__" not in path.parts} <= sent
