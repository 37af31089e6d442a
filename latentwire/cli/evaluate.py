"""``latentwire evaluate``: score a checkpoint beside its baselines, or a file of answers."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import MutuallyExclusive

from latentwire.cli.flags import (
    MANY,
    Assignments,
    Output,
    Ray,
    Verbose,
    input_path,
    input_place,
    output_place,
)
from latentwire.config import DataConfig
from latentwire.config.overrides import assigned
from latentwire.config.places import sought
from latentwire.config.resolve import ConfigError, validate
from latentwire.data import shards
from latentwire.evaluation.baselines import DEFAULT_MODES, Mode
from latentwire.evaluation.metrics import score_file
from latentwire.reports import scores
from latentwire.storage import write_text

SUBJECT = Group("Scored", validator=MutuallyExclusive(), sort_key=1)
BUDGET = Group("Lengths of message", validator=MutuallyExclusive(), sort_key=2)


def evaluate(
    *,
    checkpoint: Annotated[str | None, Parameter(group=SUBJECT)] = None,
    predictions: Annotated[str | None, Parameter(group=SUBJECT)] = None,
    dataset: str = "squad",
    data_dir: Annotated[str | None, Parameter(name="--data_dir")] = None,
    split: shards.ShardSplit = "validation",
    modes: Annotated[tuple[Mode, ...], Parameter(**MANY)] = DEFAULT_MODES,
    tokens_per_latent: Annotated[
        list[int] | None, Parameter("--tokens_per_latent", group=BUDGET, **MANY)
    ] = None,
    latent_len: Annotated[list[int] | None, Parameter("--latent_len", group=BUDGET, **MANY)] = None,
    bits: Annotated[list[Literal[16, 8, 4]] | None, Parameter(**MANY)] = None,
    compare: Annotated[list[str] | None, Parameter(**MANY)] = None,
    no_joint: Annotated[bool, Parameter(name="--no_joint", negative=())] = False,
    diagnose: Annotated[bool, Parameter(negative=())] = False,
    assignments: Assignments = [],  # noqa: B006  (never changed)
    output: Output = None,
    ray: Ray = False,
    copies: int | None = None,
    verbose: Verbose = False,
) -> int:
    """Score a checkpoint or export beside full text, closed book and shuffled messages; or a file of answers.

    The wire's own configuration says which data; --set data.… overrides it. docs/guides/evaluation.md explains every row and column.

    Args:
        checkpoint: Directory or URI of a checkpoint or export.
        predictions: Answers in the dataset's official format, as JSON.
        dataset: With --predictions: the dataset whose questions they answer.
        data_dir: With --predictions: directory with that dataset's files.
        split: Rows to score.
        modes: Rows of the table: what the receivers read where the context belongs.
        tokens_per_latent: Lengths of message to score, each beside text cut to as many tokens.
        latent_len: The same for a wire whose messages have a fixed length.
        bits: Also send the latents in packets of these widths.
        compare: Also print paired differences: of two rows (modes, or keys of the JSON); without names, of the
            latents and each baseline.
        no_joint: Leave out how likely receivers find each other's answers, which takes further passes.
        diagnose: Also measure what the latents hold, apart from what receivers make of them.
        copies: With --ray: wires at once (default: as many as the cluster holds).
    """
    if predictions is not None:
        return official(predictions, dataset, data_dir, split, assignments, output)
    if checkpoint is None:
        raise ConfigError(
            "an evaluation needs --checkpoint DIR or --predictions FILE, got neither; name one"
        )
    if data_dir is not None:
        raise ConfigError(
            f"--data_dir belongs to --predictions, got {data_dir} with --checkpoint; name the directory by "
            f"--set data.data_dir={data_dir}"
        )
    # Not for a file of answers, which needs no model.
    from transformers.utils.logging import disable_progress_bar

    from latentwire.api.evaluate import evaluate as score

    if not verbose:
        # Of weights that take a moment to load.
        disable_progress_bar()
    values = {path.removeprefix("run."): value for path, value in assigned(assignments).items()}
    evaluation = score(
        str(input_place(checkpoint)),
        split=split,
        modes=modes,
        tokens_per_latent=tokens_per_latent or (),
        latent_len=latent_len or (),
        bits=bits or (),
        compare=compare,
        joint=not no_joint,
        probes=diagnose,
        overrides=values,
        on_ray=ray,
        copies=copies,
        verbose=verbose,
    )
    scores.show(evaluation, f"{checkpoint}, {split}")
    if output:
        scores.write(evaluation, output_place(output))
    return 0


def official(
    predictions: str,
    dataset: str,
    data_dir: str | None,
    split: shards.ShardSplit,
    assignments: list[str],
    output: str | None,
) -> int:
    """Score a file of answers as the official script does, and print its names and digits."""
    named = {"dataset": dataset, "data_dir": None if data_dir is None else str(sought(data_dir))}
    for path, value in assigned(assignments).items():
        if not path.startswith("run.data."):
            raise ConfigError(
                f"--predictions is scored by the data alone, got --set {path.removeprefix('run.')}; leave it out"
            )
        named[path.removeprefix("run.data.")] = value
    data = validate(DataConfig, named, "command line")
    metrics, missing = score_file(input_path(predictions), data, shards.source_of(split))
    if missing:
        # Beside the scores, which alone stand on stdout as the official script prints them.
        print(f"{missing} questions are not answered and score 0", file=sys.stderr)
    print(json.dumps(metrics))
    if output:
        write_text(output_place(output), json.dumps(metrics))
    return 0
