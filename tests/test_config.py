"""Every bad configuration gets one clear error that quotes rule, value and place."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from latentwire.cli.flags import read_config
from latentwire.config import (
    CategoricalDimension,
    FloatDimension,
    IntDimension,
    LossConfig,
    RunConfig,
    Schedule,
    SweepConfig,
)
from latentwire.config.overrides import typed
from latentwire.config.resolve import (
    ConfigError,
    knobs,
    load_space,
    with_overrides,
    with_values,
)
from tests.conftest import flags_of


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {encoder: {latent_len: 0}}", "latent_len must be ≥ 1, got 0"),
        ("run: {encoder: {latentlen: 4}}", "did you mean latent_len?"),
        ("run: {receivers: [{name: a, modl: toy-llama}]}", "did you mean model?"),
        (
            "run: {receivers: [{name: a, model: x}, {name: a, model: y}]}",
            "receiver names must differ, got a, a",
        ),
        ("run: {receivers: []}", "receivers"),
        ("run: {losses: {answer_ce_weight: 0}}", "at least one loss weight must be > 0"),
        (
            "run: {training: {num_workers: 2, min_workers: 3}}",
            "min_workers must be at most training.num_workers, got 3 and 2",
        ),
        ("run: {encoder: {d_model: 30, heads: 4}}", "d_model must be a multiple of 2 × heads"),
        (
            "search: {encoder.latentlen: {type: int, low: 1, high: 4}}",
            "did you mean encoder.latent_len?",
        ),
        ("search: {latent_len: {type: int, low: 1, high: 4}}", "did you mean encoder.latent_len?"),
        (
            "search: {hidden: {type: int, low: 1, high: 4}}",
            "did you mean features.deep_prefix.hidden?",
        ),
        (
            "search: {receivers.0.model: {type: categorical, choices: [a]}}",
            "receivers cannot be searched, got receivers.0.model",
        ),
        (
            "search: {losses.hidden_kd_depths: {type: categorical, choices: [1]}}",
            "losses.hidden_kd_depths is none",
        ),
        (
            "search: {encoder.senders: {type: categorical, choices: [./one, ./other]}}",
            "encoder.senders is none",
        ),
        (
            "search: {features.lora: {type: categorical, choices: [null, {}]}}",
            "a choice must be a number, a text or a switch, got None; of a section its knobs can be searched",
        ),
        (
            "search: {training.encoder_lr: {type: categorical, choices: [1.0, .inf]}}",
            "a choice must be finite, got inf; leave it out (",
        ),
        (
            "search: {encoder.latent_len: {type: int, low: 0, high: 4}}",
            "latent_len must be ≥ 1, got 0",
        ),
        (
            "search: {encoder.latent_len: {type: float, low: 4, high: 16}}",
            "encoder.latent_len is no real number",
        ),
        (
            "search: {encoder.latent_len: {type: int, low: 8, high: 4}}",
            "low must be ≤ high, got 8 > 4",
        ),
        (
            "search: {encoder.kind: {type: categorical, choices: [byte, bite]}}",
            "search.encoder.kind.choices[1]",
        ),
        (
            "search: {training.encoder_lr: {type: float, low: 0.1, high: 1, log: true, step: 0.1}}",
            "log needs low > 0",
        ),
        ("tune: {trials: 0}", "trials must be ≥ 1, got 0"),
        ("tune: [1]", "tune"),
        ("[1, 2]", "must hold a mapping"),
        ("run: {a: b: c}", "must be valid YAML"),
        ("run: {data: {overflow: chunk}}", "overflow chunk needs dataset text, got toy"),
        ("run: {data: {dataset: sqaud}}", "dataset: input should be 'custom', 'hotpotqa'"),
        (
            "run: {data: {data_dir: here}}",
            "dataset toy is generated and reads no files, got data_dir here",
        ),
        (
            "run: {data: {toy_questions: 7}}",
            "toy_questions must be ≤ toy_people × toy_kinds = 6, got 7",
        ),
        (
            "run: {data: {send: prompt}, training: {questions_together: true}}",
            "needs contexts that questions share",
        ),
        ("run: {encoder: {kind: lm}}", "encoder kind lm needs a backbone, got model null"),
        (
            "run: {encoder: {kind: lm, model: 'receiver:gpt'}}",
            "must name one of the receivers llama, qwen, got receiver:gpt",
        ),
        ("run: {losses: {hidden_kd_depths: [1.5]}}", "hidden_kd_depths must lie in [0, 1]"),
        (
            "run: {losses: {reconstruction_cue: 4}}",
            "reconstruction_cue needs a stretch to stand before",
        ),
        ("run: {training: {tokens_per_latent: [2]}}", "needs messages that grow with the text"),
        (
            "search: {encoder.latent_len: {type: int, low: 1, high: 4, when: byte}}",
            "when: input should be a valid dictionary",
        ),
    ],
)
def test_bad_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_space(file)
    assert message in str(caught.value)
    assert "space.yaml" in str(caught.value)


def test_what_the_command_line_named_is_told_as_its_own(tmp_path: Path) -> None:
    file = write(tmp_path, "run: {encoder: {latent_len: 0}}")
    with pytest.raises(ConfigError) as caught:
        load_space(file, {"run.training.eval_every": 3, "run.receivers.0.modl": "x"})
    told = str(caught.value).splitlines()
    assert "space.yaml: run.encoder.latent_len" in told[1] and len(told) == 3
    assert (
        "(command line: run.receivers.0.modl)" in told[0]
        and "(command line: run.training.eval_every)" in told[2]
    )


def test_parts_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"dataset text has no questions.* got answer_ce_weight, kd_weight; set"
    ):
        with_values(RunConfig(), {"data.dataset": "text", "losses.kd_weight": 1.0})
    with pytest.raises(ConfigError, match=r"coarsening_steps needs encoder\.private_len 0, got 2"):
        with_values(RunConfig(), {"encoder.private_len": 2, "training.coarsening_steps": 5})
    with pytest.raises(ConfigError, match="slot_positions needs a fixed number of slots"):
        with_values(RunConfig(), {"adapter.slot_positions": True, "training.coarsening_steps": 5})
    with pytest.raises(ConfigError, match="span_ends sentences needs pooling spans, got queries"):
        load_space(None, {"run.encoder.span_ends": "sentences"})
    with pytest.raises(ConfigError, match="private_len needs pooling queries"):
        with_values(RunConfig(), {"encoder.private_len": 2, "encoder.tokens_per_latent": 4})


def options(*words: str) -> Any:
    return flags_of(*words)[0]


def test_seed_flags_mean_what_they_say() -> None:
    run = read_config(
        options(
            *("--llama_id meta-llama/Meta-Llama-3.1-8B-Instruct --qwen_id Qwen/Qwen2.5-7B-Instruct --samples 87599 "
              "--epochs 24 --batch_size 64 --latent_len 32 --d_z 256 --encoder_type byte --dataset squad "
              "--sequential_models --first_token_ce_weight 0.5").split(),
            "--warm_anchor_text", "Answer: ",
        )
    ).run  # fmt: skip
    assert [receiver.model for receiver in run.receivers] == [
        "meta-llama/Meta-Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-7B-Instruct",
    ]  # fmt: skip
    assert [receiver.bos for receiver in run.receivers] == ["auto", "auto"]
    assert (run.data.samples, run.data.dataset, run.training.epochs) == (87599, "squad", 24)
    assert (run.encoder.latent_len, run.encoder.d_z, run.encoder.kind) == (32, 256, "byte")
    assert run.training.sequential_models and run.losses.first_token_ce_weight == 0.5
    assert run.prompt.anchor == "Answer: "


def test_set_reaches_every_knob_and_refuses_unknown_ones() -> None:
    space = read_config(options("--set", "training.encoder_lr=3e-4", "--set", "tune.trials=3"))
    assert space.run.training.encoder_lr == 3e-4
    assert space.tune.trials == 3
    assert read_config(options("--set", "prompt.anchor=A: ")).run.prompt.anchor == "A: "
    with pytest.raises(ConfigError, match="did you mean encoder_lr"):
        read_config(options("--set", "training.encoderlr=1"))
    with pytest.raises(ConfigError, match="PATH=VALUE"):
        read_config(options("--set", "training.encoder_lr"))
    phi = read_config(options("--set", "receivers.1={name: phi, model: toy-phi}")).run.receivers
    assert [receiver.name for receiver in phi] == ["llama", "phi"]
    with pytest.raises(
        ConfigError, match=r"epochs: .*, got '\[3'"
    ):  # no YAML: the text as it stands
        read_config(options("--set", "training.epochs=[3"))


@pytest.mark.parametrize("value", ["my data #2", "2024", "set: one", "[a", "yes", "1e3", "'a'"])
def test_a_path_or_another_text_is_taken_as_it_stands(value: str) -> None:
    knobs = ["data.data_dir", "training.init_from", "tune.warm_start", "receivers.0.model"]
    knobs += ["receivers.0.revision", "stages.one.data.data_dir", "encoder.model"]
    for knob in knobs:
        assert typed(knob, value) == value
    flagged = read_config(options("--dataset=custom", f"--data_dir={value}"))
    assert flagged.run.data.data_dir == value


def test_an_optional_text_can_be_left_out_and_others_are_yaml() -> None:
    for text in ("null", "~", ""):
        assert typed("data.data_dir", text) is typed("receivers.0.revision", text) is None
        assert typed("data.shard_dir", text) == typed("receivers.0.model", text) == text
    assert (
        typed("training.cpus_per_worker", "2") == 2 and typed("data.unanswerable", "null") is None
    )
    assert typed("receivers.0.trust_remote_code", "true") is True
    assert typed("encoder.senders", "[a, b]") == ["a", "b"]
    assert typed("receivers.0.template_options", "{a: 1}") == {"a": 1}
    assert typed("tune.trials", "4") == 4 and typed("data.send", '"prompt"') == "prompt"


def test_a_path_is_taken_where_its_text_is(tmp_path: Path) -> None:
    given = {"data.data_dir": tmp_path, "data.dataset": "custom", "receivers.0.model": tmp_path}
    run = with_values(RunConfig(), given | {"data.shard_dir": tmp_path / "shards"})
    assert run.data.data_dir == run.receivers[0].model == str(tmp_path)
    assert run.data.shard_dir == str(tmp_path / "shards")


def test_with_values_checks_again() -> None:
    assert with_values(RunConfig(), {"encoder.latent_len": 3}).encoder.latent_len == 3
    with pytest.raises(ConfigError, match="latent_len must be ≥ 1, got 0"):
        with_values(RunConfig(), {"encoder.latent_len": 0})


def test_a_bundle_chosen_later_is_outvoted_by_nothing_but_what_was_set() -> None:
    base = with_values(
        RunConfig(), {"losses.bundle": "first_k_curriculum", "losses.kd_temperature": 3.0}
    )
    assert base.losses.k == 8 and base.losses.schedules
    chosen = with_values(base, {"losses.bundle": "distil", "encoder.latent_len": 3}).losses
    assert (chosen.kd_weight, chosen.first_k_ce_weight, chosen.kd_temperature) == (1.0, 0.0, 3.0)
    assert set(chosen.schedules) == {"kd_weight"}


def test_a_bundle_is_not_outvoted_by_defaults_that_were_written_out() -> None:
    """A sweep's space, its resumed copy and a manifest are written out whole."""
    whole = RunConfig.model_validate(RunConfig().model_dump(mode="json"))
    assert with_values(whole, {"losses.bundle": "distil"}).losses == LossConfig(bundle="distil")
    chosen = RunConfig.model_validate({"losses": {"bundle": "distil", "kd_weight": 0.3}})
    for again in (chosen, RunConfig.model_validate(chosen.model_dump(mode="json"))):
        assert with_values(again, {"losses.bundle": "distil"}).losses.kd_weight == 0.3
        pretrain = with_values(again, {"losses.bundle": "pretrain"}).losses
        assert pretrain == LossConfig(bundle="pretrain", kd_weight=0.3)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "receivers.2.model",
            "must be a number from 0 to 1, got 2 .receivers.2.model.; write further ones",
        ),
        ("receivers.2", "must be a number from 0 to 1, got 2"),
        ("receivers.x.model", "must be a number from 0 to 1, got x"),
        ("data.dataset.name", "a path must end at a knob, got data.dataset.name"),
    ],
)
def test_a_path_that_leads_nowhere_is_told(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_values(RunConfig.model_validate(RunConfig().model_dump()), {path: "x"})


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A section and all below it, optional and repeated ones too."""
    yield model
    for field in model.model_fields.values():
        for option in typing.get_args(field.annotation) or (field.annotation,):
            if isinstance(option, type) and issubclass(option, BaseModel):
                yield from sections(option)


def test_every_knob_has_its_docstring_and_every_number_its_bounds() -> None:
    seen = set()
    for model in {
        *sections(SweepConfig),
        Schedule,
        FloatDimension,
        IntDimension,
        CategoricalDimension,
    }:
        assert model.__doc__, model
        for name, field in model.model_fields.items():
            seen.add(f"{model.__name__}.{name}")
            assert field.description and field.description.strip().endswith((".", ")")), (
                f"{model.__name__}.{name}"
            )
            number = {int, float} & {field.annotation, *typing.get_args(field.annotation)}
            free = model in (FloatDimension, IntDimension) and name in (
                "low",
                "high",
            )  # checked against their knob's
            assert free or not number or field.metadata, f"{model.__name__}.{name} has no bounds"
    assert len(seen) > 100


def test_knobs_of_optional_sections_can_be_set_and_searched(tmp_path: Path) -> None:
    assert "features.lora.rank" in dict(knobs())
    assert with_values(RunConfig(), {"features.lora.rank": 3}).features.lora.rank == 3
    (tmp_path / "s.yaml").write_text(
        "search: {features.deep_prefix.hidden: {type: int, low: 0, high: 8}}"
    )
    with pytest.raises(
        ConfigError, match=r"hidden must be ≥ 1, got 0 .*search\.features\.deep_prefix\.hidden\.low"
    ):
        load_space(tmp_path / "s.yaml")


def test_a_bundle_laid_over_a_sweep_is_not_outvoted_by_the_one_before_it() -> None:
    sweep = SweepConfig(run=RunConfig(losses=LossConfig(bundle="distil", k=3)))
    losses = with_overrides(sweep, {"run.losses.bundle": "answer", "tune.trials": 2}).run.losses
    assert losses == LossConfig(bundle="answer", k=3)


def test_a_starting_point_of_a_whole_number_is_whole(tmp_path: Path) -> None:
    search = "search: {encoder.layers: {type: int, low: 1, high: 3}}\n"
    file = write(tmp_path, f"{search}tune: {{start_with: [{{encoder.layers: 1.5}}]}}")
    message = (
        r"a starting point must be a whole number, got 1\.5 .*start_with\[0\]\.encoder\.layers"
    )
    with pytest.raises(ConfigError, match=message):
        load_space(file)
    whole = write(tmp_path, f"{search}tune: {{start_with: [{{encoder.layers: 2.0}}]}}")
    assert load_space(whole).tune.start_with


@pytest.mark.parametrize("place", ["²", "-1", "llama", "2"])
@pytest.mark.parametrize("run", [RunConfig(), RunConfig(receivers=RunConfig().receivers)])
def test_a_receiver_is_named_by_its_place(run: RunConfig, place: str) -> None:
    rule = f"a place in a list must be a number from 0 to 1, got {place}"
    with pytest.raises(ConfigError, match=rule):
        with_values(run, {f"receivers.{place}.model": "toy-qwen"})
    changed = with_values(run, {"receivers.1.model": "toy-llama"})
    assert changed.receivers[1].model == "toy-llama"


@pytest.mark.parametrize("path", ["data.data_dir", "data.shard_dir", "training.init_from"])
def test_an_empty_address_is_not_the_current_directory(path: str) -> None:
    with pytest.raises(ConfigError, match="an address must name a directory or URI, got ''; is a"):
        with_values(RunConfig(), {"data.dataset": "custom", path: ""})
