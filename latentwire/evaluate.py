"""Score a checkpoint or export beside full text, closed book and shuffled messages; or a file of answers.

    python latentwire/evaluate.py --checkpoint runs/test/best
    python latentwire/evaluate.py --checkpoint runs/test/best --split dev --modes latent text --output runs/test/scores
    python latentwire/evaluate.py --checkpoint runs/squad/best --tokens_per_latent 4 8 16 --bits 8 4 --compare latent truncated
    python latentwire/evaluate.py --predictions answers.json --dataset squad --data_dir <directory with SQuAD>

The wire's own configuration says which data; ``--set data.…`` overrides it. docs/evaluation.md explains every column.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from latentwire import exports
from latentwire.cli.flags import input_path, input_place, output_place
from latentwire.config import DataConfig
from latentwire.config.overrides import assigned, override_run
from latentwire.config.places import sought
from latentwire.config.resolve import ConfigError, validate
from latentwire.data import shards
from latentwire.distributed.local_shards import local_shards
from latentwire.errors import UserError, fail
from latentwire.evaluation import scoring
from latentwire.evaluation.baselines import MODES
from latentwire.evaluation.conditions import WIDTHS
from latentwire.evaluation.diagnostics import diagnose
from latentwire.evaluation.metrics import DATASETS, score_file
from latentwire.model import load_wire
from latentwire.reports.scores import asked, known_of, show_and_write
from latentwire.storage import local, write_text
from latentwire.threads import use_threads


def parser() -> argparse.ArgumentParser:
    """The flags, shared with ``ray_jobs/evaluate.py``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=input_place, help="directory or URI of a checkpoint or export")
    what.add_argument("--predictions", type=input_path, help="answers in the dataset's official format, as JSON")
    parser.add_argument("--dataset", choices=DATASETS, default="squad", help="of --predictions")
    parser.add_argument("--data_dir", help="of --predictions: directory with the dataset's files")
    parser.add_argument("--split", choices=shards.SPLITS, default="validation", help="rows to score")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="what stands in for the context")
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument("--tokens_per_latent", nargs="+", type=int, default=[], metavar="N",
                         help="lengths of message to score, each beside text cut to as many tokens")  # fmt: skip
    budgets.add_argument("--latent_len", nargs="+", type=int, default=[], metavar="L",
                         help="the same for a wire whose messages have a fixed length")  # fmt: skip
    parser.add_argument("--bits", nargs="+", type=int, choices=WIDTHS, default=[],
                        help="also send the latents in packets of these widths")  # fmt: skip
    parser.add_argument("--compare", nargs="*", metavar="ROW",
                        help="also print paired differences: of these two rows (modes, or keys of the JSON), or of the "
                             "latents and each baseline where none is named")  # fmt: skip
    parser.add_argument("--no_joint", action="store_true",
                        help="leave out how likely receivers find each other's answers, which takes further passes")  # fmt: skip
    parser.add_argument("--diagnose", action="store_true", help="also probe the latents; see docs/evaluation.md")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
                        help="override a knob of the checkpoint's configuration, e.g. --set data.validation_samples=100; "
                             "of --predictions, of its data, e.g. --set data.config=distractor")  # fmt: skip
    parser.add_argument("--output", type=output_place,
                        help="also write the scores: <file>.json, or a directory for predictions.parquet and details too")  # fmt: skip
    return parser


def official(options: argparse.Namespace) -> int:
    """Score a file of answers as the official script does, and print its names and digits."""
    data_dir = None if options.data_dir is None else str(sought(options.data_dir))
    named = {"dataset": options.dataset, "data_dir": data_dir}
    for path, value in assigned(options.assignments).items():
        if not path.startswith("run.data."):
            raise ConfigError(
                f"--predictions is scored by the data alone, got --set {path.removeprefix('run.')}; leave it out"
            )
        named[path.removeprefix("run.data.")] = value
    data = validate(DataConfig, named, "command line")
    scores, missing = score_file(options.predictions, data, shards.source_of(options.split))
    if missing:
        print(f"{missing} questions are not answered and score 0", file=sys.stderr)
    print(json.dumps(scores))
    if options.output:
        write_text(options.output, json.dumps(scores))
    return 0


def main() -> int:
    """Make the split's shards where needed, load, score, print."""
    options = parser().parse_args()
    try:
        if options.predictions:
            return official(options)
        with local(options.checkpoint) as folder:
            exports.read_manifest(folder)
            run = override_run(exports.read_run(folder), options.assignments)
            exports.check_models(folder, run)
            wanted = asked(options, run)
            use_threads(run.training.cpus_per_worker)
            path = local_shards(run, (options.split,))[options.split]
            wire, _ = load_wire(folder, run)
            known = known_of(folder, options.split, path)
        predictions = scoring.predict_conditions(wire, path, wanted.rows, joint=not options.no_joint)
        probes = diagnose(wire, shards.read_table(path)) if options.diagnose else None
        return show_and_write(options, wanted, predictions, run, replace(known, probes=probes))
    except UserError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
