"""How much the fast tests notice: a seeded sample of mutants of the code that computes, run through mutmut.

    python scripts/mutants.py --seed 0 --count 150       # make mutants

mutmut writes every mutant of ``[tool.mutmut]`` in pyproject.toml into ``mutants/``, and learns from
one run of the fast tests which of them reach which function. Each mutant of the sample then runs
those tests, the quickest first, up to the first failure, in a process that is forked after the
imports; two at a time. What survives is printed as a diff. Less than the goal ends with status 1.
docs/experiments/mutants.md judges survivors.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MUTANTS = ROOT / "mutants"
# Tests that start Python anew must find the mutants too. A GPU's context would not outlive a fork, nor would threads.
os.environ |= {
    "PYTHONPATH": str(MUTANTS), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip

from mutmut import __main__ as mutmut  # noqa: E402
from mutmut.configuration import config  # noqa: E402
from mutmut.mutation.diff_apply import get_diff_for_mutant  # noqa: E402
from mutmut.state import state  # noqa: E402
from mutmut.utils.format_utils import get_module_from_key, mangled_name_from_mutant_name  # noqa: E402
from mutmut.workers.isolation import get_mutant_runner  # noqa: E402

ONLY_RAY = (
    r"\.(pipeline\.x__make|teachers\.x_(_make|ensure_teachers)|streams\.x_(ray_dataset|_read_file)"
    r"|workers\.xǁWorkersǁsum_gradients)__mutmut"
)
"""Functions that only a running Ray, or several workers, can run: the slow tests are theirs."""
UNEQUAL = r"\.metrics\.x__gold_facts__mutmut"
"""Functions whose ``zip`` meets columns of a user's file, which may be of different lengths."""
TO_DEVICE = r"\.to\((\w+\.)*device\)"
"""A move to a tensor's or a model's device."""
CONTROL = "no.mutant.x_control__mutmut_0"
"""A name that switches no mutant on: its tests must pass."""
# 2: pytest could not collect, 3: it failed inside; both because of the mutant, since its tests pass without it.
OUTCOMES = {
    0: "survived",
    1: "killed",
    2: "killed",
    3: "killed",
    -24: "timeout",
    -9: "timeout",
    33: "no tests",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="which sample (default 0)")
    parser.add_argument(
        "--count", type=int, default=150, help="mutants in the sample (default 150)"
    )
    parser.add_argument("--at_once", type=int, default=2, help="mutants at a time (default 2)")
    parser.add_argument("--goal", type=float, default=0.9, help="share to be killed (default 0.9)")
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="test time for one mutant (default 40)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        help="end the sample early after this time (default 20)",
    )
    parser.add_argument(
        "--only",
        default="",
        help="mutants that this regular expression finds, such as 'data.layout'",
    )
    parser.add_argument(
        "--tests", nargs="*", help="tests to run, such as tests/data (default: [tool.mutmut]'s)"
    )
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


def changes_nothing(name: str, diff: str) -> bool:
    """Return whether a mutant differs in nothing that a test on a CPU can see.

    The words of an assertion and ``strict`` of a ``zip`` speak up where the program itself is wrong:
    on lists that are as long as each other nothing is different without them. The device of a
    tensor is the only one there is.
    """
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    # What the diff takes out, and what it puts in.
    sides = []
    for sign in "-+":
        sides.append("".join(line[1:] for line in lines if line.startswith(sign)))
    # The message at an assertion's end.
    patterns = [r"(?<=, )\"[^\"]*\"$"] if sides[0].lstrip().startswith("assert ") else []
    if not re.search(UNEQUAL, name):
        patterns.append(r",?\s*\bstrict=(True|False|None)")
    patterns.append(r",?\s*\bdevice=[\w.\[\]]+")
    if re.search(TO_DEVICE, sides[0]):
        patterns += [TO_DEVICE, r"\.to\(None\)"]
    for pattern in patterns:
        sides = [re.sub(pattern, "", side.rstrip()) for side in sides]
    # Alike but for white space and trailing commas, once those patterns are off.
    return len({re.sub(r"\s+|,\s*(?=\))", "", side) for side in sides}) == 1


