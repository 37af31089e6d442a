"""Shared fixtures: the embedded toy pair, a few rows in shard columns, and the real data where it is named."""

from __future__ import annotations

import functools
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from cyclopts import App
from xdist.scheduler import LoadFileScheduling

from latentwire.cli import LAST_WINS
from latentwire.cli.flags import NO_FLAGS, NO_START, SharedFlags, SharedStart
from latentwire.closed_form.ranking import HeadScores, choose
from latentwire.config import ReceiverConfig, RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.shards import builders
from latentwire.dataset.toy import toy_rows
from latentwire.model import LatentWire
from latentwire.models.key_heads import shape_of
from latentwire.receivers.local import LocalReceiver
from tests.guard import pytest_configure  # noqa: F401  (a hook: what a run starts ends with it)

# Each test starts its own Ray: one that another user left running here must not be joined.
os.environ["RAY_ADDRESS"] = "local"
# Exact comparisons are meant for one CPU and fp32. tests/test_cuda.py alone wants a GPU, and asks for it by name.
if not os.environ.get("LATENTWIRE_TEST_CUDA"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

SMALL = {
    "encoder.latent_len": 6,
    "encoder.d_z": 32,
    "encoder.d_model": 32,
    "encoder.layers": 1,
    "encoder.heads": 2,
    "training.batch_size": 4,
    "training.log_every": 1,
    "evaluation.batch_size": 8,
    "evaluation.max_answer_tokens": 6,
}
"""Knobs of a wire that builds and steps in milliseconds."""


def flags_of(*words: str) -> tuple[Any, Any]:
    """Return the shared flags of a command line, and those of a run that begins with a wire."""

    def command(*, flags: SharedFlags = NO_FLAGS, start: SharedStart = NO_START) -> tuple[Any, Any]:
        return flags, start

    app = App(default_command=command, default_parameter=LAST_WINS)
    return app(words, exit_on_error=False, print_error=False, result_action="return_value")


LONGEST_FIRST = (
    "test_chaos.py",
    "ray_jobs/test_cluster.py",
    "ray_jobs/test_stage_runs.py",
    "ray_jobs/test_stages.py",
    "ray_jobs/test_tune.py",
    "tuning/test_steered_tune.py",
    "ray_jobs/test_orders.py",
    "ray_jobs/test_sharing.py",
    "test_chaos_shared.py",
    "test_examples.py",
    "test_benchmarks.py",
    "test_wire_carries.py",
    "test_recipe_of_two_families.py",
    "test_shipped_wire.py",
)
"""Files whose tests take minutes, and share nothing with each other: the others fill the time that is left."""
LONG_FILES = (
    "test_planted_faults.py",
    "distributed/test_replicas.py",
    "distributed/test_teachers.py",
)
"""Files that come next, each as a whole: its tests share what takes long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    order = {name: place for place, name in enumerate(LONGEST_FIRST + LONG_FILES)}
    here = Path(__file__).parent
    items.sort(key=lambda item: order.get(str(item.path.relative_to(here)), len(order)))


class LongTestsApart(LoadFileScheduling):
    """Hands a process of pytest-xdist one long test at a time, and of all others a whole file."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file.removeprefix("tests/") in LONGEST_FIRST else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LongTestsApart | None:
    """Part the tests so that both processes end together."""
    by_file = config.getvalue("dist") == "loadfile"
    return LongTestsApart(config, log) if by_file else None


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _no_ray_is_left() -> Iterator[None]:
    """End the Ray that a file's tests have started: the next file's must not find it."""
    yield
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        sys.modules["ray"].shutdown()


@pytest.fixture(scope="session")
def run() -> RunConfig:
    """A small run on the toy pair."""
    return with_values(RunConfig(), SMALL)


@pytest.fixture
def wire(run: RunConfig) -> LatentWire:
    """A fresh small wire."""
    return wire_of(run)


def wire_of(run: RunConfig) -> LatentWire:
    """A fresh wire around receivers that a process loads once: most tests leave them as they are."""
    changed = run.training.gradient_checkpointing or run.training.compile
    return LatentWire(run, None if changed else frozen(run.receivers))


def shaken(wire: LatentWire) -> LatentWire:
    """Other weights than the fresh ones, so that rows differ in what is answered."""
    generator = torch.Generator().manual_seed(1)
    for parameter in wire.interlingua.parameters():
        if parameter.requires_grad:  # senders' weights are the receivers'
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return wire


HEADS: dict[str, Any] = {
    "encoder.kind": "senders",
    "encoder.pooling": "tokens",
    "encoder.tokens_per_latent": 4,
    "encoder.d_z": 64,
    "encoder.depths": [0.0, 0.5],
    "encoder.code_blocks": 1,
    "encoder.code_width": 32,
    "adapter": {"kind": "heads", "cache_share": 0.4, "unfold_blocks": 1, "unfold_width": 32},
    "features.deep_prefix": None,
}
"""Makes a small run one of a wire into retrieval heads."""


def choose_some_heads(wire: LatentWire) -> LatentWire:
    """Let a wire stand in some heads of each receiver, as a calibration would."""
    for name, lm in wire.receivers.items():
        adapter: Any = wire.interlingua.adapters[name]
        layers, heads, _ = shape_of(lm.skeleton())
        score_LH = torch.rand(layers, heads, generator=torch.Generator().manual_seed(3))
        scores = HeadScores(name, score_LH, 1)
        adapter.choose(choose(scores, len(adapter.head_J2)), score_LH)
        encoder: Any = wire.interlingua.encoder
        if wire.run.encoder.sender_heads:
            encoder.states.choose(name, adapter.head_J2)
    return wire


@functools.cache
def frozen(receivers: tuple[ReceiverConfig, ...]) -> dict[str, LocalReceiver]:
    """Receivers by their names."""
    return {receiver.name: LocalReceiver(receiver) for receiver in receivers}


@pytest.fixture(scope="session")
def table(run: RunConfig) -> pa.Table:
    """Sixteen toy rows in shard columns."""
    return shard_table(run, 16)


def shard_table(run: RunConfig, count: int, seed: int = 7, questions: int = 1) -> pa.Table:
    """Toy rows with the columns that shards have, made without Ray; ``questions`` to a context, at most 2."""
    rows = list(toy_rows(count, seed=seed, people=2, kinds=1, questions=questions))
    columns: dict[str, list] = {name: [row[name] for row in rows] for name in rows[0]}
    for name, builder in builders(run).items():
        ids = builder.tokenize(
            columns["context"], columns["question"], [golds[0] for golds in columns["answers"]]
        )
        columns |= {f"{name}_{piece}": values for piece, values in ids.items()}
    columns["sender_bytes"] = [len(context.encode()) for context in columns["context"]]
    columns["sender_hash"] = [zlib.crc32(context.encode()) for context in columns["context"]]
    return pa.table(columns)


def untimed(scores: dict) -> dict:
    """Scores, at any depth, without the times, which no two runs share."""
    return {
        key: untimed(value) if isinstance(value, dict) else value
        for key, value in scores.items()
        if not key.endswith("_ms") and key != "examples_per_s"
    }


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Directory with ``squad/`` and ``hotpotqa/`` parquet, named by ``LATENTWIRE_TEST_DATA``."""
    if not (named := os.environ.get("LATENTWIRE_TEST_DATA")):
        pytest.skip("LATENTWIRE_TEST_DATA names no directory with squad/ and hotpotqa/ parquet")
    return Path(named)


@pytest.fixture(scope="session")
def real_receivers() -> Path:
    """Directory with ``smollm2/`` and ``gemma3/``, named by ``LATENTWIRE_TEST_RECEIVERS`` (see ``make receivers``)."""
    if not (named := os.environ.get("LATENTWIRE_TEST_RECEIVERS")):
        pytest.skip("LATENTWIRE_TEST_RECEIVERS names no directory; `make receivers` makes one")
    return Path(named)
