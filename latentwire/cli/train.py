"""``latentwire train``: one wire, in this process or on Ray."""

from __future__ import annotations

import signal
from functools import partial
from typing import Annotated

from cyclopts import Parameter
from transformers.utils.logging import disable_progress_bar

from latentwire.api import train as api
from latentwire.cli import command_line
from latentwire.cli.flags import (
    MANY,
    NO_FLAGS,
    NO_START,
    Output,
    Ray,
    Resume,
    SharedFlags,
    SharedStart,
    Verbose,
    output_path,
    output_place,
    read_config,
    refuse_search,
)
from latentwire.config.resolve import ConfigError


def train(
    *,
    flags: SharedFlags = NO_FLAGS,
    start: SharedStart = NO_START,
    output: Output = None,
    resume: Resume = None,
    ray: Ray = False,
    seeds: Annotated[
        list[int] | None,
        Parameter(
            help="Train once with each of these seeds, in seed-<n> of the output directory, and print the mean and "
            "range of their scores.",
            **MANY,
        ),
    ] = None,
    profile: Annotated[
        int | None,
        Parameter(help="Measure where the time of so many steps goes, write a trace, and stop."),
    ] = None,
    verbose: Verbose = False,
) -> int:
    """Train one wire, score its best checkpoint once on the validation split, export it.

    Checkpoints, the exported best/ and results.json land in the output directory. Without --ray the run stays in
    this process, and Ray is started only where shards have to be made first.
    """
    # Both, or neither.
    if (output is None) == (resume is None):
        raise ConfigError(
            "a run needs --output DIR for a new one or --resume DIR to go on, and not both; name one"
        )
    if seeds and (flags.seed is not None or profile is not None):
        raise ConfigError(
            "--seeds names the seeds of whole runs, got it with --seed or --profile; leave that out"
        )
    refuse_search(flags)
    if not verbose:
        # Of weights that take a moment to load.
        disable_progress_bar()
    space = read_config(flags, start=start)
    address = output or resume or ""
    if profile is not None:
        print(api.profile(space, output_path(address), profile))
        return 0
    where = output_place(address) if ray else output_path(address)
    train_wires = partial(api.run_seeds, seeds=seeds) if seeds else api.run
    try:
        train_wires(
            space,
            where,
            command=command_line("train"),
            resume=resume is not None,
            on_ray=ray,
            verbose=verbose,
        )
    except KeyboardInterrupt:
        left = "before anything was written but shards"
        if where.exists():
            left = f"go on from its last checkpoint by the same flags with --resume {where}"
        print(f"stopped: Ctrl-C; {left}", flush=True)
        # As a shell counts a process that a signal has ended.
        return 128 + signal.SIGINT
    return 0
