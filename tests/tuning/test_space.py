"""Search dimensions become Optuna's, and shards follow the ones that change them."""

from pathlib import Path

import optuna
import pytest

from latentwire.config.resolve import ConfigError, load_space
from latentwire.tuning.space import check_metric, data_variants, distributions, largest_run

TEXT = """
search:
  encoder.latent_len: {type: int, low: 4, high: 16, step: 4}
  training.encoder_lr: {type: float, low: 1e-4, high: 1e-2, log: true}
  prompt.anchor: {type: categorical, choices: ["Answer: ", "A: "]}
"""


def test_distributions_and_variants(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(TEXT)
    space = load_space(tmp_path / "s.yaml")
    table = distributions(space)
    assert table["encoder.latent_len"] == optuna.distributions.IntDistribution(4, 16, step=4)
    assert table["training.encoder_lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    assert [run.prompt.anchor for run in data_variants(space)] == ["Answer: ", "A: "]
    assert largest_run(space).encoder.latent_len == 16


def test_shards_cannot_follow_a_number(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("search: {data.samples: {type: int, low: 10, high: 20}}")
    with pytest.raises(ConfigError, match=r"search\.data\.samples must be categorical, got int"):
        data_variants(load_space(tmp_path / "s.yaml"))


@pytest.mark.parametrize("chosen", ["{metric: dev_f1}", "{metric: dev_loss, mode: max}"])
def test_texts_are_searched_by_their_loss(tmp_path: Path, chosen: str) -> None:
    texts = f"run: {{data: {{dataset: text}}, losses: {{bundle: pretrain}}}}\ntune: {chosen}"
    (tmp_path / "s.yaml").write_text(texts)
    with pytest.raises(ConfigError, match=r"tune\.metric must be dev_loss and tune\.mode min"):
        check_metric(load_space(tmp_path / "s.yaml"))
    (tmp_path / "s.yaml").write_text(texts.replace(chosen, "{metric: dev_loss, mode: min}"))
    check_metric(load_space(tmp_path / "s.yaml"))


def test_teachers_columns_serve_every_trial(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("""
run: {losses: {kd_weight: 0.0}}
search:
  losses.kd_weight: {type: float, low: 0.0, high: 0.5}
  losses.k: {type: int, low: 1, high: 6}
  losses.kd_temperature: {type: categorical, choices: [1.0, 2.0]}
""")
    runs = data_variants(load_space(tmp_path / "s.yaml"))
    assert [(r.losses.kd_weight, r.losses.k, r.losses.kd_temperature) for r in runs] == [(0.5, 6, 1.0), (0.5, 6, 2.0)]
    (tmp_path / "s.yaml").write_text("search: {losses.kd_temperature: {type: float, low: 1, high: 4}}")
    with pytest.raises(ConfigError, match=r"search\.losses\.kd_temperature must be categorical, got float"):
        data_variants(load_space(tmp_path / "s.yaml"))
