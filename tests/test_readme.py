"""What README and docs name is there."""

import re
import typing
from pathlib import Path

from latentwire.config import EncoderConfig, FeaturesConfig, LossConfig
from latentwire.config.resolve import knobs

REPOSITORY = Path(__file__).parent.parent
NAME = re.compile(r"[\w./]+\.(?:py|jinja|yaml)\b")


def told() -> set[str]:
    """Files of the package that the tree in the README names."""
    (block,) = re.findall(r"## How it is built\n+```\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    found, folders = set(), []
    for line in block.splitlines():
        words = line.split()
        depth = (len(line) - len(line.lstrip())) // 2
        if depth <= 2 and words and words[0].endswith("/"):
            folders = [*folders[:depth], words[0]]
            continue
        if not folders or folders[0] != "latentwire/" or not words or not NAME.fullmatch(words[0]):
            continue
        names = [words[0]]
        for word in words[1:]:
            if not NAME.fullmatch(word):
                break
            names.append(word)
        found |= {"".join([*folders[:depth], name]) for name in names}
    return found


def test_the_annotated_tree_names_every_file_and_no_other() -> None:
    package = REPOSITORY / "latentwire"
    files = {*package.rglob("*.py"), *package.rglob("*.jinja")}
    there = {
        str(file.relative_to(REPOSITORY))
        for file in files
        if file.name != "__init__.py" and "toy_pair" not in file.parts
    }
    assert told() == there


def test_every_test_that_the_documents_name_is_there() -> None:
    named = {
        (document.name, path)
        for document in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"))
        for path in re.findall(r"`(tests/[\w/.]+)", document.read_text())
    }
    assert len(named) > 20
    assert not [(document, path) for document, path in named if not (REPOSITORY / path.rstrip(".")).exists()]


def test_the_parts_name_every_kind_of_encoder_every_feature_and_every_loss() -> None:
    parts = (REPOSITORY / "docs" / "parts.md").read_text()
    kinds = [f"`encoder.kind: {kind}`" for kind in typing.get_args(EncoderConfig.model_fields["kind"].annotation)]
    features = [f"`features.{name}" for name in FeaturesConfig.model_fields]
    weights = [f"{name}`" for name in LossConfig.model_fields if name.endswith("_weight")]
    assert not [name for name in (*kinds, *features, *weights) if name not in parts]


def test_every_knob_that_the_parts_name_is_there() -> None:
    switches = [
        line.split(" | ")[1] for line in (REPOSITORY / "docs" / "parts.md").read_text().splitlines() if " | " in line
    ]
    sections = {name.split(".")[0] for name, _ in knobs()}
    named = {path for cell in switches for path in re.findall(r"`([a-z_]+\.[a-z_0-9]+)[`:]", cell)}
    known = {name for name, _ in knobs()} | {f"features.{name}" for name in FeaturesConfig.model_fields}
    assert len(named) > 20
    assert not [path for path in named if path.split(".")[0] in sections and path not in known]
