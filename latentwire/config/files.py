"""Configuration files: the shipped ones, a user's own, and what each of them extends.

A file may begin with ``extends:``, one or several other configurations that it is laid over: a text
that ends in ``.yaml``, ``.yml`` or ``.json`` is a path beside the file, any other a shipped name
such as ``toy``, ``recipes/toy`` or ``receivers/smollm2``. What is nearer wins:

- the file over all that it extends, and of these the later over the earlier;
- sections merge, knob by knob; a number, a text or a list replaces what was there;
- a search dimension is replaced whole, and ``null`` takes it out of the space;
- ``losses`` with a ``bundle``, a stage's too, is replaced whole, or the weights below would
  outvote the bundle.

Receivers can be given by name, so that they merge too: ``{smollm2: {model: …}, gemma3: {…}}``, in
this order. What stands under ``each`` is meant for all of them; their own knobs win over it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from latentwire.config.errors import ConfigError, nearest
from latentwire.config.places import sought
from latentwire.storage import Place

SHIPPED = Path(__file__).parents[1] / "spaces"
ENDINGS = (".yaml", ".yml", ".json")
EACH = "each"
RECEIVERS = ("run", "receivers")
LOSSES = ("run", "losses")


def shipped_names() -> list[str]:
    """Return the names of the shipped configurations; the parts that they are made of are left out."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_tree(source: str | Path) -> dict[str, Any]:
    """Read a configuration with all that it extends as one mapping of ``run``, ``search`` and ``tune``.

    Args:
        source: the name of a shipped configuration, or a file's path.

    Raises:
        ConfigError: no such name or file, no valid YAML or JSON, a circle, a name that is unknown.
    """
    tree = _with_bases(_located(source), ())
    run = tree.get("run")
    if isinstance(run, dict) and isinstance(run.get("receivers"), dict):
        run["receivers"] = _listed(run["receivers"], str(source))
    return tree


def _located(source: str | Path) -> Place:
    if isinstance(source, Path):
        return source
    shipped = SHIPPED / f"{source}.yaml"
    try:
        if not source.endswith(ENDINGS) and shipped.is_file():
            return shipped
        return sought(source)
    except OSError as error:
        raise ConfigError(
            f"a configuration must be a shipped name or a file's path, got {source[:80]}… "
            f"({error.strerror}); write what it holds into a file"
        ) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _with_bases(file: Place, chain: tuple[str, ...]) -> dict[str, Any]:
    """Return a file laid over its bases. ``chain``: the files whose ``extends`` led here."""
    address = str(file.resolve() if isinstance(file, Path) else file)
    if address in chain:
        circle = " → ".join([*chain[chain.index(address) :], address])
        raise ConfigError(
            f"extends must not go round in a circle, got {circle}; take one of them out"
        )
    tree = _parsed(file)
    if "extends" not in tree:
        return tree
    names = tree.pop("extends")
    # From the furthest to the nearest: each base over those before it, the file over all.
    merged: dict[str, Any] = {}
    for name in names if isinstance(names, list) else [names]:
        merged = _laid_over(merged, _with_bases(_base(name, file), (*chain, address)))
    merged = _laid_over(merged, tree)
    # null takes a dimension out, but only once all that it could take out is there.
    if isinstance(merged.get("search"), dict):
        merged["search"] = {path: dim for path, dim in merged["search"].items() if dim is not None}
    return merged


def _base(name: Any, file: Place) -> Place:
    if not isinstance(name, str):
        raise ConfigError(
            f"extends must be a name, a path or a list of them, got {name!r} ({file}: extends)"
        )
    if name.endswith(ENDINGS):
        base = file.parent / name
        known = [path.name for path in sorted(SHIPPED.glob("*.yaml"))]
    else:
        base = SHIPPED / f"{name}.yaml"
        # Parts in folders too, which shipped_names leaves out: recipes/toy, receivers/smollm2.
        shipped = (path.relative_to(SHIPPED) for path in SHIPPED.rglob("*.yaml"))
        known = sorted(str(path.with_suffix("")) for path in shipped)
    if not base.is_file():
        raise ConfigError(
            f"extends must name a shipped configuration, or a file by its path from here, got {name} ({file}: extends)"
            f"{nearest(name, known)}"
        )
    return base


class OnceLoader(yaml.SafeLoader):
    """YAML as ever, but a key that stands twice in a mapping is an error: of two stages one would be lost."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping as it is written."""
        # PyYAML keeps the last of two equal keys, and only the nodes still have both.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        try:
            # As texts: a key may be a mapping itself, as in a {{name}} that nothing has filled in.
            _once([(str(key.value), None) for key, _ in node.value])
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error
        return node


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return pairs as a mapping. Raises :class:`ValueError` for a key that stands in them twice."""
    counts = Counter(str(key) for key, _ in pairs)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise ValueError(
            f"a key must stand once in a mapping, got {', '.join(twice)} several times"
        )
    return dict(pairs)


def _yaml(text: str) -> Any:
    """Return what a text of YAML holds; an empty one is an empty mapping."""
    return yaml.load(text, OnceLoader) or {}


def _parsed(file: Place) -> dict[str, Any]:
    is_json = file.name.endswith(".json")
    try:
        # Editors on Windows begin a file with a byte order mark, which JSON does not take.
        text = file.read_bytes().decode("utf-8-sig")
        # JSON has a reader of its own, although YAML reads it: 3e-6 is a text to YAML.
        tree = json.loads(text, object_pairs_hook=_once) if is_json else _yaml(text)
    except OSError as error:
        raise ConfigError(
            f"a configuration must be a shipped name or a file that exists, got {file}"
            f"{nearest(file.name.removesuffix('.yaml'), shipped_names())}"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} must be valid {'JSON' if is_json else 'YAML'}: {error}"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file} must hold a mapping with run, search and tune, got {type(tree).__name__}"
        )
    return tree


def _laid_over(under: Any, over: Any, path: tuple[str, ...] = ()) -> Any:
    """Return ``under`` with ``over``, which is nearer, laid over it, by the rules at the head of this file."""
    if path == RECEIVERS and isinstance(under, list) and isinstance(over, dict):
        # A list below, names above: its receivers are found by their names.
        named = [one for one in under if isinstance(one, dict) and "name" in one]
        under = {receiver["name"]: receiver for receiver in named}
    # search.<path> is one key: the path's dots are part of it.
    is_dimension = path[:1] == ("search",) and len(path) == 2
    # run.losses, or run.stages.<name>.losses
    is_losses = path == LOSSES or (path[:2] == ("run", "stages") and path[3:] == ("losses",))
    is_bundle = is_losses and isinstance(over, dict) and "bundle" in over
    if is_dimension or is_bundle or not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    merged = dict(under)
    for key, value in over.items():
        merged[key] = _laid_over(under.get(key), value, (*path, key))
    return merged


def _listed(by_name: dict[str, Any], where: str) -> list[Any]:
    """Return receivers that were given by name as the list that a run holds."""
    for name, knobs in by_name.items():
        if not isinstance(knobs, dict | None):
            raise ConfigError(
                f"a receiver must be a mapping of its knobs, got {knobs!r} ({where}: run.receivers.{name})"
            )
    shared = by_name.get(EACH) or {}
    receivers = []
    for name, knobs in by_name.items():
        if name != EACH:
            receivers.append({"name": name} | _laid_over(shared, knobs or {}))
    return receivers
