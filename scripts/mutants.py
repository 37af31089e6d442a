"""How much the fast tests notice: a seeded sample of mutants of the code that computes, run through mutmut.

    python scripts/mutants.py --seed 0 --count 150       # make mutants

mutmut writes every mutant of ``[tool.mutmut]`` in pyproject.toml into ``mutants/``, and learns from one run of the fast tests which
of them reach which function. Each mutant of the sample then runs those tests, the quickest first, up to the first failure; a process
forked after the imports does so, two at a time. What survives is printed as a diff. Less than the goal ends with status 1.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
MUTANTS = ROOT / "mutants"
# Tests that start Python anew must find the mutants too; threads and GPUs would not outlive a fork.
os.environ |= {
    "PYTHONPATH": str(MUTANTS),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}

from mutmut import __main__ as mutmut  # noqa: E402
from mutmut.configuration import config  # noqa: E402
from mutmut.mutation.diff_apply import get_diff_for_mutant  # noqa: E402
from mutmut.state import state  # noqa: E402
from mutmut.stats import status_by_exit_code  # noqa: E402
from mutmut.utils.format_utils import get_module_from_key, mangled_name_from_mutant_name  # noqa: E402
from mutmut.workers.isolation import get_mutant_runner  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="which sample (default 0)")
    parser.add_argument("--count", type=int, default=150, help="mutants in the sample (default 150)")
    parser.add_argument("--at_once", type=int, default=2, help="mutants at a time (default 2)")
    parser.add_argument("--goal", type=float, default=0.9, help="share to be killed (default 0.9)")
    parser.add_argument("--seconds", type=float, default=40.0, help="test time for one mutant (default 40)")
    parser.add_argument("--only", default="", help="mutants that this regular expression finds, such as 'data.layout'")
    parser.add_argument("--tests", nargs="*", help="tests to run, such as tests/data (default: [tool.mutmut]'s)")
    return parser.parse_args(argv)


def prepare(at_once: int) -> None:
    """Write the mutants and learn which tests reach them, as far as the last run has not yet."""
    mutmut.set_mutant_under_test("mutant_generation")
    MUTANTS.mkdir(exist_ok=True)
    with mutmut.CatchOutput(spinner_title="Writing the mutants"):
        mutmut.copy_src_dir()
        mutmut.copy_also_copy_files()
        mutmut.setup_source_paths()
        mutmut.create_mutants(at_once)
    mutmut.collect_or_load_stats(get_mutant_runner(at_once), apply_config_invalidation=True)


def tests_reaching(mutant: str, seconds: float) -> list[str]:
    """Names of tests that call the mutant's function, the quickest first, as many as fit into the time."""
    took = state().duration_by_test
    names = state().tests_by_mangled_function_name.get(mangled_name_from_mutant_name(mutant), set())
    chosen: list[str] = []
    for name in sorted(names, key=lambda name: (took[name], name)):
        seconds -= took[name]
        if chosen and seconds < 0:
            break
        chosen.append(name)
    return chosen


def run(mutants: list[str], at_once: int, seconds: float) -> dict[str, str]:
    """What became of each: killed, timeout, survived or no tests."""
    runner = get_mutant_runner(at_once)
    runner.startup()
    found: dict[str, str] = {}

    def wait() -> None:
        result = runner.wait_for_result()
        found[result.mutant_name] = status_by_exit_code[result.exit_code]
        print(f"{len(found):4}/{len(mutants)}  {found[result.mutant_name]:9} {result.mutant_name}", flush=True)

    try:
        for mutant in mutants:
            while not runner.has_capacity():
                wait()
            tests = tests_reaching(mutant, seconds)
            needed = sum(state().duration_by_test[name] for name in tests)
            # In processor seconds; half of it in seconds of the clock.
            runner.submit(mutant, tests, int(2 * (5 * needed + 60)), needed)
        runner.signal_work_complete()
        while runner.pending_count():
            wait()
    finally:
        runner.shutdown()
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.chdir(ROOT)
    began = time.monotonic()
    if args.tests:
        config().pytest_add_cli_args_test_selection = args.tests
    prepare(args.at_once)
    every, data = mutmut.collect_source_file_mutation_data(mutant_names=[])
    paths = {name: file.path for file, name, _ in every}
    names = sorted(name for name in paths if re.search(args.only, name))
    sample = sorted(random.Random(args.seed).sample(names, min(args.count, len(names))))
    print(f"{len(sample)} of {len(names)} mutants, seed {args.seed}; prepared in {time.monotonic() - began:.0f} s")
    found = run(sample, args.at_once, args.seconds)

    survivors = [name for name in sample if found[name] not in ("killed", "timeout")]
    for name in survivors:
        print(f"\n# {name}: {found[name]}")
        print(get_diff_for_mutant(name, path=paths[name]))
    modules = Counter(map(get_module_from_key, sample))
    lived = Counter(map(get_module_from_key, survivors))
    print(f"\n{'module':36}  killed  survived")
    for module, count in sorted(modules.items()):
        print(f"{module:36}  {count - lived[module]:6}  {lived[module]:8}")
    share = 1 - len(survivors) / len(sample)
    print(f"{share:.1%} of {len(sample)} killed in {time.monotonic() - began:.0f} s (goal {args.goal:.0%})")
    return int(share < args.goal)


if __name__ == "__main__":
    sys.exit(main())
