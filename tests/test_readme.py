"""What README and docs name is there."""

import re
import typing
from pathlib import Path

from latentwire.cli.flags import FLAGS
from latentwire.config import EncoderConfig, FeaturesConfig, LossConfig, TuneConfig
from latentwire.config.resolve import knobs
from latentwire.features.base import Feature
from latentwire.features.registry import FEATURES

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


COMMAND = re.compile(r"python3? ((?:latentwire|ray_jobs|scripts)/\w+\.py)((?:[^`\n]|\\\n|\n(?= *--))*)")
"""A script, and its flags on this line and on those that go on."""
SHARED = {"add_flags": {*FLAGS, "set", "space"}, "add_start": {"from", "add_receiver"}}
"""What scripts call for flags that they share."""


def commands() -> list[tuple[str, str, str]]:
    """Document, script and flags of every command that the documents show."""
    documents = (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"))
    return [(document.name, *found) for document in documents for found in COMMAND.findall(document.read_text())]


def test_every_command_that_the_documents_show_is_one() -> None:
    """Its script and files are there and have its flags, and what it sets are knobs."""
    known = {path for path, _ in (*knobs(), *knobs(TuneConfig, "tune."))}
    sections = {f"features.{name}" for name in FeaturesConfig.model_fields}
    assert len(commands()) > 60
    for document, script, words in commands():
        source = (REPOSITORY / script).read_text()
        flags = set(re.findall(r'"--(\w+)"', source))
        flags |= {flag for call, shared in SHARED.items() if f"{call}(" in source for flag in shared}
        if "from latentwire.evaluate import" in source:
            flags |= set(re.findall(r'"--(\w+)"', (REPOSITORY / "latentwire" / "evaluate.py").read_text()))
        assert set(re.findall(r"--([a-z]\w*)", words)) <= flags, (document, script, words)
        for file in re.findall(r"--(?:space|variants) (\S+\.yaml)", words):
            assert (REPOSITORY / file).exists(), (document, script, file)
        for path in re.findall(r"--(?:set|scratch) '?(?:run\.)?([\w.]+)=", words):
            assert path in known | sections or path.startswith("receivers."), (document, script, path)


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


def test_the_documents_name_the_features_that_are_no_embeddings_and_those_that_cannot_share() -> None:
    wire, sharing = ((REPOSITORY / "docs" / name).read_text() for name in ("wire.md", "sharing.md"))
    inside = [name for name, feature in FEATURES.items() if feature.attached is not Feature.attached]
    assert len(inside) > 2 and not [name for name in inside if f"`{name}`" not in wire]
    own = [name for name, feature in FEATURES.items() if feature.needs_weights]
    assert own and not [name for name in own if f"`{name}`" not in sharing]


def test_every_knob_that_the_parts_name_is_there() -> None:
    switches = [
        line.split(" | ")[1] for line in (REPOSITORY / "docs" / "parts.md").read_text().splitlines() if " | " in line
    ]
    sections = {name.split(".")[0] for name, _ in knobs()}
    named = {path for cell in switches for path in re.findall(r"`([a-z_]+\.[a-z_0-9]+)[`:]", cell)}
    known = {name for name, _ in knobs()} | {f"features.{name}" for name in FeaturesConfig.model_fields}
    assert len(named) > 20
    assert not [path for path in named if path.split(".")[0] in sections and path not in known]
