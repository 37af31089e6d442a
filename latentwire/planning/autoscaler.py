"""Nodes and resources of a cluster: those that are there, and those that its autoscaler may add."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml


def cluster_resources() -> dict[str, float]:
    """Return the most of each resource that the cluster can have.

    A head without GPUs whose autoscaler may start GPU nodes can hold a sweep, though no such node
    is there yet. So of each resource the larger counts: what is there, or what the autoscaler's
    node types may add up to.
    """
    import ray
    from ray._private.state import state

    there = ray.cluster_resources()
    possible = state.get_max_resources_from_cluster_config()
    if possible is None:  # only Ray's newer autoscaler tells
        possible = most_resources(autoscaling_config())
    names = there | possible
    return {name: max(there.get(name, 0.0), float(possible.get(name, 0))) for name in names}


def most_resources(config: Mapping[str, Any]) -> dict[str, float]:
    """Add up the most of each resource that an autoscaling configuration allows, with the head."""
    head = (
        config.get("available_node_types", {})
        .get(config.get("head_node_type"), {})
        .get("resources", {})
    )
    workers = worker_types(config)
    names = set(head).union(*(resources for _, resources, _ in workers))
    totals: dict[str, float] = {}
    # Each resource by itself: the nodes that have most of one need not have most of another.
    for name in names:
        # The workers that have most of it come first, until no further node may be added.
        amounts = sorted(((has.get(name, 0.0), most) for _, has, most in workers), reverse=True)
        nodes_left, total = config.get("max_workers", 0), head.get(name, 0.0)
        for amount, most in amounts:
            count = min(most, nodes_left)
            # max_workers limits the nodes of all types together.
            nodes_left, total = nodes_left - count, total + count * amount
        totals[name] = float(total)
    return totals


def worker_types(config: Mapping[str, Any]) -> list[tuple[str, dict[str, float], int]]:
    """List the node types of an autoscaling configuration other than the head's.

    Returns for each its name, its resources, and how many there may be.
    """
    most = config.get("max_workers", 0)
    types = []
    for name, kind in config.get("available_node_types", {}).items():
        if name == config.get("head_node_type"):
            continue
        # A type's own limit, where it has one, counts within that of the whole cluster.
        count = min(kind.get("max_workers", most), most)
        types.append((name, kind.get("resources", {}), count))
    return types


def living_nodes() -> list[dict[str, Any]]:
    """Return the cluster's nodes as ``ray.nodes()`` does.

    ``Free`` says what is free on each now.
    """
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [node | {"Free": free.get(node["NodeID"], {})} for node in ray.nodes()]


def addable_nodes() -> list[dict[str, Any]]:
    """List the autoscaler's node types as ``ray.nodes()`` would show one of each.

    ``Count`` says how many there may be.
    """
    from ray._private.state import state

    config = state.get_cluster_config()
    # Ray's newer autoscaler answers by itself; the older one is known by its file.
    if config is not None and config.node_group_configs:
        groups = config.node_group_configs
        types = [(group.name, dict(group.resources), group.max_count) for group in groups]
    else:
        types = worker_types(autoscaling_config())
    nodes = []
    for name, has, count in types:
        if count <= 0:
            continue
        node = {
            "Alive": True,
            "NodeManagerAddress": f"of type {name}, up to {count} when asked for",
            "Resources": has,
            "Count": count,
        }
        nodes.append(node)
    return nodes


def autoscaling_config() -> dict[str, Any]:
    """Return the configuration of the older autoscaler; empty where there is none.

    It runs on the head, as drivers do, and is known by its command line.
    """
    import ray

    if not ray.is_initialized():
        return {}
    gcs_address = ray.get_runtime_context().gcs_address
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []  # psutil has none for a process that it may not read
        pairs = [word for word in words if word.startswith("--") and "=" in word]
        options = dict(word.split("=", 1) for word in pairs)
        # Several Rays may run on a machine: the address says which one this driver belongs to.
        if options.get("--gcs-address") == gcs_address and "--autoscaling-config" in options:
            return yaml.safe_load(Path(options["--autoscaling-config"]).read_text()) or {}
    return {}
