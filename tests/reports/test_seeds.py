"""Seeds of one wire stand in one table only where their scores may be compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from latentwire.cli import main
from latentwire.config.resolve import ConfigError
from latentwire.reports.seeds import read, seeds_table


def row(em: float, nll: float, **further: float) -> dict[str, float]:
    return {"em": em, "f1": em / 2, "nll": nll, **further}


def evaluated(output: Path, seed: int, scores: dict[str, Any], protocol: str = "abc") -> Path:
    """Write what ``latentwire evaluate --output`` leaves, as far as it is read here."""
    output.mkdir()
    (output / "scores.json").write_text(json.dumps(scores))
    (output / "details.json").write_text(json.dumps({"protocol": protocol, "seed": seed}))
    return output


def trained(output: Path, seed: int, scores: dict[str, Any], protocol: str = "abc") -> Path:
    """Write what ``latentwire train`` leaves, as far as it is read here."""
    best = output / "best"
    best.mkdir(parents=True)
    pins = {"validation": {"evaluation_pin": protocol}}
    (best / "manifest.json").write_text(json.dumps({"pins": pins}))
    (best / "config.json").write_text(json.dumps({"training": {"seed": seed}}))
    (output / "results.json").write_text(json.dumps({"validation": scores}))
    return output


def of_latents(em: float, nll: float, **further: float) -> dict[str, Any]:
    return {"latent": {"llama": row(em, nll, **further), "mean": row(em, nll, **further)}}


def test_a_score_is_the_mean_over_seeds_with_the_least_and_the_greatest(tmp_path: Path) -> None:
    outputs = [
        evaluated(tmp_path / "a", 4, of_latents(0.2, 1.5, match=0.5)),
        trained(tmp_path / "b", 0, of_latents(0.5, 1.0)),
        trained(tmp_path / "c", 9, of_latents(0.2, 2.0, match=0.25)),
    ]
    title, header, body = seeds_table([read(output) for output in outputs])
    assert title == "seeds 4, 0, 9: mean (least to greatest)"
    assert header == ["the receiver reads", "receiver", "EM", "F1", "NLL"]  # b has no match
    assert body == [
        ["latents", "llama", "30.0 (20.0 to 50.0)", "15.0 (10.0 to 25.0)", "1.50 (1.00 to 2.00)"]
    ]


def test_a_row_that_a_seed_lacks_is_named_and_left_out(tmp_path: Path) -> None:
    more = of_latents(0.2, 1.5) | {"text tuned": {"llama": row(0.5, 0.7)}}
    seeds = [
        read(evaluated(tmp_path / "a", 0, of_latents(0.2, 1.5))),
        read(evaluated(tmp_path / "b", 1, more)),
    ]
    title, _, body = seeds_table(seeds)
    assert title.endswith("; not scored for all of them: full text, tuned") and len(body) == 1


def test_scores_of_another_protocol_are_refused_with_both_hashes(tmp_path: Path) -> None:
    evaluated(tmp_path / "a", 0, of_latents(0.2, 1.5))
    trained(tmp_path / "b", 1, of_latents(0.2, 1.5), protocol="def")
    with pytest.raises(ConfigError, match=r"one protocol .*/a abc, .*/b def; score them again"):
        seeds_table([read(tmp_path / "a"), read(tmp_path / "b")])


def test_a_seed_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    output = evaluated(tmp_path / "a", 3, of_latents(0.2, 1.5))
    with pytest.raises(ConfigError, match=r"seeds must differ, got .*/a seed 3, .*/a seed 3"):
        seeds_table([read(output), read(output)])


def test_scores_that_name_no_protocol_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="a seed's scores must lie in the directory of a finished"
    ):
        read(tmp_path)
    older = evaluated(tmp_path / "older", 0, of_latents(0.2, 1.5))
    (older / "details.json").write_text("{}")
    with pytest.raises(ConfigError, match="older holds none; score the wire again"):
        read(older)


def test_the_command_takes_as_many_directories_as_there_are_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = [
        str(evaluated(tmp_path / name, seed, of_latents(0.1 * seed, 1.0)))
        for seed, name in enumerate(("a", "b", "c"))
    ]
    assert main(["report", *outputs]) == 0
    printed = capsys.readouterr().out
    assert (
        "10.0 (0.0 to 20.0)" in printed
        and "no retention: no row of the table reads the full" in printed
    )
    trained(tmp_path / "d", 7, of_latents(0.2, 1.5), protocol="def")
    assert main(["report", *outputs, str(tmp_path / "d")]) == 2
    assert "seeds must be scored by one protocol" in capsys.readouterr().err
