"""What a further receiver costs: its retention against the steps spent, joined to a trained wire and from scratch.

    python latentwire/train.py --space search_spaces/toy.yaml --output_dir runs/pair
    python experiments/third_receiver.py --from runs/pair/best --add_receiver phi=toy-phi --steps 100 200 400 800

``joined``: the wire's encoder stays as it is, the receiver's own part is trained. ``scratch``: encoder and adapter of a wire
for that receiver alone. Both take the wire's configuration, with alignment, coarsening and warm-up as the same shares of the
steps as in its own ``max_steps``; retention is the exact match of the message over that of the full text. Flags and ``--set``
override both, ``--scratch`` what is trained from scratch, which knows no other receiver of the wire.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from latentwire.cli import run_script
from latentwire.cli.flags import (
    MANY,
    NO_FLAGS,
    NO_START,
    SharedFlags,
    SharedStart,
    input_path,
    read_config,
)
from latentwire.config import RunConfig, SweepConfig
from latentwire.config.overrides import override_run
from latentwire.config.places import with_home
from latentwire.config.resolve import ConfigError, with_values
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation import scoring
from latentwire.evaluation.conditions import Condition
from latentwire.exports import read_run
from latentwire.model import LatentWire
from latentwire.model_addresses import choose_receivers
from latentwire.training.local import train_here


def spent(run: RunConfig, base: RunConfig, steps: int) -> RunConfig:
    """``run`` for so many steps: what takes a share of the wire's own steps takes the same share of these."""
    # Without max_steps the wire's epochs decide, and only the steps below are known.
    known = base.training.alignment_steps + base.training.coarsening_steps
    total = base.training.max_steps or max(1, known)
    values: dict[str, Any] = {
        "training.max_steps": steps,
        "training.epochs": 1000,
        "training.evaluate_every": steps,
    }
    for name in ("alignment_steps", "coarsening_steps", "warmup_steps"):
        scaled = round(getattr(run.training, name) * steps / total)
        values[f"training.{name}"] = min(scaled, steps)
    return with_values(run, values)


def from_scratch(run: RunConfig, name: str, assignments: list[str]) -> RunConfig:
    """A run of the receiver ``name`` alone that starts from nothing, with ``PATH=VALUE`` assignments laid over it."""
    alone = {"training.train_only": [], "training.init_from": None}
    return override_run(with_values(choose_receivers(run, [name]), alone), assignments)


def measure(run: RunConfig, name: str, output: Path) -> dict[str, Any]:
    """Train here and score the receiver ``name`` on the untouched rows."""
    paths = local_shards(run)
    began = time.monotonic()
    best = train_here(LatentWire(run), paths, output)
    seconds = time.monotonic() - began
    # A joined wire has all its receivers; scored is the one that joined.
    alone = choose_receivers(read_run(best), [name])
    scores = scoring.score(
        best, paths["validation"], (Condition("text"), Condition("latent")), alone
    )
    text, latent = (scores[mode][name] for mode in ("text", "latent"))
    of_latents = {field: latent[field] for field in ("em", "em_low", "em_high", "f1", "nll")}
    return of_latents | {
        "text_em": text["em"],
        "retention": latent["em"] / max(text["em"], 1e-9),
        "seconds": seconds,
    }


def main(
    *,
    flags: SharedFlags = NO_FLAGS,
    start: SharedStart = NO_START,
    steps: Annotated[tuple[int, ...], Parameter(**MANY)] = (100, 200, 400, 800),
    ways: Annotated[tuple[Literal["joined", "scratch"], ...], Parameter(**MANY)] = (
        "joined",
        "scratch",
    ),
    scratch: Annotated[list[str] | None, Parameter(negative=(), allow_leading_hyphen=True)] = None,
    output: Annotated[Path, Parameter(["--output", "--output_dir"])] = Path("runs/third"),
) -> int:
    """Train at every number of steps, both ways; print the table and write it beside the runs.

    Args:
        steps: Steps to spend.
        ways: Which to train.
        scratch: PATH=VALUE of what is trained from scratch alone; repeatable.
        output: Where the runs and table.json go.
    """
    if start.add_receiver is None:
        raise ConfigError(
            "a receiver must join, got no --add_receiver; name it, and the wire by --from"
        )
    run = with_home(read_config(flags, start=start)).run
    base = with_home(SweepConfig(run=read_run(input_path(start.base)))).run
    # read_config has the joining receiver alone trained.
    (name,) = run.training.train_only
    configs = {"joined": run}
    if "scratch" in ways:
        configs["scratch"] = from_scratch(run, name, scratch or [])
    rows = []
    for count in steps:
        for way in ways:
            scores = measure(
                spent(configs[way], base, count), name, (output / f"{way}-{count}").absolute()
            )
            rows.append({"steps": count, "way": way} | scores)
            # After every run, since each takes long.
            (output / "table.json").write_text(json.dumps(rows, indent=1))
    print(
        "| steps | way | EM | F1 | NLL | EM of the full text | retention | seconds |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        em = f"{100 * row['em']:.1f} [{100 * row['em_low']:.1f}, {100 * row['em_high']:.1f}]"
        print(
            f"| {row['steps']} | {row['way']} | {em} | {100 * row['f1']:.1f} | {row['nll']:.3g} | {100 * row['text_em']:.1f} "
            f"| {100 * row['retention']:.0f} % | {row['seconds']:.0f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