def tests_reaching(mutant: str, seconds: float) -> list[str]:
    """Names of tests that call the mutant's function, the quickest first, as many as fit into the time."""
    took = state().duration_by_test
    names = state().tests_by_mangled_function_name.get(mangled_name_from_mutant_name(mutant), set())
    chosen: list[str] = []
    for name in sorted(names, key=lambda name: (took[name], name)):
        # The first one always, however long it takes.
        seconds -= took[name]
        if chosen and seconds < 0:
            break
        chosen.append(name)
    return chosen


def run(tests: dict[str, list[str]], at_once: int, until: float) -> Iterator[tuple[str, str]]:
    """Mutants with what became of them, one after the other as long as there is time."""
    runner = get_mutant_runner(at_once)
    runner.startup()

    def ended() -> tuple[str, str]:
        result = runner.wait_for_result()
        unknown = f"pytest's status {result.exit_code}"
        return result.mutant_name, OUTCOMES.get(result.exit_code, unknown)

    try:
        for mutant, names in tests.items():
            while not runner.has_capacity():
                yield ended()
            if time.monotonic() > until:
                break
            needed = sum(state().duration_by_test[name] for name in names)
            # In processor seconds; half as many of the clock's, of which other work takes its share.
            shared = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
            runner.submit(mutant, names, int(2 * shared * (2 * needed + 40)), needed)
        runner.signal_work_complete()
        while runner.pending_count():
            yield ended()
    finally:
        runner.stop_all_workers()
        runner.shutdown()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.chdir(ROOT)
    began = time.monotonic()
    if args.tests:
        config().pytest_add_cli_args_test_selection = args.tests
    prepare(args.at_once)
    every, _ = mutmut.collect_source_file_mutation_data(mutant_names=[])
    paths = {}
    for file, name, _ in every:
        if re.search(args.only, name) and not re.search(ONLY_RAY, name):
            paths[name] = file.path
    # Sorted first: the same seed draws the same mutants of the same code.
    drawn = random.Random(args.seed).sample(sorted(paths), min(args.count, len(paths)))
    diffs = {name: get_diff_for_mutant(name, path=paths[name]) for name in drawn}
    sample = [name for name in drawn if not changes_nothing(name, diffs[name])]
    print(
        f"{len(sample)} of {len(paths)} mutants, seed {args.seed}; {len(drawn) - len(sample)} more drawn that change "
        f"nothing; prepared in {time.monotonic() - began:.0f} s"
    )
    tests = {name: tests_reaching(name, args.seconds) for name in sample}
    # Tests of a few mutants, with none switched on: that forked processes pass them at all.
    control = sorted(set().union(*(tests[name] for name in sample[:3])))
    outcomes: dict[str, str] = {}
    for name, outcome in run({CONTROL: control} | tests, args.at_once, began + 60 * args.minutes):
        if name == CONTROL:
            if outcome not in ("survived", "no tests"):
                print(
                    f"tests must pass in a forked process where there is no mutant, got {outcome}; see {control}"
                )
                return 2
            continue
        outcomes[name] = outcome
        print(f"{len(outcomes):4}/{len(sample)}  {outcome:9} {name}", flush=True)

    survivors = sorted(
        name for name, outcome in outcomes.items() if outcome not in ("killed", "timeout")
    )
    for name in survivors:
        print(f"\n# {name}: {outcomes[name]}")
        print(diffs[name])
    modules = Counter(map(get_module_from_key, outcomes))
    lived = Counter(map(get_module_from_key, survivors))
    print(f"\n{'module':36}  killed  survived")
    for module, count in sorted(modules.items()):
        print(f"{module:36}  {count - lived[module]:6}  {lived[module]:8}")
    share = 1 - len(survivors) / max(1, len(outcomes))
    seconds = time.monotonic() - began
    print(f"{share:.1%} of {len(outcomes)} killed in {seconds:.0f} s (goal {args.goal:.0%})")
    return int(not outcomes or share < args.goal)


if __name__ == "__main__":
    sys.exit(main())
