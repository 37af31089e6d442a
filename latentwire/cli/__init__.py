"""The console command ``latentwire``: one thin file a command, over the functions of ``latentwire/api``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cyclopts import App, CycloptsError, Parameter

from latentwire import __version__
from latentwire.config.places import at_home
from latentwire.errors import UserError, fail
from latentwire.storage import place

COMMANDS = {
    "tune": "Search a space on Ray, score and export the best wire.",
    "sweep": "Look at a sweep, running or not, and give it orders.",
    "train": "Train one wire, here or on Ray.",
    "evaluate": "Score a wire beside its baselines, or a file of answers.",
    "preprocess": "Make shards and teachers' columns, and nothing else.",
    "report": "Write a sweep's report anew, or set seeds side by side.",
    "export": "Write a checkpoint's wire as a directory to be passed on.",
    "ask": "Ask one question of an exported wire: text and latents side by side.",
    "doctor": "Show what this machine and cluster have, and what is missing.",
}

LAST_WINS = Parameter(allow_repeating=True)
"""A flag that is given twice has its last value."""

app = App(
    name="latentwire",
    help="Train, tune and evaluate wires that hand one model's context to other frozen LLMs as a few vectors.",
    version=__version__,
    help_format="plaintext",
    default_parameter=LAST_WINS,
)
# By name, so that a command's module is imported when it is used, and torch with it.
for _command, _summary in COMMANDS.items():
    app.command(f"latentwire.cli.{_command}:{_command}", name=_command, help=_summary)
app.register_install_completion_command(name="--install-completion")


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2 for an error that is the user's to mend.

    Args:
        words: the command line without the program's name; None: this process's own.
    """
    return _call(app, words)


def run_script(command: Callable[..., int | None], description: str | None = None) -> int:
    """Run a script's one command with this process's arguments, and return its exit status."""
    return _call(
        App(
            help=description,
            default_command=command,
            help_format="plaintext",
            default_parameter=LAST_WINS,
        )
    )


def _call(command: App, words: Sequence[str] | None = None) -> int:
    # cyclopts must neither exit nor print: errors are one line, and the caller has the status.
    given = list(sys.argv[1:] if words is None else words)
    try:
        status = command(
            given, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except (UserError, CycloptsError) as error:
        return fail(error)
    return status if isinstance(status, int) else 0


def program(name: str) -> str:
    """Return the words that run a command again: a script's, or the console command's."""
    return f"python {sys.argv[0]}" if _is_script(name) else f"latentwire {name}"


def command_line(name: str) -> str:
    """Return this process's whole command, for the record."""
    # latentwire tune --x … has its command as a first word, python tune.py --x … has none.
    return f"{program(name)} {shlex.join(sys.argv[1 if _is_script(name) else 2 :])}".strip()


def _is_script(name: str) -> bool:
    return Path(sys.argv[0]).name == f"{name}.py"


def as_written(words: Sequence[str], goes_on: bool = False, config: str | None = None) -> list[str]:
    """Return a script's flags as the console command takes them.

    Scripts also take ``--resume`` without a value: go on in ``--output_dir``.

    Args:
        words: flags of ``train.py`` and its like.
        goes_on: resume wherever the output directory is there.
        config: configuration of a script that is given none, and no wire to begin with.
    """
    given: list[str] = []
    for word in words:
        # --output_dir=x is --output_dir x.
        given += word.split("=", 1) if word.startswith("--output") else [word]
    places = [index for index, word in enumerate(given) if word in ("--output", "--output_dir")]
    # A --resume that a further flag follows, or nothing, has no value.
    bare = []
    for index, word in enumerate(given):
        following = given[index + 1] if index + 1 < len(given) else "--"
        if word == "--resume" and following.startswith("--"):
            bare.append(index)
    named = {word.partition("=")[0] for word in words}
    if config is not None and not named & {"--config", "--space", "--from"}:
        given += ["--config", config]
    if not places or places[0] + 1 == len(given):
        return given
    output = given[places[0] + 1]
    if bare or (goes_on and place(at_home(output)).exists()):
        # The output directory is named by --resume then, and by no other flag.
        gone = (places[0], places[0] + 1, *bare)
        others = [word for index, word in enumerate(given) if index not in gone]
        return [*others, "--resume", output]
    return given
