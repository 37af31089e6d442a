"""The page of all knobs is what the configuration says, and lists of knobs follow from their definitions."""

from pathlib import Path

import pytest

from latentwire.config import ReceiverConfig, RunConfig, SweepConfig
from latentwire.config.knobs import has_property, knobs, paths_with
from latentwire.config.resolve import with_values
from latentwire.data.shards import shard_key
from latentwire.data.teachers import teacher_path
from scripts.knobs import PAGE, page

OTHER = {"revision": "v2", "dtype": "float16", "quantization": "int8", "model": "toy-phi"}
"""Another value of each receiver's knob that teachers' columns hang on."""


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run `python scripts/knobs.py`"


def test_every_knob_says_what_it_does() -> None:
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert not [row[0] for row in rows if len(row[-1].strip(" |")) < 10]


def test_lists_are_made_of_definitions() -> None:
    assert paths_with("smaller_costs_more") == (
        "encoder.tokens_per_latent",
        "training.accumulation",
        "training.coarsening_from",
    )
    assert paths_with("teachers", "size") == (
        "losses.kd_weight",
        "losses.hidden_kd_weight",
        "losses.slot_kd_weight",
        "losses.k",
    )
    assert "run.data.data_dir" in paths_with("may_change", "repeated trial", SweepConfig)
    assert set(paths_with("shards")) >= {
        path for path, _ in knobs() if path.startswith(("data.", "prompt.anchor"))
    }


def test_a_path_may_go_on_below_its_knob() -> None:
    assert has_property("receivers.1.device", "may_change", "resumed run")
    assert has_property("training.worker_resources.GPU", "may_change", "resumed run")
    assert not has_property("receivers.1.bos", "may_change", "resumed run")
    assert not has_property("training.worker_resources.GPU", "may_change", "repeated trial")
    assert not has_property("nowhere.at.all", "shards")


@pytest.mark.parametrize("name", paths_with("teachers", "value", ReceiverConfig))
def test_teachers_hang_on_what_says_so(name: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"key": "k"}')
    run = with_values(RunConfig(), {f"receivers.1.{name}": OTHER[name]})
    before, after = (teacher_path(one, one.receivers[1], tmp_path) for one in (RunConfig(), run))
    assert before != after


@pytest.mark.parametrize(
    ("name", "value"), [("template", "plain"), ("bos", "no"), ("instruction", "Read:")]
)
def test_shards_hang_on_what_says_so(name: str, value: str) -> None:
    assert name in paths_with("shards", "value", ReceiverConfig)
    run = with_values(RunConfig(), {f"receivers.0.{name}": value})
    assert shard_key(run, "dev")[0] != shard_key(RunConfig(), "dev")[0]
