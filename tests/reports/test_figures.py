"""Pictures of what a wire hands over: the heads that read, and the directions that matter."""

from pathlib import Path

import pytest
import torch

from latentwire.closed_form.ranking import HeadScores, choose
from latentwire.config.resolve import ConfigError
from latentwire.reports import figures


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
    figure = figures.retrieval_heads(scores, chosen, tmp_path / "made" / "heads.html")
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
    figure = figures.retrieval_heads(scores[:1], {})
    assert len(figure.data) == 1 and not figure.layout.shapes


def test_energy_adds_up_from_the_greatest_and_the_chosen_number_is_marked(tmp_path: Path) -> None:
    figure = figures.energy(torch.tensor([1.0, 6.0, 2.0, 1.0]), 2, tmp_path / "energy.html")
    curve, marked = figure.data
    assert list(curve.x) == [1, 2, 3, 4]
    assert list(curve.y) == pytest.approx([60, 80, 90, 100])
    assert list(marked.x) == [2] and list(marked.y) == pytest.approx([80])
    assert marked.text[0] == "2 numbers: 80.0 %" and figure.layout.xaxis.type == "log"
    assert (tmp_path / "energy.html").stat().st_size > 1000
    for codes in (0, 5):
        with pytest.raises(ConfigError, match=f"1 to 4, .* got {codes}; choose"):
            figures.energy(torch.ones(4), codes)


def test_a_picture_that_is_no_page_is_refused(scores: list[HeadScores], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.html, got .*heads\.png; rename it"):
        figures.retrieval_heads(scores, {}, tmp_path / "heads.png")
    assert not list(tmp_path.iterdir())
