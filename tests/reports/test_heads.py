"""Pictures of a wire into retrieval heads: the heads that read, and the directions that matter."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from latentwire import exports
from latentwire.closed_form import gather
from latentwire.closed_form.ranking import HeadScores, choose
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import calibrations
from latentwire.reports import heads
from tests.conftest import HEADS, choose_some_heads, shard_table, wire_of


@pytest.fixture
def scores() -> list[HeadScores]:
    torch.manual_seed(0)
    return [
        HeadScores("llama", torch.rand(6, 3), 10),
        HeadScores("qwen", torch.rand(4, 2), 10),
    ]


def test_each_receiver_has_a_panel_and_each_chosen_head_an_outline(
    scores: list[HeadScores], tmp_path: Path
) -> None:
    chosen = {"llama": choose(scores[0], 5), "qwen": choose(scores[1], 2)}
    figure = heads.retrieval_heads(scores, chosen, tmp_path / "made" / "heads.html")
    assert [title.text for title in figure.layout.annotations] == ["llama", "qwen"]
    for by, drawn in zip(scores, figure.data, strict=True):
        assert torch.equal(torch.tensor(drawn.z), by.score_LH)
        assert drawn.coloraxis == "coloraxis"  # one colour bar for all
    outlined: dict[str, list[tuple[float, float]]] = {"x": [], "x2": []}
    for box in figure.layout.shapes:
        assert (box.x1 - box.x0, box.y1 - box.y0) == (1, 1)
        outlined[box.xref].append((box.y0 + 0.5, box.x0 + 0.5))
    assert outlined == {"x": list(chosen["llama"]), "x2": list(chosen["qwen"])}
    page = (tmp_path / "made" / "heads.html").read_text()
    assert "plotly.js v" in page and '<script src="http' not in page  # it opens offline
    assert list((tmp_path / "made").iterdir()) == [tmp_path / "made" / "heads.html"]


def test_a_receiver_without_chosen_heads_has_no_outlines(scores: list[HeadScores]) -> None:
    figure = heads.retrieval_heads(scores[:1], {})
    assert len(figure.data) == 1 and not figure.layout.shapes


def test_energy_adds_up_from_the_greatest_and_the_chosen_number_is_marked(tmp_path: Path) -> None:
    figure = heads.energy(torch.tensor([1.0, 6.0, 2.0, 1.0]), 2, tmp_path / "energy.html")
    curve, marked = figure.data
    assert list(curve.x) == [1, 2, 3, 4]
    assert list(curve.y) == pytest.approx([60, 80, 90, 100])
    assert list(marked.x) == [2] and list(marked.y) == pytest.approx([80])
    assert marked.text[0] == "2 numbers: 80.0 %" and figure.layout.xaxis.type == "log"
    assert (tmp_path / "energy.html").stat().st_size > 1000
    for codes in (0, 5):
        with pytest.raises(ConfigError, match=f"1 to 4, .* got {codes}; choose"):
            heads.energy(torch.ones(4), codes)


def test_a_picture_that_is_no_page_is_refused(scores: list[HeadScores], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.html, got .*heads\.png; rename it"):
        heads.retrieval_heads(scores, {}, tmp_path / "heads.png")
    assert not list(tmp_path.iterdir())


def test_a_runs_pages_show_the_heads_of_its_export_and_its_spectrum(
    run: RunConfig, tmp_path: Path
) -> None:
    wire = choose_some_heads(wire_of(with_values(run, HEADS | {"closed_form": {}})))
    exports.save(tmp_path / "best", wire, {}, {"receivers": wire.fingerprints()})
    train = tmp_path / "train"
    train.mkdir()
    (train / "manifest.json").write_text('{"key": "some", "rows": 4, "files": []}')
    made = heads.write_pictures(wire.run, tmp_path / "best", tmp_path, train)
    assert made == [tmp_path / heads.HEADS]  # the sums are gone
    table = shard_table(wire.run, 32)
    ids = wire.interlingua.encoder.token_ids(table["context"].to_pylist())  # type: ignore[operator]
    rows = table.append_column("encoder_ids", pa.array(ids))
    moments = gather.empty_moments(wire)
    gather.add_tokens(moments, wire, rows)
    gather.add_gradients(moments, wire, rows)
    moments.save(calibrations.moments_path(wire.run, train))
    made = heads.write_pictures(wire.run, tmp_path / "best", tmp_path, train)
    assert made == [tmp_path / heads.HEADS, tmp_path / heads.ENERGY]
    text = made[0].read_text()
    chosen = sum(len(adapter.head_J2) for adapter in wire.interlingua.adapters.values())  # type: ignore[misc, arg-type]
    assert text.count('"type":"rect"') >= chosen > 2
    assert "16 numbers: " in made[1].read_text()


def test_wires_in_every_head_have_none(run: RunConfig, tmp_path: Path) -> None:
    assert heads.write_pictures(run, tmp_path / "best", tmp_path, tmp_path / "train") == []
    assert list(tmp_path.iterdir()) == []


def test_a_plain_run_needs_neither_ray_nor_optuna() -> None:
    code = "import sys; sys.modules.update(ray=None, optuna=None); import latentwire.cli.train"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
