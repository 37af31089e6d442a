"""What a sampler is worth: TPE against random search on a small toy space, the same examples for both, several seeds.

    python experiments/compare_samplers.py --output_dir runs/samplers --picture docs/images/samplers.png

Suggestions come from the sweep's own searcher (``tuning/searcher.py``); a trial trains in this process, which takes seconds,
and none is stopped early. Each pair of sampler and seed has a study of its own: the same command goes on where it was
stopped. The table and the picture show the best F1 so far on the development rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import optuna
import pyarrow as pa
import torch

from latentwire.config import RunConfig, SamplerConfig, SweepConfig
from latentwire.config.places import with_home
from latentwire.config.resolve import load_space, with_values
from latentwire.data import shards, streams
from latentwire.distributed.local_shards import local_shards
from latentwire.distributed.trial import NUMBER
from latentwire.errors import UserError, fail
from latentwire.model import LatentWire
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer, TrainingError
from latentwire.tuning.searcher import StudySearch
from latentwire.tuning.study import JOURNAL, own_trials

SPACE = Path(__file__).parent / "compare_samplers.yaml"
SAMPLERS = ("tpe", "random")


def train(run: RunConfig, rows: pa.Table, dev: pa.Table) -> dict[str, float]:
    """The metrics of a run at its end."""
    evaluations: list[dict[str, float]] = []
    trainer = Trainer(LatentWire(run), max(1, rows.num_rows // run.training.batch_size))
    trainer.train(
        table_epochs(run.training, rows), lambda: evaluations.append(trainer.evaluate(dev))
    )
    return evaluations[-1]


def sweep(space: SweepConfig, name: str, seed: int, output: Path) -> list[float]:
    """Scores of one sweep's trials in their order; what its study holds already is not run again."""
    tune = space.tune.model_copy(update={"sampler": SamplerConfig(name=name), "seed": seed})  # type: ignore[arg-type]
    space = space.model_copy(update={"tune": tune})
    folder = output / f"{name}-{seed}"
    search = StudySearch(
        space, journal=folder / JOURNAL, name=folder.name, trial_dir=folder / "trials"
    )
    paths = local_shards(space.run, ("train", "dev"))
    rows, dev = streams.training_table(space.run, paths["train"]), shards.read_table(paths["dev"])
    # What the journal has counts: a command that was stopped goes on with the next trial.
    while len(done := [t for t in own_trials(search.study) if t.state.is_finished()]) < tune.trials:
        trial_id = str(len(done))
        values = search.suggest(trial_id)
        # The searcher puts the trial's number beside the values.
        drawn = {path: value for path, value in values.items() if path != NUMBER}
        run = with_values(space.run, drawn)
        try:
            search.on_trial_complete(trial_id, train(run, rows, dev))
        except TrainingError as error:
            # No finite objective: the study counts it as failed.
            search.on_trial_complete(trial_id, {"step": 0, "total_steps": 1})
            print(f"{folder.name} trial {trial_id}: {error}", flush=True)
        last = search.study.trials[values[NUMBER]]
        print(f"{folder.name} trial {trial_id}: {last.state.name} {last.values}", flush=True)
    scores = []
    for trial in done:
        # One that failed found nothing, but its examples are spent.
        is_scored = trial.state.name == "COMPLETE" and trial.value is not None
        scores.append(trial.value if is_scored else 0.0)
    return scores


def best_so_far(scores: list[float]) -> list[float]:
    """The best score among the first 1, 2, … trials."""
    return [max(scores[: count + 1]) for count in range(len(scores))]


def table(scores: dict[str, list[list[float]]]) -> str:
    """Return Markdown: per sampler the best F1, and the area under the best so far, over seeds."""
    lines = [
        "| sampler | best F1 | area under best so far | by seed: best, area |",
        "|---|---|---|---|",
    ]
    for name, sweeps in scores.items():
        curves = list(map(best_so_far, sweeps))
        # On steps of width 1, the mean of a curve is the area below it.
        best, area = [curve[-1] for curve in curves], [statistics.mean(curve) for curve in curves]
        seeds = "; ".join(f"{b:.3f}, {a:.3f}" for b, a in zip(best, area, strict=True))
        lines.append(
            f"| {name} | {statistics.mean(best):.3f} | {statistics.mean(area):.3f} | {seeds} |"
        )
    return "\n".join(lines)


def draw(scores: dict[str, list[list[float]]], examples: int, picture: Path) -> None:
    """The mean curve of each sampler over the examples spent, and each seed's thinly behind it."""
    import matplotlib

    # Without a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, colour in zip(scores, ("tab:blue", "tab:orange"), strict=True):
        curves = list(map(best_so_far, scores[name]))
        spent = [examples * (count + 1) / 1000 for count in range(len(curves[0]))]
        for curve in curves:
            axes.step(spent, curve, where="post", color=colour, alpha=0.3, linewidth=1)
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.step(
            spent,
            mean,
            where="post",
            color=colour,
            linewidth=2,
            label=f"{name}, mean of {len(curves)} seeds",
        )
    axes.set(
        xlabel="examples trained on, in thousands", ylabel="best development F1 so far", ylim=(0, 1)
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def main() -> int:
    """Run what is missing, then print and write the table and draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--space", type=Path, default=SPACE, help="space file; tune.trials is the budget of a sweep"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="where the studies and table.md go"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--picture", type=Path, help="also draw the curves (needs matplotlib, in the extra dev)"
    )
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    try:
        space = with_home(load_space(options.space))
        scores: dict[str, list[list[float]]] = {}
        for name in SAMPLERS:
            sweeps = [sweep(space, name, seed, options.output_dir) for seed in options.seeds]
            scores[name] = sweeps
    except UserError as error:
        return fail(error)
    text = table(scores)
    (options.output_dir / "table.md").write_text(text + "\n")
    print(text)
    if options.picture:
        examples = (space.run.training.max_steps or 0) * space.run.training.batch_size
        draw(scores, examples, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
