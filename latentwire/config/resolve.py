"""From YAML, flags and a trial's values to a validated configuration.

Unknown keys are refused and answered with the nearest known name; every message quotes the rule, the value and, where
there is one, the file and the path inside it.
"""

from __future__ import annotations

import graphlib
import itertools
import typing
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from latentwire.config import (
    CategoricalDimension,
    Dimension,
    FloatDimension,
    IntDimension,
    LossConfig,
    RunConfig,
    Section,
    StageConfig,
    SweepConfig,
    default_receivers,
)
from latentwire.config.errors import ConfigError as ConfigError
from latentwire.config.errors import nearest
from latentwire.config.files import read_tree
from latentwire.config.knobs import knobs, parted, section_in
from latentwire.config.stages import STAGE, STAGES


def load_space(
    source: str | Path | None = None, overrides: dict[str, Any] | None = None
) -> SweepConfig:
    """Return a configuration with ``overrides`` laid over it.

    Args:
        source: the name of a shipped configuration (``toy``), or the path of a YAML or JSON file;
            :mod:`latentwire.config.files` says how one extends others. None: all defaults.
        overrides: path → value, e.g. ``{"run.training.epochs": 2}``.

    Raises:
        ConfigError: no such configuration, or a value that breaks a rule; the message quotes the
            file, the path inside it, the rule and the value.
    """
    where = "command line" if source is None else str(source)
    tree = {} if source is None else read_tree(source)
    for path, value in (overrides or {}).items():
        set_path(tree, path, value)
    space = validate(SweepConfig, tree, where, given=overrides or {})
    check_search(space, where)
    return space


def with_overrides(space: SweepConfig, overrides: dict[str, Any]) -> SweepConfig:
    """Return a configuration with values set by their paths, validated again; raises as :func:`load_space`."""
    bundle = overrides.get("run.losses.bundle")
    if bundle is not None:
        # The weights of the bundle before it are written out, and would outvote this one.
        run = with_values(space.run, {"losses.bundle": bundle}, "command line")
        space = space.model_copy(update={"run": run})
    return load_space(None, space.model_dump(mode="json", exclude_unset=True) | overrides)


def validate(model: type[Section], tree: Any, where: str, given: Container[str] = ()) -> Any:
    """Return ``model.model_validate(tree)``, or raise :class:`ConfigError` with a line for each problem.

    ``given``: paths that the command line named.
    """
    try:
        checked = model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, problem, where, given) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error
    run = checked.run if isinstance(checked, SweepConfig) else checked
    if isinstance(run, RunConfig):
        stages_of(run, where)
    return checked


def with_values(run: RunConfig, values: dict[str, Any], where: str = "trial") -> RunConfig:
    """Return a copy of ``run`` with values set by their paths, validated again.

    A ``losses.bundle`` among them is outvoted by nothing but what was set beside the one before it:
    neither by that bundle, nor by defaults, which stand in a configuration that was written out whole.
    """
    # Defaults stay unset: validators tell by that what was given.
    tree = run.model_dump(mode="json", exclude_unset=True)
    if "losses.bundle" in values:
        # Kept is what differs from the bundle before it; the rest was that bundle's own.
        before = LossConfig(bundle=run.losses.bundle).model_dump(mode="json")
        losses = run.losses.model_dump(mode="json")
        tree["losses"] = {name: value for name, value in losses.items() if value != before[name]}
    for path, value in values.items():
        set_path(tree, path, value)
    return validate(RunConfig, tree, where)


@dataclass(frozen=True)
class Stage:
    """One stage of a run, resolved."""

    name: str
    """Empty where the run has no stages."""
    run: RunConfig
    """All that it is trained with, without stages. ``training.init_from`` of a later one is ``stage:<name>``."""
    config: StageConfig
    """What makes it differ from the run."""


def stages_of(run: RunConfig, where: str = "run") -> tuple[Stage, ...]:
    """Return the stages of a run in their order, each resolved and validated; one without stages is its only stage.

    ``where``: for the messages. Raises :class:`ConfigError`, which names the stage, for values that break a rule.
    """
    if not run.stages:
        return (Stage("", run, StageConfig()),)
    # Without stages: validating a stage that had them would resolve them all again.
    shared = run.model_copy(update={"stages": {}})
    stages: list[Stage] = []
    for name, config in run.stages.items():
        # The first stage begins with the run's own init_from, if it has one.
        begins = {"training.init_from": f"{STAGE}{stages[-1].name}"} if stages else {}
        resolved = with_values(shared, begins | config.values, f"{where}: stages.{name}")
        stages.append(Stage(name, resolved, config))
    return tuple(stages)


