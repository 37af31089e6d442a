"""Command-line flags that commands share: each is a name for a knob of the configuration."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from latentwire import exports
from latentwire.config import SweepConfig
from latentwire.config.overrides import assigned, typed
from latentwire.config.places import at_home, sought
from latentwire.config.resolve import ConfigError, knobs, load_space
from latentwire.storage import Place, StorageError, place

CONFIGURATION = Group("Configuration", sort_key=1)
KNOBS = Group("Knobs (every other one by --set)", sort_key=2)
START = Group("Begin with a trained wire", sort_key=3)

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


Output = Annotated[
    str | None,
    Parameter(name=["--output", "--output_dir"], help="Directory or URI for everything written."),
]
Resume = Annotated[
    str | None,
    Parameter(help="Directory of an unfinished run: go on there from its last checkpoint."),
]
Assignments = Annotated[
    list[str],
    Parameter(
        name="--set",
        help="PATH=VALUE of any knob, e.g. training.encoder_lr=3e-4 or tune.trials=4; repeatable.",
        negative=(),
        group=CONFIGURATION,
        allow_leading_hyphen=True,
    ),
]
ReceiverAt = Annotated[
    list[str],
    Parameter(
        name="--receiver_at",
        help="NAME=PLACE of a receiver whose weights, a directory or Hub id, lie elsewhere than when the wire was "
        "trained; repeatable.",
        negative=(),
    ),
]
MANY = {"consume_multiple": True, "negative": ()}
"""Options of a :class:`cyclopts.Parameter` that takes several values: ``--bits 8 4``."""
Verbose = Annotated[bool, Parameter(help="Show what workers and libraries print.", negative=())]
Ray = Annotated[
    bool, Parameter(help="Run on Ray: its cluster's workers, or this machine's.", negative=())
]


def _knob_parameter(flag: str, path: str, descriptions: dict[str, str | None]) -> Any:
    """Return the annotated type of one flag of :data:`FLAGS`; the configuration checks its value."""
    # Receivers' knobs are in a list, and not among those that are described by their paths.
    receiver = flag.removesuffix("_id")
    text = descriptions.get(path) or f"Hub id or local directory of receiver {receiver}."
    # --batch_size and --batch-size; --seed once.
    names = list(dict.fromkeys((f"--{flag}", f"--{flag.replace('_', '-')}")))
    # Every value is a text until the configuration reads it; a switch alone takes none.
    kind = bool | None if flag == "sequential_models" else str | None
    summary = " ".join(text.replace("``", "").split())
    return Annotated[
        kind,
        Parameter(name=names, help=summary, negative=(), group=KNOBS, allow_leading_hyphen=True),
    ]


def _flag_fields() -> list[Any]:
    descriptions = {path: knob.description for path, knob in knobs()}
    source = Parameter(
        name=["--config", "--space"],
        help="Name of a shipped configuration (toy, small, squad_pair …) or a YAML file. Without it tune and preprocess "
        "take toy, and train takes every knob's own default.",
        group=CONFIGURATION,
    )
    fields: list[Any] = [("config", Annotated[str | None, source], field(default=None))]
    fields.append(("assignments", Assignments, field(default_factory=list)))
    for flag, path in FLAGS.items():
        fields.append((flag, _knob_parameter(flag, path, descriptions), field(default=None)))
    return fields


Flags: Any = make_dataclass("Flags", _flag_fields())
"""``--config``, ``--set`` and the flags of :data:`FLAGS`, as attributes."""

_BASE = Parameter(
    name="--from",
    help="Export or checkpoint whose configuration and weights the run begins with.",
    group=START,
)
_JOINING = Parameter(
    name=["--add_receiver", "--add-receiver"],
    help="NAME=MODEL of a further receiver for the wire of --from: its adapter alone is trained.",
    group=START,
)
StartFlags: Any = make_dataclass(
    "StartFlags",
    [
        ("base", Annotated[str | None, _BASE], field(default=None)),
        ("add_receiver", Annotated[str | None, _JOINING], field(default=None)),
    ],
)
"""Flags of a run that begins with a trained wire."""

# make_dataclass puts them into `types`, where no type hint of theirs is resolved.
Flags.__module__ = StartFlags.__module__ = __name__
NO_FLAGS, NO_START = Flags(), StartFlags()
"""None of them given."""

SharedFlags = Annotated[Flags, Parameter(name="*")]
SharedStart = Annotated[StartFlags, Parameter(name="*")]


def read_config(flags: Any, default: str | None = None, start: Any = None) -> SweepConfig:
    """Return the configuration of ``--config`` with the other flags laid over it.

    Args:
        flags: a :data:`Flags`.
        default: name of the configuration without ``--config``; None: every knob's own default.
        start: a :data:`StartFlags`; with ``--from``, that wire's configuration is the one to begin with.

    Raises:
        ConfigError: an unknown knob, a value out of bounds, flags that exclude each other.
        CheckpointError: ``--from`` holds no wire.
    """
    if start is not None and (start.base or start.add_receiver):
        tree, overrides = begun_with(flags, start), _overrides(flags, True)
        # Else outvoted by the weights that the wire was trained with.
        if "run.losses.bundle" in overrides:
            tree.pop("losses", None)
        return load_space(None, {"run": tree} | overrides)
    source = flags.config or default
    return load_space(source, _overrides(flags, source is not None))


def begun_with(flags: Any, start: Any) -> dict[str, Any]:
    """Return the configuration of ``--from``, with the receiver of ``--add_receiver`` joined to it.

    A joining receiver alone is trained, and its messages shorten as they did for the others.
    Without one every part learns; alignment and coarsening, which it has behind it, are off.
    """
    name, sign, model = (start.add_receiver or "").partition("=")
    if start.base is None:
        raise ConfigError(
            "--add_receiver joins a receiver to a trained wire, got no --from; name that wire's export by --from"
        )
    if flags.config is not None:
        raise ConfigError(
            f"--from keeps the configuration of its wire, got --config {flags.config} beside it; leave that out, or take "
            f"the weights alone by --set training.init_from={start.base}"
        )
    if start.add_receiver and not sign:
        raise ConfigError(
            f"--add_receiver takes NAME=MODEL, got {start.add_receiver}; write the name that the receiver is to have, e.g. "
            f"--add_receiver new={start.add_receiver}"
        )
    base = input_path(start.base)
    exports.read_manifest(base)
    run = exports.read_run(base)
    # The keys below replace what the wire was trained with; all others stay.
    tree = run.model_dump(mode="json", exclude_unset=True)
    tree["training"] = tree.get("training", {}) | {"init_from": str(base)}
    if not start.add_receiver:
        tree["training"] |= {"alignment_steps": 0, "coarsening_steps": 0, "train_only": []}
        return tree
    if run.encoder.private_len:
        raise ConfigError(
            f"a receiver can join a wire without private latents, got encoder.private_len {run.encoder.private_len}: its "
            f"encoder would have to learn more of them; train a wire with private_len 0"
        )
    receivers = [receiver.model_dump(mode="json") for receiver in run.receivers]
    tree["receivers"] = [*receivers, {"name": name, "model": model}]
    tree["training"] |= {"train_only": [name], "receivers_per_step": "all"}
    return tree


def _overrides(flags: Any, from_file: bool) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for flag, path in FLAGS.items():
        if (value := getattr(flags, flag)) is not None:
            # A switch has its value; a text is read as the knob's type.
            overrides[f"run.{path}"] = value if isinstance(value, bool) else typed(path, value)
    # --set wins over the flag of the same knob.
    overrides |= assigned(flags.assignments)
    # A receiver that a flag names is no toy any more: the toy's way with BOS goes with it.
    for index, flag in enumerate(("llama_id", "qwen_id")):
        if getattr(flags, flag) is not None and not from_file:
            overrides.setdefault(f"run.receivers.{index}.bos", "auto")
    return overrides


def receiver_places(assignments: list[str]) -> dict[str, str]:
    """Return receiver → place of its weights, as ``--receiver_at`` names them.

    Raises :class:`~latentwire.config.resolve.ConfigError` for what names none.
    """
    pairs = [text.partition("=") for text in assignments]
    for text, (name, _, where) in zip(assignments, pairs, strict=True):
        if not name or not where:
            raise ConfigError(
                f"--receiver_at takes NAME=PLACE, got {text}; write a receiver's name and its weights' directory or Hub id"
            )
    return {name: where for name, _, where in pairs}


def refuse_flags(flags: Any, subject: str) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for flags that ``subject``, which keeps its
    configuration, would pass over."""
    given = [f"--{flag}" for flag in ("config", *FLAGS) if getattr(flags, flag) is not None]
    if given:
        raise ConfigError(
            f"{subject} keeps its configuration, got {', '.join(given)}; leave that out, or start a new sweep"
        )


def refuse_search(flags: Any) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for knobs of a search, which one run would pass over."""
    of_search = [path for path in assigned(flags.assignments) if not path.startswith("run.")]
    if of_search:
        raise ConfigError(
            f"this command makes one run, which searches nothing, got --set {', '.join(of_search)}; leave that out, or "
            f"search by latentwire tune"
        )


def input_place(address: str) -> Place:
    """Return the place of a flag's input, sought here and then under the home of outputs."""
    try:
        return sought(address)
    except (ValueError, StorageError) as error:
        raise ConfigError(str(error)) from error


def input_path(address: str) -> Path:
    """Return a flag's input on this machine."""
    return _on_this_machine(input_place(address))


def output_path(address: str) -> Path:
    """Return a flag's output on this machine."""
    try:
        return _on_this_machine(place(address)).absolute()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def output_place(address: str) -> Place:
    """Return the place of a flag's output, under the home of outputs where it is relative."""
    try:
        return place(at_home(address)).absolute()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _on_this_machine(where: Place) -> Path:
    if not isinstance(where, Path):
        raise ConfigError(
            f"must be a path on this machine, got {where}; copy it here and name the copy"
        )
    return where
