"""Command-line flags: each one is a name for a knob of the configuration, and nothing else."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from latentwire import exports
from latentwire.config import SweepConfig
from latentwire.config.overrides import assigned, typed
from latentwire.config.places import at_home, sought
from latentwire.config.resolve import ConfigError, knobs, load_space
from latentwire.storage import Place, StorageError, place

FLAGS: dict[str, str] = {
    "samples": "data.samples",
    "dataset": "data.dataset",
    "data_dir": "data.data_dir",
    "epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "batch_size": "training.batch_size",
    "sequential_models": "training.sequential_models",
    "latent_len": "encoder.latent_len",
    "d_z": "encoder.d_z",
    "encoder_type": "encoder.kind",
    "warm_anchor_text": "prompt.anchor",
    "first_token_ce_weight": "losses.first_token_ce_weight",
    "llama_id": "receivers.0.model",
    "qwen_id": "receivers.1.model",
    "num_workers": "training.num_workers",
    "seed": "training.seed",
}
"""Flag → dotted path into ``run``. Every other knob is reached by ``--set path=value``."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of :data:`FLAGS`, ``--set`` and ``--space``; values are checked by the configuration, not here."""
    docs = {path: field.description for path, field in knobs()}
    for flag, path in FLAGS.items():
        text = docs.get(path) or f"Hub id or local directory of the receiver {flag.removesuffix('_id')}."
        text = text.replace("``", "").replace("\n", " ").replace("%", "%%")
        if flag == "sequential_models":
            parser.add_argument(f"--{flag}", action="store_const", const=True, help=text)
        else:
            parser.add_argument(f"--{flag}", metavar="VALUE", help=text)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
                        help="any other knob of run or tune, e.g. --set training.encoder_lr=3e-4 --set tune.trials=4")  # fmt: skip
    parser.add_argument(
        "--space", type=input_path, help="space file (search_spaces/*.yaml); its `run:` is what flags override"
    )


def add_start(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run that begins with a trained wire."""
    parser.add_argument("--from", type=input_path, dest="base",
                        help="export or checkpoint whose configuration and weights the run begins with")  # fmt: skip
    parser.add_argument("--add_receiver", metavar="NAME=MODEL", help="a further receiver (Hub id or directory) for the wire "
                        "of --from: its adapter alone is trained, all else stays as it is")  # fmt: skip


def read_space(options: argparse.Namespace, default: Path | None = None) -> SweepConfig:
    """The space file with the flags laid over it; with ``--from``, that wire's configuration instead of one.

    Raises :class:`~latentwire.config.resolve.ConfigError`, and :class:`~latentwire.exports.CheckpointError` for ``--from``.
    """
    if getattr(options, "base", None) or getattr(options, "add_receiver", None):
        tree, overrides = begun_with(options), _overrides(options, True)
        if "run.losses.bundle" in overrides:  # it would be outvoted by the weights that the wire was trained with
            tree.pop("losses", None)
        return load_space(None, {"run": tree} | overrides)
    return load_space(options.space or default, _overrides(options, options.space is not None or default is not None))


def begun_with(options: argparse.Namespace) -> dict[str, Any]:
    """The configuration of ``--from``, and one more receiver where ``--add_receiver`` names it, whose part alone is trained.

    The new one's messages shorten as they did for the others: the encoder, which stays as it is, has made such finer ones before.
    Without a new one every part learns, and what could be learned only with alignment and coarsening is there already: both are off.
    Flags may say otherwise.
    """
    name, sign, model = (options.add_receiver or "").partition("=")
    if options.base is None or options.space is not None or (options.add_receiver and not sign):
        raise ConfigError(
            f"--from takes an export, whose configuration it keeps, and no --space; --add_receiver takes NAME=MODEL beside it; "
            f"got --from {options.base}, --space {options.space}, --add_receiver {options.add_receiver}"
        )
    exports.read_manifest(options.base)
    run = exports.read_run(options.base)
    tree = run.model_dump(mode="json", exclude_unset=True)
    tree["training"] = tree.get("training", {}) | {"init_from": str(options.base)}
    if not options.add_receiver:
        tree["training"] |= {"alignment_steps": 0, "coarsening_steps": 0, "train_only": []}
        return tree
    if run.encoder.private_len:
        raise ConfigError(
            f"a receiver can join a wire without private latents, got encoder.private_len {run.encoder.private_len}: its "
            f"encoder would have to learn more of them; train a wire with private_len 0"
        )
    tree["receivers"] = [receiver.model_dump(mode="json") for receiver in run.receivers] + [
        {"name": name, "model": model}
    ]
    tree["training"] |= {"train_only": [name], "receivers_per_step": "all"}
    return tree


def _overrides(options: argparse.Namespace, from_file: bool) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for flag, path in FLAGS.items():
        if (value := getattr(options, flag)) is not None:
            overrides[f"run.{path}"] = value if isinstance(value, bool) else typed(path, value)
    overrides |= assigned(options.assignments)
    # A receiver that the flags replace is not the toy any more: what the default said about the toy goes with it.
    for index, flag in enumerate(("llama_id", "qwen_id")):
        if getattr(options, flag) is not None and not from_file:
            overrides.setdefault(f"run.receivers.{index}.bos", "auto")
    return overrides


def refuse_flags(options: argparse.Namespace, kept: str) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for flags that a command would pass over: ``kept`` stays as it was."""
    given = [f"--{flag}" for flag in (*FLAGS, "space") if getattr(options, flag) is not None]
    if given:
        raise ConfigError(
            f"{kept} keeps its configuration, got {', '.join(given)}; leave that out, or start a new sweep"
        )


def input_place(address: str) -> Place:
    """A flag's input, as :func:`sought`. Raises :class:`argparse.ArgumentTypeError`."""
    try:
        return sought(address)
    except (ValueError, StorageError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def input_path(address: str) -> Path:
    """A flag's input on this machine. Raises :class:`argparse.ArgumentTypeError`."""
    return _here(input_place(address))


def output_path(address: str) -> Path:
    """A flag's output on this machine. Raises :class:`argparse.ArgumentTypeError`."""
    try:
        return _here(place(address))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _here(where: Place) -> Path:
    if not isinstance(where, Path):
        raise argparse.ArgumentTypeError(f"must be a path on this machine, got {where}; copy it here and name the copy")
    return where


def output_place(address: str) -> Place:
    """An output's place that a flag names, under :func:`home` where it is relative. Raises :class:`argparse.ArgumentTypeError`."""
    try:
        return place(at_home(address))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
