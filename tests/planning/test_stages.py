"""Each different earlier stage of a sweep is counted once, and those that are there are not made again."""

from pathlib import Path
from typing import Any

import pytest

from latentwire.config import RunConfig, SweepConfig
from latentwire.config.resolve import ConfigError, stages_of, validate, with_values
from latentwire.data.stages import placed
from latentwire.planning.forecast import forecast
from latentwire.planning.planner import PlanError, plan
from latentwire.planning.resolved import resolve
from latentwire.planning.sharing import obstacles
from latentwire.planning.stages import forecast_stages
from latentwire.planning.variants import check_metrics, most_steps, variant_key

RATE = {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}
TWO = {"type": "categorical", "choices": [2e-3, 4e-3]}
STAGES: dict[str, Any] = {
    "recite": {"losses": {"bundle": "autoencode"}, "training": {"max_steps": 30}},
    "answers": {"training": {"encoder_lr": 1e-3}},
}


def space(folder: Path, search: dict[str, Any], **sections: Any) -> SweepConfig:
    run = {
        "data": {"shard_dir": str(folder / "shards"), "samples": 640},
        "training": {"batch_size": 32, "epochs": 2},
        "stages": STAGES,
    }
    tree = {"run": run, "search": search, "tune": {"trials": 8}} | sections
    return validate(SweepConfig, tree, "here")


def counts(space: SweepConfig, runs: int = 8) -> list[tuple[int, bool, int]]:
    return [(one.count, one.exact, one.there) for one in forecast_stages(resolve(space), runs)]


def made(run: RunConfig, number: int = 0) -> None:
    """Let a stage of a run be there."""
    path = placed(run)[number].path
    assert isinstance(path, Path)
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")


def test_eight_trials_of_a_last_stage_share_one_first_stage(tmp_path: Path) -> None:
    one = space(tmp_path, {"stages.answers.training.encoder_lr": RATE})
    assert counts(one) == [(1, True, 0)]
    made(one.run)
    assert counts(one) == [(1, True, 1)]


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"stages.recite.training.encoder_lr": TWO}, (2, True, 0)),
        ({"training.encoder_lr": TWO}, (2, True, 0)),
        ({"stages.recite.training.max_steps": {"type": "categorical", "choices": [30]}}, (1, True, 0)),
        ({"training.max_steps": {"type": "int", "low": 5, "high": 9}}, (1, True, 0)),  # recite has its own
        ({"training.adapter_lr": RATE}, (8, False, 0)),
        ({"stages.recite.training.encoder_lr": RATE}, (8, False, 0)),
        ({"training.log_every": {"type": "categorical", "choices": [5, 10]}}, (1, True, 0)),
        (
            {
                "stages.recite.training.encoder_lr": TWO | {"when": {"stages.recite.losses.bundle": "answer"}},
                "stages.recite.losses.bundle": {"type": "categorical", "choices": ["answer", "autoencode"]},
            },
            (3, True, 0),
        ),
        (
            {
                "stages.recite.training.encoder_lr": TWO | {"when": {"stages.answers.losses.bundle": "answer"}},
                "stages.answers.losses.bundle": {"type": "categorical", "choices": ["answer", "autoencode"]},
            },
            (3, True, 0),
        ),
    ],
)  # fmt: skip
def test_what_trials_differ_in_decides_how_many_there_are(
    tmp_path: Path, search: dict[str, Any], expected: tuple[int, bool, int]
) -> None:
    assert counts(space(tmp_path, search)) == [expected]


def test_a_third_stage_is_counted_by_itself_and_by_those_before_it(tmp_path: Path) -> None:
    search = {"stages.answers.training.encoder_lr": TWO}
    three = space(tmp_path, search)
    three = three.model_copy(update={"run": with_values(three.run, {"stages.more": {}})})
    assert counts(three) == [(1, True, 0), (2, True, 0)]
    search = {"stages.recite.training.encoder_lr": TWO}
    assert counts(three.model_copy(update={"search": space(tmp_path, search).search})) == [
        (2, True, 0), (2, True, 0),
    ]  # fmt: skip


