"""``ray up`` as far as the clouds' interfaces: each is stubbed where its client would send a request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import google.auth
import httplib2
import pytest
import yaml
from google.auth.credentials import AnonymousCredentials
from moto import mock_aws
from moto.ec2.models.instance_types import InstanceTypeBackend
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.providers import _clear_provider_cache, _get_node_provider

from tests.test_cluster_files import REPOSITORY

ACCOUNT = "123456789012"
DOCS = (REPOSITORY / "docs" / "guides" / "cluster.md").read_text()
IMAGES = {
    "head": "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id",
    "cpu": "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id",
    "gpu_spot": "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
    "gpu_on_demand": "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of its own: ``ray up`` writes keys there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "planted")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    yield tmp_path
    _clear_provider_cache()


def filled_in(name: str, **values: str) -> dict[str, Any]:
    """The file as a user fills it in, and in no other way."""
    text = (REPOSITORY / name).read_text()
    for placeholder, value in values.items():
        assert placeholder in text
        text = text.replace(placeholder, value)
    return yaml.safe_load(text)


def node_tags(role: str, name: str) -> dict[str, str]:
    """What Ray writes on a node as it asks for it."""
    return {
        "ray-node-type": role, "ray-user-node-type": name, "ray-node-status": "uninitialized",
        "ray-node-name": f"ray-latentwire-{role}",
    }  # fmt: skip


def start_all(config: dict[str, Any]) -> dict[str, Any]:
    """Start a node of every type, as the launcher and the head's autoscaler do; returns the bootstrapped file."""
    ready = _bootstrap_config(config, no_config_cache=True)
    provider = _get_node_provider(ready["provider"], ready["cluster_name"])
    for name, kind in ready["available_node_types"].items():
        role = "head" if name == ready["head_node_type"] else "worker"
        tags = node_tags(role, name)
        # What commands.py and node_launcher.py do with the account of the head.
        node_config = (ready.get("head_node", {}) if role == "head" else {}) | kind["node_config"]
        provider.create_node(node_config, tags, 1)
    return ready


# ---- AWS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The requests that botocore sends to an account in which what the docs ask for has been made."""
    seen: list[tuple[str, dict[str, Any]]] = []
    call = botocore.client.BaseClient._make_api_call

    def record(self: Any, operation: str, arguments: dict[str, Any]) -> Any:
        seen.append((f"{self.meta.service_model.service_name}:{operation}", arguments))
        return call(self, operation, arguments)

    used = {kind["node_config"]["InstanceType"] for kind in aws()["available_node_types"].values()}
    # Ray lists all types that there are, which takes moto a minute.
    offered = [kind for kind in InstanceTypeBackend.instance_types if kind.name in used]
    assert {kind.name for kind in offered} == used
    monkeypatch.setattr(InstanceTypeBackend, "instance_types", offered)
    with mock_aws():
        iam = boto3.client("iam")
        trust = {"Version": "2012-10-17", "Statement": []}
        for name in ("latentwire-head", "latentwire-worker"):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", record)
        yield seen


def aws() -> dict[str, Any]:
    return filled_in("cluster.yaml", ACCOUNT=ACCOUNT, BUCKET="latents", FILESYSTEM="fs-1")


