"""What README and docs name is there, and their commands parse."""

import importlib
import itertools
import re
import shlex
import tomllib
import typing
from pathlib import Path

import pytest
from cyclopts import App, CycloptsError, MissingArgumentError

from latentwire.cli import app, as_written
from latentwire.config import EncoderConfig, FeaturesConfig, LossConfig, TuneConfig
from latentwire.config.files import SHIPPED
from latentwire.config.knobs import knob_of
from latentwire.config.resolve import knobs
from latentwire.features.base import Feature
from latentwire.features.registry import FEATURES
from scripts import cli_page

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PARTS = DOCS / "guides" / "parts.md"
DOCUMENTS = sorted((*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")))


def named_in_the_tree() -> set[str]:
    """Return the files of the package that the tree of docs/architecture.md names."""
    (tree,) = re.findall(
        r"```text\n(latentwire/\n.*?)```", (DOCS / "architecture.md").read_text(), re.DOTALL
    )
    files, folders = set(), []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            files.add("".join([*folders, name]))
    return files


def test_the_annotated_tree_names_every_file_and_no_other() -> None:
    package = REPOSITORY / "latentwire"
    files = {*package.rglob("*.py"), *package.rglob("*.jinja")}
    expected = {
        str(file.relative_to(REPOSITORY))
        for file in files
        if "toy_pair" not in file.parts and (file.name != "__init__.py" or file.parent == package)
    }
    assert named_in_the_tree() == expected


def section(heading: str) -> str:
    """Return what stands below a heading of docs/architecture.md."""
    text = (DOCS / "architecture.md").read_text()
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_the_way_of_the_imports_is_the_one_that_lint_holds() -> None:
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    layers, without_ray = pyproject["tool"]["importlinter"]["contracts"]
    held = [{name.strip() for name in layer.split("|")} for layer in layers["layers"]]
    _, drawn, forbidden = section("The way of the imports").strip().split("\n\n")
    shown = [
        {f"latentwire.{name.strip()}" for name in layer.split(",")} for layer in drawn.split("→")
    ]
    assert shown == held
    named = {
        f"latentwire.{name.removesuffix('.py')}" for name in re.findall(r"`([\w.]+)`", forbidden)
    }
    assert named == set(without_ray["source_modules"])


def test_what_stands_beside_the_package_is_named() -> None:
    shown = section("Beside the package")
    folders = ("scripts", "experiments", "examples", "ray_jobs")
    files = [file for folder in folders for file in (REPOSITORY / folder).iterdir()]
    assert len(files) > 15
    assert not [file for file in files if file.is_file() and file.name not in shown]


COMMAND = re.compile(
    r"(?:python3? ((?:latentwire|ray_jobs|scripts|experiments|examples|benchmarks)/\w+\.py|-m benchmarks[.\w]*)"
    r"|(?<![\w/.-])latentwire (tune|sweep|train|evaluate|preprocess|report|ask|export|doctor)\b)"
    r"((?:\\\n|[^`\n])*)"
)
"""A script or a command, and its flags, on this line and on those that a backslash joins to it."""


def commands() -> list[tuple[str, str, list[str]]]:
    """Return document, program and words of every command that the documents show."""
    shown = []
    for document in DOCUMENTS:
        blocks = document.read_text().split("```")
        prose = [
            re.sub(r"`[^`]+`", lambda code: code[0].replace("\n", " "), text)
            for text in blocks[::2]
        ]
        for text in (*prose, *blocks[1::2]):
            for script, command, flags in COMMAND.findall(text):
                if not flags.strip() or document == cli_page.PAGE:
                    continue
                flags = flags.replace("\\\n", " ").partition(" | ")[0]
                flags = re.sub(r"<the [^>]*>|\[--[^]]*\]|(?<= )…$", "", flags)
                words = shlex.split(re.sub(r"<[^>]*>", "PLACEHOLDER", flags), comments=True)
                shown.append((str(document.relative_to(REPOSITORY)), script or command, words))
    return shown


def check(program: str, words: list[str]) -> None:
    """Raise for a word that the program does not take."""
    command = Path(program).stem if program.startswith(("latentwire/", "ray_jobs/")) else program
    if command in app:
        parse(app, [command, *as_written(words)])
        return
    source = REPOSITORY / program.replace("-m benchmarks", "benchmarks").replace(".", "/").replace(
        "/py", ".py"
    )
    source = source / "__main__.py" if source.is_dir() else source.with_suffix(".py")
    if "run_script(" in source.read_text():
        module = importlib.import_module(
            ".".join(source.relative_to(REPOSITORY).with_suffix("").parts)
        )
        parse(App(default_command=module.main), words)
        return
    unknown = {
        word for word in words if word.startswith("--") and f'"{word}"' not in source.read_text()
    }
    assert not unknown, unknown


def parse(program: App, words: list[str]) -> None:
    """Parse words as the program does, and run nothing."""
    program.parse_args(words, exit_on_error=False, print_error=False)


def test_every_command_that_the_documents_show_is_one() -> None:
    """Its program is there and takes its flags; the files it names are there, and what it sets are knobs."""
    known = {path for path, _ in (*knobs(), *knobs(TuneConfig, "tune."))}
    sections = {path.rpartition(".")[0] for path in known}
    yaml = {file.stem for file in REPOSITORY.rglob("*.yaml") if ".venv" not in file.parts}
    yaml |= {
        str(file.relative_to(SHIPPED).with_suffix(""))
        for file in (SHIPPED / "peers").glob("*.yaml")
    }
    shown = commands()
    assert len(shown) > 100
    for document, program, words in shown:
        try:
            check(program, words)
        except (CycloptsError, AssertionError) as error:
            if isinstance(error, MissingArgumentError) and words == ["--half"]:
                continue  # prose that names the flag alone
            pytest.fail(f"{document}: {program} {shlex.join(words)}: {error}")
        for flag, value in itertools.pairwise(words):
            if flag in ("--config", "--space", "--variants") and value != "PLACEHOLDER":
                assert (REPOSITORY / value).exists() or value in yaml | {
                    "my_models.yaml",
                    "my_search.yaml",
                    "my_stages.yaml",
                }, (
                    document,
                    program,
                    value,
                )
            if flag in ("--set", "--scratch") and "…" not in value:
                path = knob_of(value.partition("=")[0].removeprefix("run."))
                exists = path in known | sections | {"PLACEHOLDER"} or path.startswith("receivers.")
                assert exists, (document, program, path)


def test_a_command_that_is_none_would_be_noticed() -> None:
    for program, words in (
        ("tune", ["--confg", "toy"]),
        ("latentwire/evaluate.py", ["--checkpoint", "a", "--modes", "texts"]),
        ("ray_jobs/train.py", ["--output_dir", "a", "--dry_run"]),
        ("sweep", ["runs/x", "halt"]),
        ("export", ["runs/x/best", "--half"]),
        ("experiments/ablate.py", ["--variant", "a"]),
        ("scripts/chaos.py", ["--death", "10"]),
        ("-m benchmarks", ["--lonely"]),
    ):
        with pytest.raises((CycloptsError, AssertionError)):
            check(program, words)


def test_every_test_that_the_documents_name_is_there() -> None:
    named = {
        (document.name, path)
        for document in DOCUMENTS
        for path in re.findall(r"`(tests/[\w/.]+)", document.read_text())
    }
    assert len(named) > 20
    assert not [
        (document, path) for document, path in named if not (REPOSITORY / path.rstrip(".")).exists()
    ]


def test_every_module_that_the_documents_name_is_there() -> None:
    rooms = [folder.name for folder in (REPOSITORY / "latentwire").iterdir() if folder.is_dir()]
    module = re.compile(
        rf"`(?:latentwire/)?((?:{'|'.join(rooms)})/\w+\.py)`|`(?:latentwire\.)((?:{'|'.join(rooms)})[.\w]*)"
    )
    named = {
        (document.name, slashed or dotted.replace(".", "/"))
        for document in DOCUMENTS
        if document.name != "CHANGELOG.md"
        for slashed, dotted in module.findall(document.read_text())
    }
    assert len(named) > 20
    assert not [
        (document, name)
        for document, name in named
        if not is_there(REPOSITORY / "latentwire" / name)
    ]


def is_there(path: Path) -> bool:
    """Return whether a module is there, or the module that a name is of."""
    return (
        path.exists() or path.with_suffix(".py").exists() or path.parent.with_suffix(".py").exists()
    )


def test_the_parts_name_every_kind_of_encoder_every_feature_and_every_loss() -> None:
    parts = PARTS.read_text()
    kinds = [
        f"`encoder.kind: {kind}`"
        for kind in typing.get_args(EncoderConfig.model_fields["kind"].annotation)
    ]
    features = [f"`features.{name}" for name in FeaturesConfig.model_fields]
    weights = [f"{name}`" for name in LossConfig.model_fields if name.endswith("_weight")]
    assert not [name for name in (*kinds, *features, *weights) if name not in parts]


def test_the_documents_name_the_features_that_are_no_embeddings_and_those_that_cannot_share() -> (
    None
):
    messages, sharing = (
        (DOCS / "guides" / name).read_text() for name in ("messages.md", "sharing.md")
    )
    inside = [
        name for name, feature in FEATURES.items() if feature.attached is not Feature.attached
    ]
    assert len(inside) > 2 and not [name for name in inside if f"`{name}`" not in messages]
    in_process = [name for name, feature in FEATURES.items() if feature.needs_weights]
    assert in_process and not [name for name in in_process if f"`{name}`" not in sharing]


def test_every_knob_that_the_parts_name_is_there() -> None:
    switches = [line.split(" | ")[1] for line in PARTS.read_text().splitlines() if " | " in line]
    sections = {name.split(".")[0] for name, _ in knobs()}
    named = {path for cell in switches for path in re.findall(r"`([a-z_]+\.[a-z_0-9]+)[`:]", cell)}
    known = {name for name, _ in knobs()} | {
        f"features.{name}" for name in FeaturesConfig.model_fields
    }
    assert len(named) > 20
    assert not [path for path in named if path.split(".")[0] in sections and path not in known]
