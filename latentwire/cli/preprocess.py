"""``latentwire preprocess``: make shards and teachers' columns, and nothing else."""

from __future__ import annotations

from latentwire.cli.flags import NO_FLAGS, SharedFlags, Verbose, read_config
from latentwire.config.places import with_home
from latentwire.distributed import cluster, sweep_files
from latentwire.planning import autoscaler


def preprocess(*, flags: SharedFlags = NO_FLAGS, verbose: Verbose = False) -> int:
    """Make the shards and the teachers' columns that a configuration needs; complete ones are left alone."""
    space = with_home(read_config(flags, "toy"))
    cluster.start_ray(verbose)
    sweep_files.prepare(space, space.run.training.gpus_each(autoscaler.cluster_resources()))
    return 0
