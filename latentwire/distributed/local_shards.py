"""Shards for what runs in this process, without a cluster."""

from __future__ import annotations

from latentwire.config import RunConfig
from latentwire.data import calibrations, pipeline, shards, sources, teachers
from latentwire.storage import Place


def local_shards(
    run: RunConfig,
    splits: tuple[shards.ShardSplit, ...] = shards.SPLITS,
    *,
    begins: bool = True,
) -> dict[shards.ShardSplit, Place]:
    """Return the shards of a run that trains in this process, and make the missing ones.

    The teachers' columns of training shards, and what a wire into retrieval heads begins from, are
    made with them; not the latter where nothing ``begins``. Ray is started only where something
    is missing, and stopped again. Raises :class:`~latentwire.data.sources.DataError` where it would
    be needed and is not installed.
    """
    paths = shards.shard_paths(run, splits)
    complete = all(shards.complete(path) for path in paths.values())
    if complete and ("train" not in paths or _all_there(run, paths["train"], begins)):
        return paths
    try:
        import ray.data

        from latentwire.distributed.calibrations import ensure_calibrations
        from latentwire.distributed.cluster import start_ray
        from latentwire.distributed.teachers import ensure_teachers
    except ImportError as error:
        missing = [str(path) for path in paths.values() if not shards.complete(path)]
        missing = missing or ["the teachers' columns or the calibration"]
        raise sources.DataError(
            f"shards must be there where Ray, which makes them, is not installed, got none at "
            f"{', '.join(missing)}; make them by `latentwire preprocess` with the same versions of "
            f"tokenizers and transformers, and copy {run.data.shard_dir}"
        ) from error

    start_ray()
    try:
        paths = {split: pipeline.ensure_shards(run, split) for split in splits}
        if "train" in paths:
            gpus = run.training.gpus_each(ray.cluster_resources())
            ensure_teachers(run, paths["train"], gpus)
            if begins:
                ensure_calibrations(run, paths["train"], gpus)
        return paths
    finally:
        ray.shutdown()


def _all_there(run: RunConfig, train: Place, begins: bool) -> bool:
    return teachers.complete(run, train) and not (begins and not calibrations.complete(run, train))