def last_stage(run: RunConfig) -> RunConfig:
    """Return a run as its last stage is trained, which is the run itself where it has no stages."""
    return stages_of(run)[-1].run


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings; ``receivers.0.model`` reaches into lists.

    Raises:
        ConfigError: the path leads beyond a list's end, or below a value.
    """
    *parents, leaf = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, key, path)]
            continue
        _check_section(node, path)
        # Other sections are made as they are named, but no stage.
        if parents[:depth][-1:] == [STAGES] and key not in node:
            raise ConfigError(
                f"a path must name a stage of the run, got {key} ({path}){nearest(key, node)}"
            )
        # Absent, or a section that is switched off: naming a knob of it switches it on.
        if node.get(key) is None:
            if key == "receivers" and parents[:depth] in ([], ["run"]):
                node[key] = [receiver.model_dump(mode="json") for receiver in default_receivers()]
            else:
                node[key] = {}
        node = node[key]
    if isinstance(node, list):
        node[_index(node, leaf, path)] = value
    else:
        _check_section(node, path)
        node[leaf] = value


def _check_section(node: Any, path: str) -> None:
    if not isinstance(node, dict):
        raise ConfigError(
            f"a path must end at a knob, got {path}, which goes on below the value {node!r}"
        )


def _index(node: list[Any], key: str, path: str) -> int:
    # No isdigit: "²" is a digit, but no number.
    if key.isdecimal() and int(key) < len(node):
        return int(key)
    raise ConfigError(
        f"a place in a list must be a number from 0 to {len(node) - 1}, got {key} ({path}); write further ones into a "
        f"configuration file"
    )


# ------------------------------------------------------------------------------------------------------------- search


def check_search(space: SweepConfig, where: str) -> None:
    """Raise :class:`ConfigError` for a search that no trial could be drawn from.

    Each dimension must name a knob of ``run`` and stay inside that knob's own bounds; both ends are
    tried. Conditions and starting points must name dimensions of the space and values that these take.
    """
    _check_conditions(space.search, where)
    fields = dict(knobs())
    for path, dimension in space.search.items():
        at = f"{where}: search.{path}"
        stage, knob = parted(path)
        if stage is not None and stage not in space.run.stages:
            raise ConfigError(
                f"search paths must name a stage of the run, got {stage} ({at}){nearest(stage, space.run.stages)}"
            )
        _check_searchable(knob, dimension, fields, at)
        # A stage's knob is tried in the run as that stage has it.
        run = space.run
        if stage is not None:
            run = next(one.run for one in stages_of(space.run) if one.name == stage)
        for end, value in _ends(dimension, at):
            _check_end(run, path, dimension, value, f"{at}.{end}")
    for number, point in enumerate(space.tune.start_with):
        for path, value in point.items():
            at = f"{where}: tune.start_with[{number}]"
            if path not in space.search:
                raise ConfigError(
                    f"a starting point must name dimensions of the space, got {path} ({at}){nearest(path, space.search)}"
                )
            check_point(space.search[path], value, f"{at}.{path}", "a starting point")


def _check_searchable(path: str, dimension: Dimension, fields: dict[str, Any], at: str) -> None:
    """Raise for a path that names no knob, or none that a dimension of this kind can vary."""
    if path.startswith("receivers"):
        raise ConfigError(
            f"receivers cannot be searched, got {path} ({at}); compare them in sweeps of their own"
        )
    if path not in fields:
        raise ConfigError(
            f"search paths must name a knob of run, got {path} ({at}){nearest(path, fields)}"
        )
    annotation = fields[path].annotation
    if typing.get_origin(annotation) in (tuple, dict):
        raise ConfigError(
            f"a number, choice or switch can be searched, {path} is none ({at}); set it under run"
        )
    if isinstance(dimension, FloatDimension) and float not in _plain_types(annotation):
        raise ConfigError(
            f"{path} is no real number, got type {dimension.type} ({at}); use int or categorical"
        )


def _plain_types(annotation: Any) -> list[Any]:
    """Return a knob's own type, or those of its union."""
    options = typing.get_args(annotation)
    if not options:
        return [annotation]
    return list(itertools.chain.from_iterable(map(_plain_types, options)))


def _ends(dimension: Dimension, at: str) -> list[tuple[str, Any]]:
    """Return the values that stand for all of a dimension, each with its name in the file."""
    if isinstance(dimension, CategoricalDimension):
        return [(f"choices[{index}]", choice) for index, choice in enumerate(dimension.choices)]
    if dimension.low > dimension.high:
        raise ConfigError(
            f"low must be ≤ high, got {dimension.low} > {dimension.high} ({at}.low); swap them"
        )
    if dimension.log and (dimension.low <= 0 or dimension.step not in (None, 1)):
        raise ConfigError(
            f"log needs low > 0 and no step, got low {dimension.low}, step {dimension.step} ({at})"
        )
    return [("low", dimension.low), ("high", dimension.high)]


