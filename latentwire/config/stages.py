"""The stages of a run: what each of them changes of the run, and which of its checkpoints goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latentwire.config.section import Section

STAGE = "stage:"
"""Before a stage's name in ``training.init_from``: the run begins with that stage's wire, wherever it lies."""
STAGES = "stages"
"""First word of the path of a stage's knob: ``stages.<name>.<path below run>``."""
SHARED = (
    "data.in_memory",
    "data.shard_dir",
    "data.stream_cpus",
    "training.cpus_per_worker",
    "training.gpus_per_worker",
    "training.init_from",
    "training.max_failures",
    "training.min_workers",
    "training.num_workers",
    "training.worker_resources",
)
"""Knobs that are the same in all stages of a run: where it runs, where its files lie, what it begins with."""

StageName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class StageConfig(Section):
    """One stage of a run: knobs of the run with the values that they have in this stage alone."""

    keep: Literal["best", "last"] = "best"
    """Which of its checkpoints the next stage begins with: the best by ``training.best_by`` on its
    development rows, or the last. The last stage's best one is the run's result."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Its rows, by knobs of ``run.data``."""
    prompt: dict[str, Any] = Field(default_factory=dict)
    """The text around its messages, by knobs of ``run.prompt``."""
    encoder: dict[str, Any] = Field(default_factory=dict)
    """Lengths of its messages and dropout, by knobs of ``run.encoder``; no shapes of weights."""
    features: dict[str, Any] = Field(default_factory=dict)
    """Features that begin or end with it, by knobs of ``run.features``."""
    losses: dict[str, Any] = Field(default_factory=dict)
    """Its losses, by knobs of ``run.losses``. A ``bundle`` replaces the run's; what the
    run sets beside its own stays, unless it is set here too."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Its steps, batches and rates, and what it trains, by knobs of ``run.training``."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """How it is evaluated, by knobs of ``run.evaluation``."""

    @model_validator(mode="after")
    def _leaves_alone_what_all_share(self) -> StageConfig:
        # The dot ends a name: worker_resources.GPU is below it, worker_resources_x would not be.
        below = tuple(f"{path}." for path in SHARED)
        if taken := [path for path in self.values if f"{path}.".startswith(below)]:
            raise ValueError(
                f"{', '.join(SHARED)} are the same in all stages of a run, got {', '.join(taken)} in one; "
                f"set that under run"
            )
        return self

    @property
    def values(self) -> dict[str, Any]:
        """Path below ``run`` → the value that this stage gives it."""
        sections = self.model_dump(mode="json", exclude={"keep"})
        return dict(_leaves(sections, ""))


def _leaves(tree: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and value of every leaf; an empty mapping below a section is one."""
    for name, child in tree.items():
        here = f"{path}.{name}" if path else name
        # An empty section sets nothing; an empty mapping in a section is a value.
        if isinstance(child, dict) and (child or not path):
            yield from _leaves(child, here)
        else:
            yield here, child
