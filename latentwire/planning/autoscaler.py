"""What a cluster can come to: the nodes that are there, and those that its autoscaler may add."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml


def cluster_resources() -> dict[str, float]:
    """What the cluster can come to: of each resource, what is there, or what the autoscaler's node types may add up to.

    A head without GPUs whose autoscaler may start GPU nodes can hold a sweep, though no such node is there yet.
    """
    import ray
    from ray._private.state import state

    there = ray.cluster_resources()
    possible = state.get_max_resources_from_cluster_config()
    if possible is None:  # only Ray's newer autoscaler tells
        possible = most_resources(autoscaling_config())
    return {name: max(there.get(name, 0.0), float(possible.get(name, 0))) for name in there | possible}


def most_resources(config: Mapping[str, Any]) -> dict[str, float]:
    """The most of each resource that node types of an autoscaling configuration add up to, the head's included."""
    head = config.get("available_node_types", {}).get(config.get("head_node_type"), {}).get("resources", {})
    workers = worker_types(config)
    found: dict[str, float] = {}
    for resource in {*head, *(name for _, has, _ in workers for name in has)}:
        left, total = config.get("max_workers", 0), head.get(resource, 0.0)
        for amount, most in sorted(((has.get(resource, 0.0), most) for _, has, most in workers), reverse=True):
            count = min(most, left)
            left, total = left - count, total + count * amount
        found[resource] = float(total)
    return found


def worker_types(config: Mapping[str, Any]) -> list[tuple[str, dict[str, float], int]]:
    """Node types of an autoscaling configuration without the head's: name, resources, and how many there may be."""
    most = config.get("max_workers", 0)
    return [
        (name, kind.get("resources", {}), min(kind.get("max_workers", most), most))
        for name, kind in config.get("available_node_types", {}).items()
        if name != config.get("head_node_type")
    ]


def living_nodes() -> list[dict[str, Any]]:
    """Return the cluster's nodes as ``ray.nodes()`` does, with what is free on each now (``Free``)."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [node | {"Free": free.get(node["NodeID"], {})} for node in ray.nodes()]


def addable_nodes() -> list[dict[str, Any]]:
    """The autoscaler's node types as ``ray.nodes()`` would show one of each, with how many there may be (``Count``)."""
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is not None and config.node_group_configs:
        types = [(kind.name, dict(kind.resources), kind.max_count) for kind in config.node_group_configs]
    else:
        types = worker_types(autoscaling_config())
    return [
        {
            "Alive": True,
            "NodeManagerAddress": f"of type {name}, up to {count} when asked for",
            "Resources": has,
            "Count": count,
        }
        for name, has, count in types
        if count > 0
    ]


def autoscaling_config() -> dict[str, Any]:
    """The configuration of the older autoscaler, which runs on the head, as drivers do; empty where there is none."""
    import ray

    if not ray.is_initialized():
        return {}
    gcs_address = ray.get_runtime_context().gcs_address
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if options.get("--gcs-address") == gcs_address and "--autoscaling-config" in options:
            return yaml.safe_load(Path(options["--autoscaling-config"]).read_text()) or {}
    return {}
