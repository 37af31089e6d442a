"""Begin a wire into retrieval heads: prefixes, chosen heads, and its linear maps in closed form."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from latentwire import exports, loading
from latentwire.closed_form.moments import Moments
from latentwire.closed_form.ranking import HeadScores, choose
from latentwire.closed_form.regression import Decoder, Start, decoder_for, energy_up_to, solve
from latentwire.config import RunConfig
from latentwire.data import calibrations
from latentwire.model import LatentWire
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.models.token_codes import TokenCodes
from latentwire.models.unfolding import Unfolding
from latentwire.storage import Place, local, text_if_there

FACTORS = (0.125, 0.25, 0.5, 1, 2, 4)
"""Multiples of a wire's numbers a token for which a closed form says how much they hold."""


def begin(
    wire: LatentWire,
    train: Place,
    fresh: Collection[str] | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Give the fresh parts of a wire what its configuration says that they begin as.

    Where the encoder is not fresh, a receiver joins: with a closed form its adapter begins as the best
    linear map from what the encoder's own linear map makes of the states.

    Args:
        wire: the wire.
        train: its training shards, beside which the calibration lies.
        fresh: files of the parts that come from nowhere else (:func:`latentwire.exports.parts`).
            None: all.
        say: takes a line about the closed form.
    """
    if fresh is None:
        fresh = exports.parts(wire)
    run, parts = wire.run, set(fresh)
    begin_prefixes(wire, run, train, _receivers(wire, "prefixes", parts))
    joining = _receivers(wire, "adapters", parts)
    if run.adapter.kind != "heads" or not joining:
        return
    for name in joining:
        choose_heads(wire, name, train, senders=exports.ENCODER in parts)
    if run.closed_form is None:
        return
    if exports.ENCODER in parts:
        # Encoder and adapters are fresh: codes and how they are read are solved for together.
        start = solved(run, train)
        say(described(start))
        fill(wire, start)
        return
    moments = Moments.load(calibrations.moments_path(run, train))
    # A receiver joins codes that are learned already.
    encoder_MK, bias_K = _codes(wire).raw_map()
    for name in joining:
        decoder = decoder_for(moments, name, encoder_MK, bias_K, run.closed_form.ridge)
        _put(wire, name, decoder)


def _receivers(wire: LatentWire, folder: str, parts: Collection[str]) -> list[str]:
    """Return the receivers whose part in a folder of an export is among some parts."""
    return [name for name in wire.receivers if f"{folder}/{name}.safetensors" in parts]


def begin_prefixes(wire: LatentWire, run: RunConfig, train: Place, names: Collection[str]) -> None:
    """Begin the prefixes as those of the tuned text readers, where the run says so.

    Args:
        wire: holds all receivers of the run, or some.
        run: the run.
        train: its training shards.
        names: receivers of the wire whose prefixes begin.
    """
    places = calibrations.readers(run, train)
    for name in places.keys() & set(names):
        if not calibrations.is_reader(places[name]):
            raise exports.CheckpointError(
                f"prefix.begin reader needs the text reader of {name}, got none at {places[name]}; make it by `latentwire "
                f"preprocess` with this configuration"
            )
        with local(places[name]) as folder:
            file = folder / f"prefixes/{name}.safetensors"
            loading.fill(file, wire.interlingua.prefixes[name])


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


def choose_heads(wire: LatentWire, receiver: str, train: Place, *, senders: bool = False) -> None:
    """Choose as many heads of a receiver as its share of the cache allows, the best ones.

    ``senders``: a sender that is this receiver gives the keys and values of the same heads, where
    the encoder asks for them.
    """
    adapter: Any = wire.interlingua.adapters[receiver]
    scores = read_ranking(wire, receiver, train)
    adapter.choose(choose(scores, len(adapter.head_J2)), scores.score_LH)
    if senders and wire.run.encoder.sender_heads:
        encoder: Any = wire.interlingua.encoder
        encoder.states.choose(receiver, adapter.head_J2)


def solved(run: RunConfig, train: Place) -> Start:
    """Return the closed form of a run for its codes; it is solved once and kept beside its sums.

    On a file system, who asks meanwhile waits for the first.
    """
    config, encoder = run.closed_form, run.encoder
    assert config is not None, "nobody asked for a closed form"
    assert encoder.tokens_per_latent is not None
    path = calibrations.solution_path(run, train)
    lock = FileLock(f"{path}.lock") if isinstance(path, Path) else nullcontext()
    # Whoever has waited for the lock finds the file there.
    with lock:
        if path.exists():
            return Start.load(path)
        start = solve(
            Moments.load(calibrations.moments_path(run, train)),
            encoder.d_z // encoder.tokens_per_latent,
            ridge=config.ridge,
            floor=config.floor,
            weights=config.weights,
            metric=config.metric,
        )
        start.save(path)
    return start


def described(start: Start) -> str:
    """Return a line about a closed form: what its codes hold, and what fewer or more would."""
    codes = start.encoder_MK.shape[1]
    sizes = sorted({max(1, round(codes * factor)) for factor in FACTORS})
    shares = zip(sizes, energy_up_to(start, sizes), strict=True)
    energy = ", ".join(f"{100 * share:.1f} % in {size}" for size, share in shares)
    left = ", ".join(f"{name} {100 * share:.1f} %" for name, share in start.unexplained.items())
    return (
        f"closed form: {codes} numbers a token; energy of the answers' gradients: {energy}; not linear in the senders' states, of "
        f"keys and values: {left}"
    )


@torch.no_grad()
def fill(wire: LatentWire, start: Start) -> None:
    """Copy a closed form into the linear maps of encoder and adapters."""
    _codes(wire).begin(start.encoder_MK, start.encoder_bias_K, start.mean_M, start.std_M)
    for name, decoder in start.decoders.items():
        _put(wire, name, decoder)


def _codes(wire: LatentWire) -> TokenCodes:
    encoder = wire.interlingua.encoder
    assert isinstance(encoder, InterlinguaEncoder) and encoder.codes is not None
    return encoder.codes


@torch.no_grad()
def _put(wire: LatentWire, receiver: str, decoder: Decoder) -> None:
    """Copy a receiver's part of a closed form into its adapter."""
    adapter = wire.interlingua.adapters[receiver]
    assert isinstance(adapter, Unfolding)
    adapter.linear.weight.copy_(decoder.decoder_KE.T)
    adapter.linear.bias.copy_(decoder.bias_E)
