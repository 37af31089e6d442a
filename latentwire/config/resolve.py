"""From YAML, flags and a trial's values to a validated configuration.

Unknown keys are refused and answered with the nearest known name; every message quotes the rule, the value and, where
there is one, the file and the path inside it.
"""

from __future__ import annotations

import graphlib
import typing
from collections.abc import Container
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from latentwire.config import (
    CategoricalDimension,
    Dimension,
    FloatDimension,
    LossConfig,
    RunConfig,
    Section,
    SweepConfig,
    default_receivers,
)
from latentwire.config.errors import ConfigError as ConfigError
from latentwire.config.errors import nearest
from latentwire.config.files import read_tree
from latentwire.config.knobs import knobs as knobs


def load_space(source: str | Path | None = None, overrides: dict[str, Any] | None = None) -> SweepConfig:
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


def validate(model: type[Section], tree: Any, where: str, given: Container[str] = ()) -> Any:
    """``model.model_validate`` with errors in the project's form. ``given``: dotted paths that the command line named."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, problem, where, given) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def with_values(run: RunConfig, values: dict[str, Any], where: str = "trial") -> RunConfig:
    """A copy of ``run`` with dotted paths set, validated again.

    A ``losses.bundle`` among the values is outvoted by nothing but what was set beside the one before it: neither by defaults,
    which stand in a configuration that was written out whole, nor by the bundle before it.
    """
    tree = run.model_dump(mode="json", exclude_unset=True)
    if "losses.bundle" in values:
        before = LossConfig(bundle=run.losses.bundle).model_dump(mode="json")
        tree["losses"] = {
            name: value for name, value in run.losses.model_dump(mode="json").items() if value != before[name]
        }
    for dotted, value in values.items():
        set_path(tree, dotted, value)
    return validate(RunConfig, tree, where)


def set_path(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings; ``receivers.0.model`` reaches into lists. Raises :class:`ConfigError` beyond their ends."""
    *parents, leaf = dotted.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, key, dotted)]
            continue
        _check_section(node, dotted)
        following = parents[depth + 1] if depth + 1 < len(parents) else leaf
        if node.get(key) is None:  # absent, or a section that is switched off: naming a knob of it switches it on
            if key == "receivers" and following.isdigit():
                node[key] = [receiver.model_dump(mode="json") for receiver in default_receivers()]
            else:
                node[key] = {}
        node = node[key]
    if isinstance(node, list):
        node[_index(node, leaf, dotted)] = value
    else:
        _check_section(node, dotted)
        node[leaf] = value


def _check_section(node: Any, dotted: str) -> None:
    if not isinstance(node, dict):
        raise ConfigError(f"a path must end at a knob, got {dotted}, which goes on below the value {node!r}")


def _index(node: list[Any], key: str, dotted: str) -> int:
    if key.isdigit() and int(key) < len(node):
        return int(key)
    raise ConfigError(
        f"a place in a list must be a number from 0 to {len(node) - 1}, got {key} ({dotted}); write further ones into a space file"
    )


