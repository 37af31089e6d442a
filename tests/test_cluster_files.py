"""The cluster files are what `ray up` takes, and keep what docs/guides/cluster.md and SECURITY.md promise of them."""

import copy
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config

from scripts import cluster_requirements

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
    "path",
    [
        ("idle_timeout_minute",),
        ("available_node_types", "gpu_spot", "max_worker"),
        ("docker", "imagee"),
    ],
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
    assert (
        types["head"]["resources"] == {"CPU": 0}
        and "--num-cpus=0" in config["head_start_ray_commands"][-1]
    )
    assert all(types[kind]["min_workers"] == 0 for kind in types if kind != "head")
    assert {"spot", "on_demand"} <= {
        resource for kind in types.values() for resource in kind["resources"]
    }
    assert config["idle_timeout_minutes"] <= 10


@pytest.mark.parametrize("name", FILES)
def test_the_cluster_is_closed(name: str) -> None:
    config, text = read(name), (REPOSITORY / name).read_text()
    assert (
        "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
        and "0.0.0.0" not in text
    )
    assert "RAY_AUTH_MODE=token" in "".join(config["docker"]["run_options"])
    assert not any(
        word in text for word in ("AWS_SECRET", "HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN=")
    )
    assert config["provider"]["use_internal_ips"] and config["provider"]["use_external_head_ip"]


@pytest.mark.parametrize("name", FILES)
def test_what_is_sent_holds_no_environment_and_no_run(name: str) -> None:
    """Ray reads and hashes every file below what is mounted: nothing that a user makes may come to lie there."""
    mounts = {place for place in read(name)["file_mounts"].values() if not place.startswith("~")}
    files = [file for place in mounts for file in (REPOSITORY / place).rglob("*")]
    assert [file.relative_to(REPOSITORY) for file in files] == [Path("cluster/requirements.txt")]


def test_nodes_install_the_projects_pins() -> None:
    assert cluster_requirements.PAGE.read_text() == cluster_requirements.page(), (
        "python scripts/cluster_requirements.py"
    )


def test_the_pins_agree_with_each_other() -> None:
    """`pip install -c constraints.txt '.[aws,gcp]'` has an answer: every package takes the pins of those that it needs."""
    pins = {name: line.partition("==")[2] for name, line in cluster_requirements.pins().items()}
    refused = [
        f"{who} needs {needed}, pinned is {pins[canonicalize_name(needed.name)]}"
        for who, needed in cluster_requirements.needs(cluster_requirements.asked_for())
        if not needed.specifier.contains(pins[canonicalize_name(needed.name)], prereleases=True)
    ]
    assert not refused


@pytest.mark.parametrize("name", FILES)
def test_what_a_user_fills_in_is_named_at_the_top(name: str) -> None:
    text = (REPOSITORY / name).read_text()
    top, rest = text.split("cluster_name:", 1)
    code = "\n".join(
        line.partition(" #")[0] for line in rest.splitlines() if not line.lstrip().startswith("#")
    )
    blanks = set(re.findall(r"\b(ACCOUNT|BUCKET|FILESYSTEM|FILESTORE|PROJECT)\b", code))
    assert blanks and blanks == set(
        re.findall(r"\b(ACCOUNT|BUCKET|FILESYSTEM|FILESTORE|PROJECT)\b", top)
    )


@pytest.mark.parametrize("name", FILES)
def test_a_gpu_is_asked_for_where_there_is_one(name: str) -> None:
    config = read(name)
    assert config["docker"][
        "disable_automatic_runtime_detection"
    ]  # which starts without one where the driver is late
    for kind in config["available_node_types"].values():
        docker = kind.get("docker", {})
        assert ("--gpus all" in docker.get("worker_run_options", [])) == (
            "GPU" in kind["resources"]
        )
        assert kind["resources"].get("GPU") or docker.get(
            "worker_image", config["docker"]["head_image"]
        ).endswith("py311")


def test_both_clouds_set_up_their_nodes_alike() -> None:
    """But for the file system's address and options, and the type of mount."""
    aws, gcp = (read(name) for name in FILES)
    for key in (
        "initialization_commands",
        "setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ):
        pairs = zip(aws[key], gcp[key], strict=True)
        assert all(a == g or ("mount -t nfs4" in a and "mount -t nfs4" in g) for a, g in pairs)


def test_the_rayjob_is_yaml_of_the_same_versions() -> None:
    job = yaml.safe_load((REPOSITORY / "deploy" / "kuberay" / "rayjob.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    assert (job["kind"], cluster["rayVersion"], cluster["authOptions"]) == (
        "RayJob",
        version("ray"),
        {"mode": "token"},
    )
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert cluster["workerGroupSpecs"][0]["minReplicas"] == 0 and job["spec"]["backoffLimit"] == 0
    image = (REPOSITORY / "deploy" / "Dockerfile").read_text()
    assert f"rayproject/ray:{version('ray')}-py311-gpu" in image
