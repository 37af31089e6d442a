"""Ablations: which runs a variants file asks for, and what their scores become."""

import json
import runpy
from pathlib import Path

import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from tests.conftest import flags_of

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "ablate.py"))


def configs(folder: Path, *words: str, names: list[str] | None = None) -> dict[str, RunConfig]:
    (folder / "variants.yaml").write_text("recipe: {}\nnarrow: {encoder.d_z: 8}\n")
    flags, _ = flags_of(*words)
    return SCRIPT["runs"](flags, folder / "variants.yaml", names, [0, 3])


def test_variants_are_laid_over_the_space_and_its_flags(tmp_path: Path) -> None:
    wanted = configs(tmp_path, "--d_z", "32")
    assert list(wanted) == ["recipe-0", "recipe-3", "narrow-0", "narrow-3"]
    assert [run.encoder.d_z for run in wanted.values()] == [32, 32, 8, 8]
    assert [run.training.seed for run in wanted.values()] == [0, 3, 0, 3]
    assert list(configs(tmp_path, names=["narrow"])) == ["narrow-0", "narrow-3"]
    with pytest.raises(
        ConfigError, match=r"--names takes variants of .* \(recipe, narrow\), got wide"
    ):
        configs(tmp_path, names=["wide"])
    with pytest.raises(ConfigError, match="from --seeds, got --seed 3; say --seeds 3"):
        configs(tmp_path, "--seed", "3")


def test_answers_are_told_as_exact_match_and_recitals_in_nats(tmp_path: Path) -> None:
    for text, told in (
        (False, "| narrow | 25.0 (20.0–30.0) |"),
        (True, "| narrow | 0.25 (0.20–0.30) |"),
    ):
        dataset = (
            ["--dataset", "text", "--data_dir", str(tmp_path), "--set", "losses.bundle=pretrain"]
            if text
            else []
        )
        wanted = configs(tmp_path, *dataset, names=["narrow"])
        for key, score in zip(wanted, (0.2, 0.3), strict=True):
            (tmp_path / key).mkdir(exist_ok=True)
            both = {name: {"em": score, "nll": score} for name in ("llama", "qwen", "mean")}
            (tmp_path / key / "scores.json").write_text(json.dumps({"latent": both}))
        assert told in SCRIPT["table"](tmp_path, wanted)