def check_search(space: SweepConfig, where: str) -> None:
    """Each dimension must name a knob of ``run`` and stay inside that knob's own bounds; both ends are tried.

    Conditions and starting points must name dimensions of the space and values that these can take.
    """
    _check_conditions(space.search, where)
    known = dict(knobs())
    for dotted, dimension in space.search.items():
        place = f"{where}: search.{dotted}"
        if dotted.startswith("receivers"):
            raise ConfigError(
                f"receivers cannot be searched, got {dotted} ({place}); compare them in sweeps of their own"
            )
        if dotted not in known:
            raise ConfigError(f"search paths must name a knob of run, got {dotted} ({place}){nearest(dotted, known)}")
        if typing.get_origin(known[dotted].annotation) in (tuple, dict):
            raise ConfigError(
                f"a number, choice or switch can be searched, {dotted} is none ({place}); set it under run"
            )
        if isinstance(dimension, FloatDimension) and float not in _leaves(known[dotted].annotation):
            raise ConfigError(
                f"{dotted} is no real number, got type {dimension.type} ({place}); use int or categorical"
            )
        if isinstance(dimension, CategoricalDimension):
            ends: list[tuple[str, Any]] = [(f"choices[{i}]", choice) for i, choice in enumerate(dimension.choices)]
        else:
            if dimension.low > dimension.high:
                raise ConfigError(f"low must be ≤ high, got {dimension.low} > {dimension.high} ({place}.low)")
            if dimension.log and (dimension.low <= 0 or dimension.step not in (None, 1)):
                raise ConfigError(
                    f"log needs low > 0 and no step, got low {dimension.low}, step {dimension.step} ({place})"
                )
            ends = [("low", dimension.low), ("high", dimension.high)]
        for end, value in ends:
            # Only the section is validated, so that dimensions which need each other (d_model and heads) can pass.
            section, _, rest = dotted.partition(".")
            base = getattr(space.run, section).model_dump(mode="json")
            for path, wanted in dimension.when.items():
                if path.startswith(f"{section}."):
                    set_path(base, path.removeprefix(f"{section}."), wanted[0])
            set_path(base, rest, value)
            try:
                type(getattr(space.run, section)).model_validate(base)
            except ValidationError as error:
                problem = error.errors()[0]
                raise ConfigError(f"{_rule(dotted.split('.')[-1], problem)} ({place}.{end})") from error
    for number, point in enumerate(space.tune.start_with):
        for path, value in point.items():
            place = f"{where}: tune.start_with[{number}]"
            if path not in space.search:
                raise ConfigError(
                    f"a starting point must name dimensions of the space, got {path} ({place}){nearest(path, space.search)}"
                )
            _check_point(space.search[path], value, f"{place}.{path}")


def _leaves(annotation: Any) -> list[Any]:
    """The plain types of a knob: itself, or the members of its union."""
    return (
        [annotation]
        if not typing.get_args(annotation)
        else [t for a in typing.get_args(annotation) for t in _leaves(a)]
    )


def _check_conditions(search: dict[str, Dimension], where: str) -> None:
    for dotted, dimension in search.items():
        for path, wanted in dimension.when.items():
            condition = search.get(path)
            if not isinstance(condition, CategoricalDimension):
                raise ConfigError(
                    f"a condition must name a categorical dimension of the space, got {path} ({where}: search.{dotted}.when)"
                    f"{nearest(path, search)}"
                )
            strange = [value for value in wanted if value not in condition.choices]
            if strange:
                raise ConfigError(
                    f"a condition's values must be among the choices {list(condition.choices)}, got {strange[0]!r} "
                    f"({where}: search.{dotted}.when.{path})"
                )
    search_order(search, where)


def search_order(search: dict[str, Dimension], where: str = "search") -> list[str]:
    """The searched paths, each after those that its conditions name. Raises :class:`ConfigError` for a circle."""
    try:
        return list(graphlib.TopologicalSorter({path: list(dim.when) for path, dim in search.items()}).static_order())
    except graphlib.CycleError as error:
        circle = " → ".join(error.args[1])
        raise ConfigError(f"conditions must not go round in a circle, got {circle} ({where}: search)") from error


def _check_point(dimension: Dimension, value: Any, place: str) -> None:
    if isinstance(dimension, CategoricalDimension):
        if value not in dimension.choices:
            raise ConfigError(f"a starting point must be among {list(dimension.choices)}, got {value!r} ({place})")
    elif isinstance(value, bool | str) or not dimension.low <= value <= dimension.high:
        raise ConfigError(
            f"a starting point must be a number from {dimension.low} to {dimension.high}, got {value!r} ({place})"
        )


def _explain(model: type[BaseModel], problem: Any, where: str, given: Container[str]) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    where = "command line" if place in given else where
    at = f"{where}: {place}" if place else where
    leaf = str(problem["loc"][-1]) if problem["loc"] else model.__name__
    if problem["type"] == "extra_forbidden":
        siblings = _fields_at(model, [str(part) for part in problem["loc"][:-1]])
        siblings += ["extends"] * (siblings == list(SweepConfig.model_fields))
        return f"unknown key {leaf} ({at}){nearest(leaf, siblings)}"
    return f"{_rule(leaf, problem)} ({at})"


def _rule(leaf: str, problem: Any) -> str:
    """pydantic's finding as "latent_len must be ≥ 1, got 0"."""
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
    """Names allowed at a place of the tree; list indices and union tags are passed over."""
    current: Any = model
    for part in loc:
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            continue
        current = current.model_fields[part].annotation
        inner = [a for a in typing.get_args(current) if isinstance(a, type) and issubclass(a, BaseModel)]
        if inner:
            current = inner[0]
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []
