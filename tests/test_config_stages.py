"""The stages of a run: what each is trained with, how a path reaches them, and what cannot be."""

from pathlib import Path
from typing import Any

import pytest

from latentwire.config import LossConfig, RunConfig, SweepConfig
from latentwire.config.knobs import has_property, knob_of
from latentwire.config.overrides import assigned
from latentwire.config.places import with_home
from latentwire.config.resolve import (
    ConfigError,
    check_search,
    last_stage,
    load_space,
    stages_of,
    validate,
    with_values,
)
from latentwire.config.stages import SHARED
from latentwire.tuning.columns import column_names

RECITE: dict[str, Any] = {
    "losses": {"bundle": "autoencode"},
    "training": {"max_steps": 300, "alignment_steps": 40},
}
STAGES: dict[str, Any] = {"recite": RECITE, "answers": {"training": {"encoder_lr": 5e-4}}}


def staged(**others: Any) -> RunConfig:
    return validate(RunConfig, {"stages": STAGES} | others, "here")


def test_a_stage_is_the_run_with_its_own_values_and_begins_with_the_one_before() -> None:
    run = staged(training={"max_steps": 50, "seed": 3}, losses={"first_token_ce_weight": 0.5})
    recite, answers = stages_of(run)
    assert (recite.name, answers.name) == ("recite", "answers")
    assert (recite.run.training.max_steps, answers.run.training.max_steps) == (300, 50)
    assert recite.run.training.seed == answers.run.training.seed == 3
    assert (recite.run.training.alignment_steps, answers.run.training.alignment_steps) == (40, 0)
    assert (
        recite.run.losses.reconstruction_ce_weight == 1 and answers.run.training.encoder_lr == 5e-4
    )
    assert answers.run.losses == run.losses
    assert recite.run.training.init_from is None and not recite.run.stages
    assert answers.run.training.init_from == "stage:recite" and last_stage(run) == answers.run


def test_what_a_run_begins_with_is_for_its_first_stage() -> None:
    recite, answers = stages_of(staged(training={"init_from": "/somewhere/best"}))
    assert recite.run.training.init_from == "/somewhere/best"
    assert answers.run.training.init_from == "stage:recite"


def test_a_run_without_stages_is_its_only_stage() -> None:
    run = with_values(RunConfig(), {"training.max_steps": 9})
    (only,) = stages_of(run)
    assert only.run is run and only.name == "" and last_stage(run) is run


def test_values_reach_all_stages_or_one_by_its_name() -> None:
    run = with_values(
        staged(),
        {"encoder.d_z": 32, "stages.answers.training.adapter_lr": 2e-4, "training.seed": 7},
    )
    recite, answers = stages_of(run)
    assert recite.run.encoder.d_z == answers.run.encoder.d_z == 32
    assert recite.run.training.seed == answers.run.training.seed == 7
    assert recite.run.training.adapter_lr == RunConfig().training.adapter_lr
    assert answers.run.training.adapter_lr == 2e-4 and answers.run.training.encoder_lr == 5e-4
    assert run == validate(RunConfig, run.model_dump(mode="json"), "again")
    assert knob_of("stages.answers.training.max_steps") == "training.max_steps"
    assert has_property("stages.answers.training.max_steps", "steps", "more")
    assert assigned(["stages.answers.data.config=1"]) == {"run.stages.answers.data.config": "1"}


def test_files_extend_stages_knob_by_knob_and_inputs_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.yaml").write_text("run: {stages: {a: {training: {epochs: 2}}, b: {}}}")
    nearer = "extends: base.yaml\nrun: {stages: {a: {data: {dataset: text, data_dir: texts}, losses: {bundle: pretrain}}}}"
    (tmp_path / "mine.yaml").write_text(nearer)
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    space = load_space("mine.yaml", {"run.stages.b.training.epochs": 4})
    first, second = stages_of(with_home(space).run)
    assert (first.run.training.epochs, second.run.training.epochs) == (2, 4)
    assert first.run.data.data_dir == str(tmp_path / "texts")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{a: {trainin: {}}, b: {}}", r"unknown key trainin .*run\.stages\.a\.trainin\); did you mean training"),
        ("{a: {training: {max_step: 3}}, b: {}}", r"unknown key max_step .*stages\.a.*did you mean max_steps"),
        ("{a: {}, b: {training: {max_steps: 0}}}", r"max_steps must be ≥ 1, got 0 .*: stages\.b: "),
        ("{a: {}, b: {encoder: {d_model: 65}}}", r"d_model must be a multiple .*stages\.b"),
        ("{a: {training: {train_only: [llama]}}, b: {}}", r"train_only llama keeps .*stages\.a"),
        ("{a: {receivers: []}, b: {}}", "unknown key receivers"),
        ("{a: {stages: {}}, b: {}}", "unknown key stages"),
        ("{a: {training: {num_workers: 2}}, b: {}}", "are the same in all stages of a run, got training.num_workers"),
        ("{a: {}, b: {training: {init_from: x}}}", "are the same in all stages of a run, got training.init_from"),
        ("{a: {}, a: {training: {}}}", "a key must stand once in a mapping, got a several times"),
        ("{A.b: {}}", r"string should match pattern"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_that_names_the_stage(
    text: str, rule: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"run: {{stages: {text}}}")
    with pytest.raises(ConfigError, match=rule) as error:
        load_space(file)
    assert len(str(error.value).splitlines()) == 1 or "a key must stand once" in rule


def test_a_json_file_names_a_stage_once_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"run": {"stages": {"a": {}, "a": {}}}}')
    with pytest.raises(ConfigError, match="a key must stand once in a mapping, got a several"):
        load_space(file)


@pytest.mark.parametrize("path", SHARED)
def test_what_all_stages_share_is_a_knob(path: str) -> None:
    section, name = path.split(".")
    assert name in type(getattr(RunConfig(), section)).model_fields


def space_of(search: dict[str, Any]) -> SweepConfig:
    tree = {"run": {"stages": STAGES}, "search": search}
    space = validate(SweepConfig, tree, "mine")
    check_search(space, "mine")
    return space


def test_a_search_reaches_a_stage_by_its_name() -> None:
    rate = {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}
    kind = {"type": "categorical", "choices": ["answer", "autoencode"]}
    steps = {
        "type": "int", "low": 10, "high": 20, "when": {"stages.recite.losses.bundle": "answer"},
    }  # fmt: skip
    space_of(
        {
            "stages.answers.training.encoder_lr": rate,
            "stages.recite.losses.bundle": kind,
            "stages.recite.training.max_steps": steps,
        }
    )
    for path, dim, rule in (
        ("stages.answer.training.encoder_lr", rate, "must name a stage of the run, got answer .*did you mean answers"),
        ("stages.answers.training.encoder_l", rate, r"must name a knob of run, got training.encoder_l .*did you mean"),
        ("stages.answers.training.encoder_lr", rate | {"high": 3.0}, "encoder_lr must be ≤ 1"),
        ("stages.answers.keep", kind, "must name a knob of run, got keep"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rule):
            space_of({path: dim})
    with pytest.raises(
        ConfigError, match=r"a path must name a stage of the run, got answer .*did you"
    ):
        with_values(staged(), {"stages.answer.training.encoder_lr": 1e-3})


def test_columns_name_the_stage() -> None:
    paths = ["training.encoder_lr", "stages.recite.training.encoder_lr", "stages.answers.data.seed"]
    paths.append("stages.answers.training.seed")
    assert list(column_names(paths).values()) == [
        "encoder_lr", "recite: encoder_lr", "answers: data.seed", "answers: training.seed",
    ]  # fmt: skip


def test_a_bundle_of_a_stage_takes_the_place_of_the_runs_bundle(tmp_path: Path) -> None:
    """What the run sets beside its own stays, as with a bundle that is set or searched."""
    chosen = {"a": {"losses": {"bundle": "first_k_curriculum"}}, "b": {"losses": {"k": 2}}}
    run = staged(losses={"bundle": "distil", "k": 7}, stages=chosen)
    first, second = (stage.run.losses for stage in stages_of(run))
    assert first == LossConfig(bundle="first_k_curriculum", k=7)
    assert second == LossConfig(bundle="distil", k=2)


def test_a_stages_bundle_is_not_outvoted_by_the_file_below(tmp_path: Path) -> None:
    below = "run: {stages: {a: {losses: {answer_ce_weight: 0.5, k: 3}}, b: {losses: {k: 3}}}}"
    (tmp_path / "base.yaml").write_text(below)
    stages = "{a: {losses: {bundle: autoencode}}, b: {losses: {kd_weight: 1}}}"
    nearer = f"extends: base.yaml\nrun: {{stages: {stages}}}"
    (tmp_path / "mine.yaml").write_text(nearer)
    first, second = (one.run.losses for one in stages_of(load_space(tmp_path / "mine.yaml").run))
    assert first == LossConfig(bundle="autoencode")
    assert (second.k, second.kd_weight) == (3, 1)