def _check_end(run: RunConfig, path: str, dimension: Dimension, value: Any, at: str) -> None:
    """Raise where a knob does not take a value under the first values that the dimension is drawn under.

    Only the knob's section is validated, so that dimensions which need each other (``d_model`` and
    ``heads``) can pass.
    """
    stage, knob = parted(path)
    name, _, rest = knob.partition(".")
    section = getattr(run, name)
    tree = section.model_dump(mode="json")
    # The dimension is drawn under its conditions alone: those in this section are laid under it.
    for other, choices in dimension.when.items():
        of_other, knob_of_other = parted(other)
        if knob_of_other.startswith(f"{name}.") and of_other in (None, stage):
            set_path(tree, knob_of_other.removeprefix(f"{name}."), choices[0])
    set_path(tree, rest, value)
    try:
        type(section).model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{_rule(path.split('.')[-1], error.errors()[0])} ({at})") from error


def _check_conditions(search: dict[str, Dimension], where: str) -> None:
    for path, dimension in search.items():
        for other, choices in dimension.when.items():
            condition = search.get(other)
            if not isinstance(condition, CategoricalDimension):
                raise ConfigError(
                    f"a condition must name a categorical dimension of the space, got {other} "
                    f"({where}: search.{path}.when){nearest(other, search)}"
                )
            unknown = [choice for choice in choices if choice not in condition.choices]
            if unknown:
                raise ConfigError(
                    f"a condition's values must be among the choices {list(condition.choices)}, got {unknown[0]!r} "
                    f"({where}: search.{path}.when.{other})"
                )
    search_order(search, where)


def search_order(search: dict[str, Dimension], where: str = "search") -> list[str]:
    """Return the searched paths, each after those that its conditions name. Raises :class:`ConfigError` for a circle."""
    try:
        conditions = {path: list(dim.when) for path, dim in search.items()}
        return list(graphlib.TopologicalSorter(conditions).static_order())
    except graphlib.CycleError as error:
        circle = " → ".join(error.args[1])
        raise ConfigError(
            f"conditions must not go round in a circle, got {circle} ({where}: search)"
        ) from error


def check_point(dimension: Dimension, value: Any, at: str, what: str) -> None:
    """Raise :class:`ConfigError` for a value that a dimension does not take.

    ``at``: where it stands. ``what``: what it is for a person.
    """
    if isinstance(dimension, CategoricalDimension):
        if value not in dimension.choices:
            raise ConfigError(
                f"{what} must be among {list(dimension.choices)}, got {value!r} ({at})"
            )
    # A switch is an int to Python: True would pass for 1.
    elif isinstance(value, bool | str) or not dimension.low <= value <= dimension.high:
        raise ConfigError(
            f"{what} must be a number from {dimension.low} to {dimension.high}, got {value!r} ({at})"
        )
    elif isinstance(dimension, IntDimension) and value != int(value):
        raise ConfigError(f"{what} must be a whole number, got {value!r} ({at})")


# ----------------------------------------------------------------------------------------------------------- messages


def _explain(model: type[BaseModel], problem: Any, where: str, given: Container[str]) -> str:
    # loc is the way to the value: ("run", "encoder", "latent_len").
    place = ".".join(str(part) for part in problem["loc"])
    where = "command line" if place in given else where
    at = f"{where}: {place}" if place else where
    leaf = str(problem["loc"][-1]) if problem["loc"] else model.__name__
    if problem["type"] == "extra_forbidden":
        siblings = _fields_at(model, [str(part) for part in problem["loc"][:-1]])
        # At the root of a file, "extend" is most likely this key, which is no field.
        siblings += ["extends"] * (siblings == list(SweepConfig.model_fields))
        return f"unknown key {leaf} ({at}){nearest(leaf, siblings)}"
    return f"{_rule(leaf, problem)} ({at})"


def _rule(leaf: str, problem: Any) -> str:
    """Return what pydantic objects to as "latent_len must be ≥ 1, got 0"."""
    # pydantic's type of an error → its sign, and the key of ctx that holds the bound.
    bounds = {
        "greater_than_equal": ("≥", "ge"),
        "greater_than": (">", "gt"),
        "less_than_equal": ("≤", "le"),
        "less_than": ("<", "lt"),
    }
    got = problem.get("input")
    if problem["type"] in bounds:
        sign, key = bounds[problem["type"]]
        return f"{leaf} must be {sign} {problem['ctx'][key]}, got {got!r}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        return f"{leaf} is required"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{leaf}: {message}, got {got!r}"


def _fields_at(model: type[BaseModel], loc: list[str]) -> list[str]:
    """Return the names allowed at a place of the tree; list indices and union tags are passed over."""
    current: type[BaseModel] | None = model
    for part in loc:
        if current is not None and part in current.model_fields:
            current = section_in(current.model_fields[part].annotation)
    return [] if current is None else list(current.model_fields)