def test_ec2_starts_a_node_of_every_type(calls: list[tuple[str, dict[str, Any]]]) -> None:
    ready = start_all(aws())
    started = [arguments for call, arguments in calls if call == "ec2:RunInstances"]
    kinds = {
        tag["Value"]: arguments
        for arguments in started
        for tag in arguments["TagSpecifications"][0]["Tags"]
        if tag["Key"] == "ray-user-node-type"
    }
    # The parameter reaches EC2 as it stands, and EC2 looks the image up.
    assert {kind: arguments["ImageId"] for kind, arguments in kinds.items()} == {
        kind: f"resolve:ssm:{parameter}" for kind, parameter in IMAGES.items()
    }
    assert kinds["gpu_spot"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in kinds["gpu_on_demand"]
    profiles = {
        kind: arguments["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        for kind, arguments in kinds.items()
    }
    assert profiles.pop("head") == "latentwire-head" and set(profiles.values()) == {
        "latentwire-worker"
    }
    # One group for all, in which they reach each other, and into which no port leads but ssh.
    groups = {group for arguments in kinds.values() for group in arguments["SecurityGroupIds"]}
    (group,) = boto3.client("ec2", "us-west-2").describe_security_groups(GroupIds=list(groups))[
        "SecurityGroups"
    ]
    assert group["GroupName"] == "latentwire"
    within = [rule for rule in group["IpPermissions"] if rule["UserIdGroupPairs"]]
    outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [pair["GroupId"] for rule in within for pair in rule["UserIdGroupPairs"]] == list(groups)
    assert [(rule["FromPort"], rule["ToPort"]) for rule in outside] == [(22, 22)]
    provider = _get_node_provider(ready["provider"], ready["cluster_name"])
    nodes = provider.non_terminated_nodes({})
    assert len(nodes) == 4 and all(provider.internal_ip(node) for node in nodes)


def test_a_group_that_has_rules_keeps_them(calls: list[tuple[str, dict[str, Any]]]) -> None:
    ec2 = boto3.client("ec2", "us-west-2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = ec2.create_security_group(GroupName="latentwire", Description="ours", VpcId=vpc)[
        "GroupId"
    ]
    mine = {
        "IpProtocol": "tcp",
        "FromPort": 22,
        "ToPort": 22,
        "IpRanges": [{"CidrIp": "198.51.100.7/32"}],
    }
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[mine])
    start_all(aws())
    (kept,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    assert [rule["IpRanges"][0]["CidrIp"] for rule in kept["IpPermissions"]] == ["198.51.100.7/32"]


def test_the_rights_in_the_docs_are_enough(calls: list[tuple[str, dict[str, Any]]]) -> None:
    """Requests of the launcher and of the head's autoscaler against the two policies of docs/guides/cluster.md."""
    policies = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL)]
    launcher, head = (
        [action for statement in policy["Statement"] for action in statement["Action"]]
        for policy in policies[:2]
    )
    ready = start_all(aws())
    provider = _get_node_provider(ready["provider"], ready["cluster_name"])
    nodes = provider.non_terminated_nodes({})
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(nodes)
    sent = {call for call, _ in calls}
    assert {
        "ec2:RunInstances",
        "ec2:CreateKeyPair",
        "ec2:CreateSecurityGroup",
        "ec2:TerminateInstances",
    } <= sent
    assert not {call for call in sent if not any(fnmatch(call, action) for action in launcher)}
    # The head has the bootstrapped file: it only starts, tags and ends nodes.
    calls.clear()
    _clear_provider_cache()
    provider = _get_node_provider(ready["provider"], ready["cluster_name"])
    provider.create_node(
        ready["available_node_types"]["cpu"]["node_config"], node_tags("worker", "cpu"), 1
    )
    nodes = provider.non_terminated_nodes({})
    provider.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    provider.terminate_nodes(nodes)
    assert not {call for call, _ in calls if not any(fnmatch(call, action) for action in head)}
    for actions in (
        launcher,
        head,
    ):  # which EC2 asks for by itself, for the image and for the nodes' role
        assert {"ssm:GetParameters", "iam:PassRole"} <= set(actions)


# ---- GCP -------------------------------------------------------------------------------------------------------------


class GoogleCloud:
    """Answers requests as an empty project with a default network does."""

    def __init__(self) -> None:
        self.inserted: list[dict[str, Any]] = []
        self.policy: dict[str, Any] = {"bindings": []}
        self.account: dict[str, str] | None = None

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "serviceAccounts" in path:
            if method == "POST":
                self.account = {
                    "email": f"{body['accountId']}@tests.iam.gserviceaccount.com",
                    "projectId": "tests",
                }
            return (
                (200, self.account)
                if self.account
                else (404, {"error": {"message": "no such account"}})
            )
        if path.endswith(":getIamPolicy"):
            return 200, self.policy
        if path.endswith(":setIamPolicy"):
            self.policy = body["policy"]
            return 200, self.policy
        if "/operations/" in path or path.endswith("/setCommonInstanceMetadata"):
            return 200, {"name": "operation", "status": "DONE"}
        if path.endswith("/subnetworks"):
            return 200, {
                "items": [{"selfLink": "projects/tests/regions/us-central1/subnetworks/default"}]
            }
        if path.endswith("/instances") and method == "POST":
            self.inserted.append(body)
            return 200, {"name": "operation", "status": "RUNNING"}
        if path.endswith("/projects/tests"):
            return 200, {
                "name": "tests", "projectId": "tests", "lifecycleState": "ACTIVE", "commonInstanceMetadata": {},
            }  # fmt: skip
        raise AssertionError(f"{method} {path} is not expected")


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> GoogleCloud:
    """What the Google client talks to: its interfaces are described in its own package."""
    there = GoogleCloud()

    def request(
        self: Any, uri: str, method: str = "GET", body: Any = None, headers: Any = None, **_: Any
    ) -> tuple[httplib2.Response, bytes]:
        path = uri.partition("?")[0]
        status, answer = there.answer(method, path, json.loads(body or "{}"))
        return httplib2.Response(
            {"status": str(status), "content-type": "application/json"}
        ), json.dumps(answer).encode()

    monkeypatch.setattr(httplib2.Http, "request", request)
    monkeypatch.setattr(google.auth, "default", lambda **_: (AnonymousCredentials(), "tests"))
    return there


