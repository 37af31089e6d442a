"""Begin a wire into retrieval heads: prefixes, chosen heads, and its linear maps in closed form."""

from __future__ import annotations

from typing import Any

import torch

from latentwire import exports
from latentwire.closed_form.moments import Moments
from latentwire.closed_form.ranking import HeadScores, choose
from latentwire.closed_form.regression import Start, solve
from latentwire.config import RunConfig
from latentwire.data import calibrations
from latentwire.model import LatentWire
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.models.token_codes import TokenCodes
from latentwire.models.unfolding import Unfolding
from latentwire.storage import Place, local, text_if_there


def begin(wire: LatentWire, train: Place) -> None:
    """Give a fresh wire what its configuration says that it begins as.

    Args:
        wire: a wire, as it was drawn.
        train: its training shards, beside which the calibration lies.
    """
    begin_prefixes(wire, wire.run, train)
    if wire.run.adapter.kind != "heads":
        return
    for name in wire.receivers:
        choose_heads(wire, name, train)
    if wire.run.closed_form is not None:
        fill(wire, solved(wire, train))


def begin_prefixes(wire: LatentWire, run: RunConfig, train: Place) -> None:
    """Begin the prefixes as those of the tuned text readers, where the run says so.

    Args:
        wire: holds all receivers of the run, or some.
        run: the run.
        train: its training shards.
    """
    places = calibrations.readers(run, train)
    for name in places.keys() & wire.receivers.keys():
        with local(places[name]) as folder:
            file = folder / f"prefixes/{name}.safetensors"
            exports.fill(file, wire.interlingua.prefixes[name])


def read_ranking(wire: LatentWire, receiver: str, train: Place) -> HeadScores:
    """Read the ranking of a receiver's heads."""
    path = calibrations.ranking_path(wire.run, wire.receivers[receiver].config, train)
    text = text_if_there(path)
    if text is None:
        raise exports.CheckpointError(
            f"adapter.kind heads needs a ranking of the heads of {receiver}, got none at {path}; make it by "
            f"`latentwire preprocess` with this configuration"
        )
    return HeadScores.from_json(text)


def choose_heads(wire: LatentWire, receiver: str, train: Place) -> None:
    """Choose as many heads of a receiver as its share of the cache allows, the best ones."""
    adapter: Any = wire.interlingua.adapters[receiver]
    scores = read_ranking(wire, receiver, train)
    adapter.choose(choose(scores, len(adapter.head_J2)), scores.score_LH)


def solved(wire: LatentWire, train: Place) -> Start:
    """Solve the closed form for a wire's codes."""
    config = wire.run.closed_form
    assert config is not None, "nobody asked for a closed form"
    encoder = wire.run.encoder
    assert encoder.tokens_per_latent is not None
    return solve(
        Moments.load(calibrations.moments_path(wire.run, train)),
        encoder.d_z // encoder.tokens_per_latent,
        ridge=config.ridge,
        floor=config.floor,
        weights=config.weights,
        metric=config.metric,
    )


@torch.no_grad()
def fill(wire: LatentWire, start: Start) -> None:
    """Copy a closed form into the linear maps of encoder and adapters."""
    encoder = wire.interlingua.encoder
    assert isinstance(encoder, InterlinguaEncoder) and isinstance(encoder.codes, TokenCodes)
    encoder.codes.linear.weight.copy_(start.encoder_MK.T)
    encoder.codes.linear.bias.copy_(start.encoder_bias_K)
    for name, decoder in start.decoders.items():
        adapter = wire.interlingua.adapters[name]
        assert isinstance(adapter, Unfolding)
        adapter.linear.weight.copy_(decoder.decoder_KE.T)
        adapter.linear.bias.copy_(decoder.bias_E)
