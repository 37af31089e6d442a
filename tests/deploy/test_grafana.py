"""The dashboard shows metrics that there are, in the shape that Grafana imports."""

from __future__ import annotations

import itertools
import json
import re
from importlib import resources
from typing import Any

from latentwire.distributed.prometheus import SHOWN
from tests.test_cluster_files import REPOSITORY

DASHBOARD: dict[str, Any] = json.loads(
    (REPOSITORY / "deploy" / "grafana" / "latentwire.json").read_text()
)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
OURS = "ray_latentwire_"
UNITS = {"short", "percent", "percentunit", "bytes", "mbytes"}
"""Those of Grafana's that the dashboard uses."""


def metrics(query: str) -> set[str]:
    """Names of metrics in a PromQL query: what stands before the braces of labels."""
    return set(re.findall(r"\b([a-z_0-9]+)\{", query))


def test_every_metric_of_ours_is_shown_and_no_other() -> None:
    shown = {name for query in QUERIES for name in metrics(query) if name.startswith(OURS)}
    assert shown == {OURS + name for name in SHOWN}


def test_every_other_metric_is_one_of_rays() -> None:
    """Ray's own dashboard for Grafana, in the installed package, has them all."""
    source = resources.files("ray.dashboard.modules.metrics.dashboards")
    own = source.joinpath("default_dashboard_panels.py").read_text()
    shown = {name for query in QUERIES for name in metrics(query) if not name.startswith(OURS)}
    assert len(shown) > 12
    assert not [name for name in shown if f"{name}{{{{" not in own]
    for subject in ("cpu", "mem", "object_store", "tasks"):
        assert any(subject in name for name in shown), subject


def test_the_metrics_are_found_in_every_query() -> None:
    assert all(metrics(query) for query in QUERIES)
    assert metrics('sum by (a) (up{b="c"}) / on() (down_x{})') == {"up", "down_x"}
    for query in QUERIES:
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")


def test_it_has_the_shape_that_grafana_imports() -> None:
    assert DASHBOARD["title"] == "LatentWire" and DASHBOARD["uid"] == "latentwire"
    assert DASHBOARD["schemaVersion"] >= 36  # a data source is an object with a uid since then
    assert "id" not in DASHBOARD or DASHBOARD["id"] is None
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)) and all(isinstance(number, int) for number in ids)
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat") and panel["title"] and panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(letters) == len(set(letters))
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_lie_beside_each_other() -> None:
    """On Grafana's 24 columns, none over another."""
    squares = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        covered = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )
        assert not covered & squares, panel["title"]
        squares |= covered


def test_what_is_chosen_above_is_asked_for_below() -> None:
    assert list(VARIABLES) == ["datasource", "session", "trial"]
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    for query in QUERIES:
        labels = re.findall(r"([a-z_0-9]+)\{([^}]*)\}", query)
        for metric, chosen in labels:
            assert 'SessionName=~"$session"' in chosen, query
            assert ('trial=~"$trial"' in chosen) == metric.startswith(OURS), query
        assert set(re.findall(r"\$(\w+)", query)) <= set(VARIABLES)
