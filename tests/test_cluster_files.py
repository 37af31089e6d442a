"""The cluster files are what `ray up` takes, and keep what docs/cluster.md and SECURITY.md promise of them."""

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

FILES = ("cluster.yaml", "cluster.gcp.yaml")
REPOSITORY = Path(__file__).parent.parent


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / name).read_text())


def check(config: dict[str, Any]) -> dict[str, Any]:
    """What ``ray up`` does before it asks the cloud for anything: defaults, Ray's schema, its own rules."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file(name: str) -> None:
    prepared = check(read(name))
    assert prepared["head_node_type"] == "head"
    assert prepared["available_node_types"]["gpu_spot"]["max_workers"] == 32


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "path", [("idle_timeout_minute",), ("available_node_types", "gpu_spot", "max_worker"), ("docker", "imagee")]
)
def test_a_typo_is_refused(name: str, path: tuple[str, ...]) -> None:
    config = read(name)
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = 1
    with pytest.raises(ValidationError, match=path[-1]):
        check(config)


@pytest.mark.parametrize("name", FILES)
def test_versions_are_the_projects(name: str) -> None:
    docker = read(name)["docker"]
    assert docker["head_image"] == f"rayproject/ray:{version('ray')}-py311"
    assert docker["worker_image"] == f"rayproject/ray:{version('ray')}-py311-gpu"
    assert f"ray=={version('ray')}" in (REPOSITORY / "constraints.txt").read_text().split()


@pytest.mark.parametrize("name", FILES)
def test_the_head_takes_no_trial_and_idle_nodes_go(name: str) -> None:
    config = read(name)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0} and "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert all(types[kind]["min_workers"] == 0 for kind in types if kind != "head")
    assert {"spot", "on_demand"} <= {resource for kind in types.values() for resource in kind["resources"]}
    assert config["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("name", FILES)
def test_the_cluster_is_closed(name: str) -> None:
    config, text = read(name), (REPOSITORY / name).read_text()
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1] and "0.0.0.0" not in text
    assert "RAY_AUTH_MODE=token" in "".join(config["docker"]["run_options"])
    assert not any(word in text for word in ("AWS_SECRET", "HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN="))
    assert {".env", ".git/", ".venv/"} <= set(config["rsync_exclude"])


def test_the_rayjob_of_the_docs_is_yaml_of_the_same_versions() -> None:
    text = (REPOSITORY / "docs" / "cluster.md").read_text()
    job = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    cluster = job["spec"]["rayClusterSpec"]
    assert (job["kind"], cluster["rayVersion"], cluster["authOptions"]) == ("RayJob", version("ray"), {"mode": "token"})
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert cluster["workerGroupSpecs"][0]["minReplicas"] == 0 and job["spec"]["backoffLimit"] == 0
    assert f"rayproject/ray:{version('ray')}-py311-gpu" in text