def test_the_forecast_says_what_stages_take_once(tmp_path: Path) -> None:
    one = space(tmp_path, {"stages.answers.training.adapter_lr": RATE})
    planned = plan(one, {"CPU": 2}, 64e9)
    estimate = forecast(one, planned, tmp_path / "sweep")
    text = "\n".join(estimate.lines(planned, 1e11))
    assert "stage recite: 1 for all trials together, 0 there, at most 30 steps each" in text
    assert "steps: at most 40 in a run, 320 in all" in text
    assert "earlier stages that are to be made are in it" in text
    assert estimate.stages_flop and estimate.flop_per_run
    # About 30 steps beside 8 trials of 40: the stage is in the hours once, and not eight times.
    assert 0.3 < estimate.stages_flop / estimate.flop_per_run < 1
    made(one.run)
    again = forecast(one, planned, tmp_path / "sweep")
    assert (
        again.stages_flop == 0 and again.disk_bytes == estimate.disk_bytes - again.checkpoint_bytes
    )
    plain = one.model_copy(update={"run": stages_of(one.run)[0].run, "search": {}})
    assert "stage" not in "\n".join(
        forecast(plain, planned, tmp_path / "sweep").lines(planned, 1e11)
    )


def test_fresh_seeds_need_stages_of_their_own_unless_these_have_one(tmp_path: Path) -> None:
    finals = {"tune": {"trials": 4, "finalists": 1, "final_seeds": 2}}
    one = space(tmp_path, {"stages.answers.training.encoder_lr": RATE}, **finals)
    assert counts(one, 6) == [(3, True, 0)]
    pinned = with_values(one.run, {"stages.recite.training.seed": 0})
    assert counts(one.model_copy(update={"run": pinned}), 6) == [(1, True, 0)]
    check_metrics(one)
    last = with_values(one.run, {"stages.answers.training.seed": 0})
    with pytest.raises(
        ConfigError, match=r"its last stage answers does not have, got training.seed 0"
    ):
        check_metrics(one.model_copy(update={"run": last}))


def test_the_plan_holds_the_largest_stage(tmp_path: Path) -> None:
    small = space(tmp_path, {})
    wide = with_values(small.run, {"stages.recite.training.batch_size": 256})
    plans = [
        plan(small.model_copy(update={"run": run}), {"CPU": 8}, 64e9) for run in (small.run, wide)
    ]
    assert plans[1].bytes_per_worker > plans[0].bytes_per_worker
    assert plans[0].max_concurrent_trials == 8 > plans[1].max_concurrent_trials
    odd = with_values(
        small.run, {"training.num_workers": 2, "stages.recite.training.batch_size": 9}
    )
    with pytest.raises(
        PlanError, match="batch_size must be a multiple of num_workers, got 9 and 2"
    ):
        plan(small.model_copy(update={"run": odd}), {"CPU": 8}, 64e9)


def test_every_stage_has_its_files_and_the_last_ones_rows_are_scored(tmp_path: Path) -> None:
    search = {"stages.recite.data.toy_people": {"type": "categorical", "choices": [2, 3]}}
    sweep = resolve(space(tmp_path, search))
    assert [(variant.stage, variant.run.data.toy_people) for variant in sweep.variants] == [
        (0, 2), (1, 3), (0, 3), (1, 3),
    ]  # fmt: skip
    assert [set(variant.shards) for variant in sweep.variants[:2]] == [
        {"train", "dev"}, {"train", "dev", "validation"},
    ]  # fmt: skip
    keys = {variant.key for variant in sweep.variants}
    drawn = with_values(sweep.space.run, {"stages.recite.data.toy_people": 2})
    assert all(variant_key(stage.run) in keys for stage in stages_of(drawn))
    assert most_steps(sweep.space, 640, {}) == 40


def test_what_stands_against_sharing_in_any_stage_does(tmp_path: Path) -> None:
    one = space(tmp_path, {})
    assert obstacles(one) == []
    for values, why in (
        ({"stages.recite.training.log_gradient_norms": True}, "a backward pass per term"),
        ({"stages.answers.features.lora": {}}, "features.lora acts on"),
        ({"stages.recite.training.gradient_checkpointing": True}, "differs between stages"),
    ):
        reasons = obstacles(one.model_copy(update={"run": with_values(one.run, values)}))
        assert any(why in reason for reason in reasons), (values, reasons)
