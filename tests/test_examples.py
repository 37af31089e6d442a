"""The examples run, in a size that learns nothing."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


SECONDS = 900
"""An example that takes longer is stuck; what it has said is shown."""


def run(script: str, *flags: str, folder: Path) -> str:
    """What an example prints when it runs in a directory of its own."""
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / script), *flags]
    log = folder / f"{script}.log"
    with log.open("w") as output:
        example = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            status: int | str = example.wait(SECONDS)
        except subprocess.TimeoutExpired:
            example.kill()
            status = f"none after {SECONDS} s"
    said = log.read_text()
    assert status == 0, f"exit status {status}: {said[-5000:]}"
    return said


@pytest.mark.slow
def test_a_wire_is_trained_from_python_and_its_message_crosses_to_another_process(
    tmp_path: Path,
) -> None:
    printed = run(
        "train_from_python.py", "--output=wire", "--steps=2", "--samples=200", folder=tmp_path
    )
    assert "llama: " in printed and "qwen: " in printed
    printed = run("two_processes.py", "wire/best", folder=tmp_path)
    assert "received" in printed and "qwen: " in printed


@pytest.mark.slow
def test_a_sweep_from_python_is_a_table_a_winner_and_a_notebook_of_pictures(tmp_path: Path) -> None:
    printed = run(
        "tune_from_python.py", "--output=sweep", "--trials=2", "--steps=2", folder=tmp_path
    )
    assert "best: trial" in printed and (tmp_path / "sweep" / "report.html").exists()
    notebook = nbformat.read(EXAMPLES / "plot_a_sweep.ipynb", as_version=4)
    os.environ["LATENTWIRE_SWEEP"] = str(tmp_path / "sweep")
    try:
        NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
    finally:
        del os.environ["LATENTWIRE_SWEEP"]
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