def described() -> dict[str, Any]:
    """Compute Engine's own description of what it takes."""
    documents = resources.files("googleapiclient.discovery_cache.documents")
    return json.loads((documents / "compute.v1.json").read_text())["schemas"]


def check(value: Any, schema: dict[str, Any], schemas: dict[str, Any], path: str) -> None:
    """Raise :class:`AssertionError` for a field that the interface does not have, or a value that it does not take."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if "additionalProperties" in schema:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            assert key in schema.get("properties", {}), f"{path}.{key} is unknown"
            check(inner, schema["properties"][key], schemas, f"{path}.{key}")
    elif isinstance(value, list):
        assert schema["type"] == "array", f"{path} is no list"
        for inner in value:
            check(inner, schema["items"], schemas, f"{path}[]")
    else:
        kinds = {bool: "boolean", str: "string", int: ("integer", "string")}
        assert schema["type"] in kinds[type(value)], (
            f"{path} must be {schema['type']}, got {value!r}"
        )
        assert value in schema.get("enum", [value]), (
            f"{path} must be one of {schema['enum']}, got {value!r}"
        )


def test_compute_engine_starts_a_node_of_every_type(cloud: GoogleCloud) -> None:
    start_all(
        filled_in("cluster.gcp.yaml", PROJECT="tests", BUCKET="latents", FILESTORE="10.0.0.2")
    )
    kinds = {body["labels"]["ray-user-node-type"]: body for body in cloud.inserted}
    schemas = described()
    for kind, body in kinds.items():
        check(body, {"$ref": "Instance"}, schemas, kind)
    images = {
        kind: body["disks"][0]["initializeParams"]["sourceImage"] for kind, body in kinds.items()
    }
    assert set(images) == {"head", "cpu", "gpu_spot", "gpu_on_demand"}
    assert all(
        fnmatch(image, "projects/*/global/images/family/*") for image in images.values()
    )  # never one image
    driver = int(re.search(r"nvidia-(\d+)$", images["gpu_spot"])[1])  # type: ignore[index]
    assert (
        driver >= 580 and images["gpu_on_demand"] == images["gpu_spot"]
    )  # CUDA 13 of the pinned torch
    accounts = {
        kind: body["serviceAccounts"][0]["email"].partition("@")[0] for kind, body in kinds.items()
    }
    assert accounts.pop("head") == "ray-autoscaler-sa-v1" and set(accounts.values()) == {
        "latentwire"
    }
    assert kinds["gpu_spot"]["scheduling"]["provisioningModel"] == "SPOT"


def test_a_field_that_compute_engine_lacks_is_found() -> None:
    with pytest.raises(AssertionError, match=r"scheduling\.provisioningModels is unknown"):
        check(
            {"scheduling": {"provisioningModels": "SPOT"}},
            {"$ref": "Instance"},
            described(),
            "Instance",
        )


def test_gcp_roles_in_the_docs_are_what_ray_gives(cloud: GoogleCloud) -> None:
    start_all(
        filled_in("cluster.gcp.yaml", PROJECT="tests", BUCKET="latents", FILESTORE="10.0.0.2")
    )
    given = {binding["role"] for binding in cloud.policy["bindings"]}
    assert given and all(f"`{role}`" in DOCS for role in given)
