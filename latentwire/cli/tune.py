"""``latentwire tune``: search a space on Ray."""

from __future__ import annotations

import signal
from typing import Annotated, Any

from cyclopts import Group, Parameter

from latentwire.api import tune as api
from latentwire.cli import command_line, program
from latentwire.cli.flags import (
    NO_FLAGS,
    Output,
    Resume,
    SharedFlags,
    Verbose,
    input_place,
    output_place,
    read_config,
    refuse_flags,
)
from latentwire.config.places import with_home
from latentwire.config.resolve import ConfigError
from latentwire.distributed.driver_log import LOG
from latentwire.tuning import lease, manifest
from latentwire.tuning import resume as resuming
from latentwire.tuning.searcher import check_draws

AGAIN = Group("Go on, or repeat", sort_key=4)


def tune(
    *,
    flags: SharedFlags = NO_FLAGS,
    output: Annotated[
        Output,
        Parameter(help="Directory or URI for everything written; runs/tune-<time> by default."),
    ] = None,
    resume: Annotated[
        Resume,
        Parameter(
            help="Directory of a sweep: go on there, trials from their last checkpoints.",
            group=AGAIN,
        ),
    ] = None,
    retry_failed: Annotated[
        bool, Parameter(name="--retry_failed", negative=(), group=AGAIN)
    ] = False,
    force: Annotated[bool, Parameter(negative=(), group=AGAIN)] = False,
    from_manifest: Annotated[str | None, Parameter(name="--from_manifest", group=AGAIN)] = None,
    trial: Annotated[int | None, Parameter(group=AGAIN)] = None,
    dry_run: Annotated[bool, Parameter(name="--dry_run", negative=())] = False,
    verbose: Verbose = False,
) -> int:
    """Search a space on Ray, score the best wire once on the untouched split, export it.

    Everything lands in the output directory: trials, best/ (the export), predictions.parquet, manifest.json,
    results.json, report.md and report.html.

    Args:
        retry_failed: With --resume: take failed trials up again, from their last checkpoints.
        force: Take the sweep over from a driver that has given no heartbeat for two minutes.
        from_manifest: Manifest of a sweep: run one of its trials again.
        trial: The trial of --from_manifest; the best by default.
        dry_run: Print the configuration and the plan, then stop.
    """
    # First of all: what libraries print from here on goes to the log.
    LOG.divert(verbose)
    if resume or from_manifest:
        refuse_flags(flags, "a resumed sweep" if resume else "a repeated trial")
    if retry_failed and not resume:
        raise ConfigError(
            "--retry_failed takes up the failed trials of a sweep that --resume names, got no --resume"
        )
    repeated: dict[str, Any] | None = None
    if resume:
        where = output_place(resume)
        # A plan alone touches nothing, and may be asked for while another driver runs.
        if not dry_run:
            lease.check(where, force)
        space = resuming.read_space(where, flags.assignments)
        retried = retry_failed and resuming.has_failed(space, where)
        if resuming.is_finished(space, where) and not retried:
            print(
                f"{where} has its {space.tune.trials} trials; add some by --set tune.trials=<more>"
            )
            return 0
    else:
        if from_manifest:
            space, repeated = manifest.one_trial(
                input_place(from_manifest), trial, flags.assignments
            )
        else:
            space = with_home(read_config(flags, "toy"))
        check_draws(space)
        where = api.new_output(space, output)
    try:
        api.check(space, where)
        return api.run(
            space,
            where,
            program=program("tune"),
            command=command_line("tune"),
            repeated=repeated,
            retry=retry_failed,
            force=force,
            dry_run=dry_run,
            verbose=verbose,
        )
    except KeyboardInterrupt:
        print("stopped: Ctrl-C, before anything was written", flush=True)
        # As a shell counts a process that a signal has ended.
        return 128 + signal.SIGINT
