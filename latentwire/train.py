"""One training run on this machine.

    python3 latentwire/train.py --samples 100 --epochs 1 --batch_size 4 --output_dir runs/test
    python3 latentwire/train.py --llama_id meta-llama/Meta-Llama-3.1-8B-Instruct --qwen_id Qwen/Qwen2.5-7B-Instruct \
      --dataset squad --samples 87599 --epochs 24 --batch_size 64 --latent_len 32 --d_z 256 --sequential_models \
      --warm_anchor_text "Answer: " --first_token_ce_weight 0.5 --output_dir runs/experiment_name

Ray is started only where shards have to be made first. Checkpoints, the exported ``best/`` and ``results.json`` land in
``--output_dir``; ``--resume`` continues there.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from latentwire.cli.flags import add_flags, add_start, output_path, read_space
from latentwire.config.places import with_home
from latentwire.config.resolve import ConfigError
from latentwire.data import shards, streams
from latentwire.distributed.local_shards import local_shards
from latentwire.errors import UserError, fail
from latentwire.evaluation import readings, scoring
from latentwire.model import LatentWire
from latentwire.planning import planner
from latentwire.reports import tables
from latentwire.threads import cores, use_threads
from latentwire.training.checkpoints import check_development
from latentwire.training.local import train_here
from latentwire.training.profile import profile_steps


def main() -> int:
    """Plan, make shards where needed, train, score the best checkpoint once, export it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    add_start(parser)
    parser.add_argument("--output_dir", type=output_path, required=True, help="where checkpoints and results go")
    parser.add_argument("--resume", action="store_true", help="continue in an output_dir that exists")
    parser.add_argument("--profile", type=int, metavar="STEPS",
                        help="only measure so many steps: a Chrome trace and a table of shares in output_dir/profile")  # fmt: skip
    options = parser.parse_args()
    try:
        space = planner.alone(with_home(read_space(options)))
        output = options.output_dir.absolute()
        if output.exists() and not options.resume:
            raise ConfigError(f"output_dir must not exist yet, got {output}; name another one or add --resume")
        print(f"run: {space.run.model_dump_json()}", flush=True)
        print(
            f"threads: {use_threads(space.run.training.cpus_per_worker)} of {cores()} cores (training.cpus_per_worker)"
        )
        planner.check_start(space.run)
        here = {"CPU": 1e6, "GPU": 1e6 if planner.on_cuda() else 0.0}
        print(planner.plan(space, here, planner.node_memory()), flush=True)
        paths = local_shards(space.run)
        if not options.resume:
            check_development(space.run, paths["dev"])  # before receivers are loaded
        if options.profile:
            rows = streams.training_table(space.run, paths["train"])
            print(profile_steps(LatentWire(space.run), rows, options.profile, output / "profile"))
            return 0
        best = train_here(LatentWire(space.run), paths, output)
        export = output / "best"
        if export.exists():
            raise ConfigError(f"{export} exists: this run is finished; name another output_dir")
        scored = scoring.score_and_export(best, paths["validation"], export)
    except UserError as error:
        return fail(error)
    command = shlex.join(["python", *sys.argv])
    scoring.write_results(output, {"command": command, "best": best} | scored.document)
    rows = shards.read_manifest(paths["validation"])["rows"]
    title = f"{space.run.data.dataset} validation, {rows} rows, {best.name}"
    tables.show(tables.scored_tables(scored, title, space.run))
    if scored.scores:
        print(readings.sentence(scored.readings))
    print(f"exported: {export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
