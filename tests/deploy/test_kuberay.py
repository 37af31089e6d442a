"""The files for Kubernetes are what KubeRay and Ray's autoscaler take, and keep what docs/guides/cluster.md promises of them."""

from __future__ import annotations

import copy
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError, validate
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as autoscaling_config,
)

from latentwire.cli import app, as_written
from latentwire.distributed import spot
from latentwire.planning.autoscaler import most_resources, worker_types
from tests.deploy.schema import CLAIM, RAY_CLUSTER, RAY_JOB
from tests.test_cluster_files import REPOSITORY

FOLDER = REPOSITORY / "deploy" / "kuberay"
SCHEMAS = {"raycluster": RAY_CLUSTER, "rayjob": RAY_JOB, "storage": CLAIM}
LONGEST_JOB_NAME = 41
"""In characters: the operator makes names of a cluster, its pods and services from it."""


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def cluster_of(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    return spec["rayClusterSpec"] if name == "rayjob" else spec


def pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Group → the specification of its pods."""
    groups = {"head": cluster["headGroupSpec"]} | {
        group["groupName"]: group for group in cluster["workerGroupSpecs"]
    }
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_every_file_has_a_schema() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_file_is_of_its_schema(name: str) -> None:
    validate(read(name), SCHEMAS[name])
    assert len(read(name)["metadata"]["name"]) <= LONGEST_JOB_NAME


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("spec", "backofLimit"), 0),
        (("spec", "backoffLimit"), -1),
        (("spec", "entrypoint"), ["python", "ray_jobs/tune.py"]),
        (("spec", "rayClusterSpec", "headGroupSpecs"), {}),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 1, "groupName"), "GPU_spot"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "container"), []),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "tolerations", 0, "effect"), "No"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "resources", "limits", "memory"), "60 GB"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused(path: tuple[str | int, ...], wrong: Any) -> None:
    job = read("rayjob")
    node: Any = job
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = wrong
    with pytest.raises(ValidationError):
        validate(job, RAY_JOB)


def test_the_job_brings_the_cluster_of_the_other_file() -> None:
    assert cluster_of("rayjob") == cluster_of("raycluster")


def test_versions_are_the_projects() -> None:
    """Since Ray 2.52 the operator can ask for a token; it wants to be told the version."""
    cluster = cluster_of("rayjob")
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}


def test_the_autoscaler_of_ray_reads_the_cluster_as_it_is_meant() -> None:
    document = copy.deepcopy(read("raycluster"))
    document["metadata"]["namespace"] = "default"
    config = autoscaling_config(document)  # checked by Ray's own schema
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    workers = {name: (resources, most) for name, resources, most in worker_types(config)}
    assert set(workers) == {"cpu", "gpu-spot", "gpu-on-demand"}
    assert all(kind["min_workers"] == 0 for kind in types.values())
    for name, extra, most in (("gpu-spot", "spot", 32), ("gpu-on-demand", "on_demand", 8)):
        resources, count = workers[name]
        assert (resources["CPU"], resources["GPU"], resources[extra], count) == (8, 1, 1, most)
    assert "GPU" not in workers["cpu"][0]
    assert config["idle_timeout_minutes"] == 5
    assert most_resources(config)["GPU"] == 40  # what a sweep's plan counts on


def test_all_pods_see_the_volume_that_outputs_go_to() -> None:
    claim = read("storage")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(cluster_of("rayjob")).values():
        (container,) = pod["containers"]
        (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
        assert volume["name"] == mount["name"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        values = {variable["name"]: variable["value"] for variable in container["env"]}
        assert values["LATENTWIRE_HOME"] == mount["mountPath"]
        assert values["HF_HOME"].startswith(mount["mountPath"])
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_job_runs_a_sweep_on_that_volume() -> None:
    job = read("rayjob")["spec"]
    python, script, *flags = shlex.split(job["entrypoint"])
    assert python == "python"
    workdir = "/home/ray/latentwire/"
    assert f"WORKDIR {workdir[:-1]}\n" in (REPOSITORY / "deploy" / "Dockerfile").read_text()
    assert (REPOSITORY / script.removeprefix(workdir)).is_file() and script.startswith(workdir)
    app.parse_args(["tune", *as_written(flags)], exit_on_error=False, print_error=False)
    (mount,) = pods(job["rayClusterSpec"])["head"]["containers"][0]["volumeMounts"]
    for flag in ("--output_dir", "--data_dir"):
        assert flags[flags.index(flag) + 1].startswith(mount["mountPath"] + "/")
    assert job["backoffLimit"] == 0 and job["shutdownAfterJobFinishes"]


def test_gpu_pods_are_drained_before_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # where `ray` is
    asked: list[float] = []
    monkeypatch.setattr(spot, "drain", lambda notice, *where: asked.append(notice.deadline) or True)
    for name, pod in pods(cluster_of("rayjob")).items():
        (container,) = pod["containers"]
        if "nvidia.com/gpu" not in container["resources"]["limits"]:
            assert "lifecycle" not in container
            continue
        shell, flag, line = container["lifecycle"]["preStop"]["exec"]["command"]
        hook, wait = line.split(" && ")
        python, module, watcher, *flags = shlex.split(hook)
        assert (shell, flag, python, module, watcher) == (
            "sh",
            "-c",
            "python",
            "-m",
            spot.__name__,
        ), name
        assert spot.main(flags) == 0  # its flags are right
        seconds = float(flags[flags.index("--now") + 1])
        # The pod lives as long as Ray was told, and Ray has time to end before it is killed.
        assert shlex.split(wait) == ["sleep", f"{seconds:g}"]
        assert pod["terminationGracePeriodSeconds"] >= seconds + 30
    assert len(asked) == 2


def test_what_a_user_fills_in_is_named_at_the_top() -> None:
    for name in ("raycluster", "rayjob", "storage"):
        text = (FOLDER / f"{name}.yaml").read_text()
        top, rest = text.split("apiVersion:", 1)
        blanks = {
            word for word in ("IMAGE", "SPOT_LABEL", "SPOT", "STORAGE_CLASS") if f"{word}" in rest
        }
        assert blanks and all(word in top for word in blanks)
