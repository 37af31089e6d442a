"""Search dimensions become Optuna's, and shards follow the ones that change them."""

from pathlib import Path

import optuna
import pytest

from latentwire.config import RunConfig
from latentwire.config.knobs import paths_with
from latentwire.config.resolve import ConfigError, load_space, with_values
from latentwire.data.shards import shard_key
from latentwire.planning.variants import (
    NAMES_FILES,
    check_metrics,
    data_variants,
    largest_run,
    variant_key,
)
from latentwire.tuning.searcher import check_draws, check_searchable
from latentwire.tuning.study import distribution, draw

SPACES = Path(__file__).parents[2] / "search_spaces"
TEXT = """
search:
  encoder.latent_len: {type: int, low: 4, high: 16, step: 4}
  training.encoder_lr: {type: float, low: 1e-4, high: 1e-2, log: true}
  prompt.anchor: {type: categorical, choices: ["Answer: ", "A: "]}
"""


def test_distributions_and_variants(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(TEXT)
    space = load_space(tmp_path / "s.yaml")
    table = {path: distribution(dim) for path, dim in space.search.items()}
    assert table["encoder.latent_len"] == optuna.distributions.IntDistribution(4, 16, step=4)
    assert table["training.encoder_lr"] == optuna.distributions.FloatDistribution(
        1e-4, 1e-2, log=True
    )
    assert [run.prompt.anchor for run in data_variants(space)] == ["Answer: ", "A: "]
    assert largest_run(space).encoder.latent_len == 16


CONDITIONS = """
run: {encoder: {model: "receiver:llama"}}
search:
  encoder.lora_rank: {type: int, low: 2, high: 8, when: {encoder.kind: lm, encoder.tune: lora}}
  encoder.tune: {type: categorical, choices: [frozen, lora], when: {encoder.kind: [lm, st]}}
  encoder.kind: {type: categorical, choices: [byte, lm, st]}
"""


@pytest.mark.parametrize("file", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_spaces_can_be_searched(file: Path) -> None:
    space = load_space(file)
    check_searchable(space)
    check_draws(space)
    assert data_variants(space) and largest_run(space)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
    assert with_values(space.run, draw(trial, space.search))


BACKBONES = """
search:
  encoder.kind: {type: categorical, choices: [byte, lm]}
  encoder.model: {type: categorical, choices: ["receiver:llama", "receiver:qwen"], when: {encoder.kind: lm}}
  encoder.pooling: {type: categorical, choices: [spans, queries]}
  encoder.private_len: {type: int, low: 1, high: 3, when: {encoder.pooling: queries}}
"""


def test_files_are_made_for_what_trials_can_draw_and_the_largest_is_one_of_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "s.yaml").write_text(BACKBONES)
    space = load_space(
        tmp_path / "s.yaml", {"run.encoder.pooling": "spans", "run.encoder.model": "toy-llama"}
    )
    keys = {variant_key(run) for run in data_variants(space)}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = {
        variant_key(with_values(space.run, draw(study.ask(), space.search))) for _ in range(40)
    }
    assert drawn == keys and len(keys) == 3
    assert (largest_run(space).encoder.pooling, largest_run(space).encoder.private_len) == (
        "queries",
        3,
    )
    both = (
        BACKBONES
        + "  encoder.span_parts: {type: int, low: 2, high: 4, when: {encoder.pooling: spans}}\n"
    )
    (tmp_path / "s.yaml").write_text(both)
    space = load_space(
        tmp_path / "s.yaml", {"run.encoder.pooling": "spans", "run.encoder.model": "toy-llama"}
    )
    assert largest_run(space).encoder.span_parts == 1  # no trial has private latents and parts


OTHER = {
    "training.questions_together": True, "prompt.anchor": "A: ", "data.seed": 1, "encoder.kind": "lm", "encoder.model": "toy-qwen",
    "encoder.split": "lines", "losses.kd_temperature": 2.0, "losses.kd_top_k": 8, "losses.hidden_kd_depths": (1.0,),
    "losses.kd_teacher": "tuned", "encoder.senders": ("toy-qwen",),
}  # fmt: skip


def reading(path: str, kind: str) -> RunConfig:
    """Return a run whose encoder is of this kind, or of the one that takes the knob at ``path``."""
    values = {"encoder.kind": kind, "encoder.model": "toy-llama"}
    if path == "encoder.senders":
        values = {"encoder.kind": "senders"}
    return with_values(RunConfig(), values | {"evaluation.tuned_text": {}})


@pytest.mark.parametrize("path", OTHER)
def test_all_that_files_hang_on_tells_a_sweeps_files_apart(path: str) -> None:
    run = reading(path, "byte")
    assert variant_key(with_values(run, {path: OTHER[path]})) != variant_key(run)


@pytest.mark.parametrize("path", [path for path in OTHER if path in paths_with("shards", "value")])
def test_what_shards_hang_on_names_them_too(path: str) -> None:
    kind = "byte" if path == "encoder.kind" else "lm"  # whose ids shards hold
    run = reading(path, kind)
    assert (
        shard_key(with_values(run, {path: OTHER[path]}), "train")[0] != shard_key(run, "train")[0]
    )


def test_all_that_files_hang_on_is_tested_but_most_of_data() -> None:
    """One knob stands for those of the section ``data``; the knobs that a bundle sets stand for it."""
    tested = {path for path in NAMES_FILES if not path.startswith("data.")} - {"losses.bundle"}
    assert tested == {path for path in OTHER if not path.startswith("data.")}


def test_a_dimension_with_a_condition_is_drawn_where_it_holds(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(CONDITIONS)
    search = load_space(tmp_path / "s.yaml").search
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [draw(study.ask(), search) for _ in range(60)]
    shapes = {(v["encoder.kind"], v.get("encoder.tune"), "encoder.lora_rank" in v) for v in drawn}
    assert shapes == {
        ("byte", None, False),
        ("lm", "frozen", False),
        ("lm", "lora", True),
        ("st", "frozen", False),
        ("st", "lora", False),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("encoder.kind: [lm, st]", "encoder.kidn: lm"),
            r"got encoder\.kidn .*encoder\.tune\.when.*encoder\.kind\?",
        ),
        (
            ("encoder.kind: [lm, st]", "encoder.kind: gpt"),
            r"among the choices \['byte', 'lm', 'st'\], got 'gpt'",
        ),
        (
            ("[byte, lm, st]}", "[byte, lm, st], when: {encoder.tune: lora}}"),
            "must not go round in a circle",
        ),
    ],
)
def test_conditions_name_dimensions_and_their_choices(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    (tmp_path / "s.yaml").write_text(CONDITIONS.replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_space(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (
            "{start_with: [{encoder.latent_le: 4}]}",
            r"got encoder\.latent_le \(.*start_with\[0\].*encoder\.latent_len\?",
        ),
        ("{start_with: [{encoder.latent_len: 40}]}", r"a number from 4 to 16, got 40"),
        (
            '{start_with: [{}, {prompt.anchor: "X"}]}',
            r"among \['Answer: ', 'A: '\], got 'X' .*start_with\[1\]",
        ),
    ],
)
def test_starting_points_lie_in_the_space(tmp_path: Path, tune: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(f"{TEXT}tune: {tune}")
    with pytest.raises(ConfigError, match=message):
        load_space(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ("{metric: dev_f2}", r"tune\.metric must name a reported metric, got dev_f2"),
        ("{objectives: {bytes: min}}", r"tune\.objectives must name a reported metric, got bytes"),
        (
            "{constraints: {wire: {max: 2}}}",
            r"tune\.constraints must name a reported metric, got wire",
        ),
        ("{objectives: {dev_f1: max}}", "got dev_f1 in both"),
    ],
)
def test_trials_are_compared_by_what_they_report(tmp_path: Path, tune: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(f"tune: {tune}")
    with pytest.raises(ConfigError, match=message):
        check_metrics(load_space(tmp_path / "s.yaml"))
    (tmp_path / "s.yaml").write_text("tune: {metric: dev_em_llama, objectives: {wire_bytes: min}}")
    check_metrics(load_space(tmp_path / "s.yaml"))


def test_shards_cannot_follow_a_number(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("search: {data.samples: {type: int, low: 10, high: 20}}")
    with pytest.raises(ConfigError, match=r"search\.data\.samples must be categorical, got int"):
        data_variants(load_space(tmp_path / "s.yaml"))


@pytest.mark.parametrize("chosen", ["{metric: dev_f1}", "{metric: dev_loss, mode: max}"])
def test_texts_are_searched_by_their_loss(tmp_path: Path, chosen: str) -> None:
    texts = f"run: {{data: {{dataset: text}}, losses: {{bundle: pretrain}}}}\ntune: {chosen}"
    (tmp_path / "s.yaml").write_text(texts)
    with pytest.raises(ConfigError, match=r"tune\.metric must be dev_loss and tune\.mode min"):
        check_metrics(load_space(tmp_path / "s.yaml"))
    (tmp_path / "s.yaml").write_text(texts.replace(chosen, "{metric: dev_loss, mode: min}"))
    check_metrics(load_space(tmp_path / "s.yaml"))


def test_teachers_columns_serve_every_trial(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("""
run: {losses: {kd_weight: 0.0}}
search:
  losses.kd_weight: {type: float, low: 0.0, high: 0.5}
  losses.k: {type: int, low: 1, high: 6}
  losses.kd_temperature: {type: categorical, choices: [1.0, 2.0]}
""")
    runs = data_variants(load_space(tmp_path / "s.yaml"))
    assert [(r.losses.kd_weight, r.losses.k, r.losses.kd_temperature) for r in runs] == [
        (0.5, 6, 1.0),
        (0.5, 6, 2.0),
    ]
    (tmp_path / "s.yaml").write_text(
        "search: {losses.kd_temperature: {type: float, low: 1, high: 4}}"
    )
    with pytest.raises(
        ConfigError, match=r"search\.losses\.kd_temperature must be categorical, got float"
    ):
        data_variants(load_space(tmp_path / "s.yaml"))
