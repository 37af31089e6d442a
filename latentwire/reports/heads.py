"""Pictures of a wire into retrieval heads: which heads read, and how much a few numbers hold.

Neither Ray nor Optuna is imported here: a plain run draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from safetensors import safe_open

from latentwire.closed_form.begin import solved
from latentwire.closed_form.ranking import HeadScores
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.data import calibrations
from latentwire.storage import Place, local, write_text

HEADS, ENERGY = "heads.html", "energy.html"
"""Names of the pages beside a run's results."""


def write_pictures(run: RunConfig, export: Place, output: Place, train: Place) -> list[Place]:
    """Write pages with each receiver's heads by layer, and with the spectrum of the closed form.

    Args:
        run: the wire's configuration.
        export: the wire's directory.
        output: where the pages are written.
        train: the training shards, beside which the closed form lies.

    Returns:
        The pages; none for a wire whose messages stand in every head.
    """
    if run.adapter.kind != "heads" or run.is_reader:
        return []
    scores: list[HeadScores] = []
    chosen: dict[str, Sequence[tuple[int, int]]] = {}
    with local(export) as folder:
        for receiver in run.receivers:
            file = folder / f"adapters/{receiver.name}.safetensors"
            with safe_open(file, framework="pt") as opened:
                score_LH = opened.get_tensor("score_LH")
                heads = opened.get_tensor("head_J2").tolist()
            scores.append(HeadScores(receiver.name, score_LH, run.adapter.ranking_texts))
            chosen[receiver.name] = [(layer, head) for layer, head in heads]
    retrieval_heads(scores, chosen, output / HEADS)
    if run.closed_form is None or not calibrations.has_fresh_encoder(run):
        return [output / HEADS]
    # A closed form that was begun elsewhere, or whose files are gone, cannot be drawn.
    sources = calibrations.solution_path(run, train), calibrations.moments_path(run, train)
    if not any(path.exists() for path in sources):
        return [output / HEADS]
    start = solved(run, train)
    energy(start.energy_D, start.encoder_MK.shape[1], output / ENERGY)
    return [output / HEADS, output / ENERGY]


def retrieval_heads(
    scores: Sequence[HeadScores],
    chosen: Mapping[str, Sequence[tuple[int, int]]],
    path: Place | None = None,
) -> go.Figure:
    """Draw how much each key-value head fetches from texts: a panel per receiver.

    Args:
        scores: the receivers' scores, all under one colour bar.
        chosen: each receiver's chosen heads as layer and head, which are outlined.
        path: where to write the picture as a page that opens offline (``.html``).

    Raises :class:`~latentwire.config.resolve.ConfigError` for another kind of file.
    """
    # score_LH: [layers, key-value heads], layers from top to bottom.
    figure = make_subplots(cols=len(scores), subplot_titles=[by.receiver for by in scores])
    for column, by in enumerate(scores, start=1):
        where = {"row": 1, "col": column}
        figure.add_heatmap(z=by.score_LH.tolist(), coloraxis="coloraxis", **where)
        for layer, head in chosen.get(by.receiver, ()):
            # A cell of a heatmap is 1 wide and centred on its number.
            corners = {"x0": head - 0.5, "x1": head + 0.5, "y0": layer - 0.5, "y1": layer + 0.5}
            figure.add_shape(type="rect", line={"color": "#c2571a", "width": 2}, **corners, **where)
        figure.update_xaxes(title="key-value head", dtick=1, showgrid=False, **where)
        figure.update_yaxes(autorange="reversed", showgrid=False, **where)
    figure.update_yaxes(title="layer", row=1, col=1)
    bar = {"title": "most attention of a recital, mean", "title_side": "right"}
    return _saved(figure.update_layout(coloraxis={"colorscale": "Blues", "colorbar": bar}), path)


def energy(energy_D: torch.Tensor, codes: int, path: Place | None = None) -> go.Figure:
    """Draw the share of the gradients' energy that the best directions hold together.

    Args:
        energy_D: each direction's energy, in any order.
        codes: numbers a token that were chosen, which are marked.
        path: where to write the picture as a page that opens offline (``.html``).

    Raises :class:`~latentwire.config.resolve.ConfigError` for another kind of file, and where
    ``codes`` is more than there are directions.
    """
    if not 1 <= codes <= len(energy_D):
        raise ConfigError(
            f"numbers a token must be 1 to {len(energy_D)}, as many as there are directions, got "
            f"{codes}; choose a number between"
        )
    sorted_D = energy_D.double().sort(descending=True).values
    # percent[i]: what the best i + 1 directions hold together.
    percent = (100 * sorted_D.cumsum(0) / sorted_D.sum()).tolist()
    figure = go.Figure()
    figure.add_scatter(x=list(range(1, len(percent) + 1)), y=percent, mode="lines", name="energy")
    share = percent[codes - 1]
    figure.add_scatter(
        x=[codes],
        y=[share],
        mode="markers+text",
        marker={"size": 11},
        text=[f"{codes:,} numbers: {share:.1f} %"],
        textposition="bottom right",
        name="chosen",
    )
    figure.update_xaxes(type="log", title="numbers a token")
    figure.update_yaxes(title="share of the gradients' energy, %", rangemode="tozero")
    return _saved(figure.update_layout(showlegend=False), path)


def _saved(figure: go.Figure, path: Place | None) -> go.Figure:
    """Write a picture where it is asked for, with all that its page needs."""
    if path is None:
        return figure
    if not path.name.endswith(".html"):
        raise ConfigError(
            f"a picture is written as a page, whose name ends in .html, got {path}; rename it"
        )
    figure.update_layout(template="plotly_white")
    write_text(path, figure.to_html(config={"displayModeBar": False}, include_plotlyjs=True))
    return figure
