"""What SECURITY.md says of this code."""

import ast
import re
import subprocess
from pathlib import Path

import yaml

from latentwire.config import ReceiverConfig
from latentwire.config.files import OnceLoader

REPOSITORY = Path(__file__).parent.parent
SOURCES = sorted(
    file
    for folder in ("latentwire", "ray_jobs", "scripts")
    for file in (REPOSITORY / folder).rglob("*.py")
)
UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def calls(file: Path) -> list[str]:
    """Names of everything a file calls, as far as they are written out."""
    tree = ast.parse(file.read_text())
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_yaml_is_read_by_the_safe_loader_alone() -> None:
    used = {call for file in SOURCES for call in calls(file) if call.startswith("yaml.")}
    safe = {"yaml.safe_load", "yaml.safe_dump", "yaml.MarkedYAMLError"}
    assert used <= {*safe, "yaml.load"}
    loaded = [(file.name, loader) for file in SOURCES for loader in loaders(file)]
    assert loaded == [("files.py", "OnceLoader")]
    assert issubclass(OnceLoader, yaml.SafeLoader)
    for name in ("construct_object", "construct_document", "yaml_constructors"):
        assert getattr(OnceLoader, name) is getattr(yaml.SafeLoader, name)  # builds nothing else


def loaders(file: Path) -> list[str]:
    """The second argument of each ``yaml.load`` in a file."""
    return [
        ast.unparse(node.args[1])
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "yaml.load"
    ]


def test_nothing_is_unpickled() -> None:
    for file in SOURCES:
        tree = ast.parse(file.read_text())
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imported |= {
            node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        }
        assert not {name.split(".")[0] for name in imported} & UNSAFE, file
        assert "weights_only=False" not in file.read_text(), file  # torch.load reads tensors alone
        assert not {"eval", "exec", "os.system"} & set(calls(file)), file
        assert "shell=True" not in file.read_text(), file


def test_a_resumed_sweep_restores_nothing_of_tunes_own() -> None:
    """Tune keeps pickles in ``<sweep>/tune``; a sweep goes on from its journal, its space.json and its checkpoints."""
    assert not [
        file
        for file in SOURCES
        for call in calls(file)
        if call in ("tune.Tuner.restore", "Tuner.restore")
    ]


def test_code_of_strangers_is_run_on_request_only() -> None:
    assert ReceiverConfig(name="llama", model="x").trust_remote_code is False
    lines = [line.strip() for file in SOURCES for line in file.read_text().splitlines()]
    passed = [
        line for line in lines if "trust_remote_code=" in line and not line.startswith('f"')
    ]  # but for a message
    assert all(
        re.search(r"trust_remote_code=(config|source)\.trust_remote_code", line) for line in passed
    ), passed


def test_no_tracked_file_holds_a_secret() -> None:
    shapes = re.compile(
        r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY|ghp_[A-Za-z0-9]{30,}"
    )
    names = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    texts = [
        REPOSITORY / name
        for name in names
        if Path(name).suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json", ""}
    ]
    found = [
        file for file in texts if file.is_file() and shapes.search(file.read_text(errors="ignore"))
    ]
    assert not found
