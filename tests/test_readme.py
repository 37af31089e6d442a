"""The README's annotated tree is the tree."""

import re
from pathlib import Path

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
