"""What KubeRay's operator and Kubernetes take, written down as a JSON schema as far as deploy/kuberay uses it.

Field names, types and required fields are those of the custom resource definitions of KubeRay 1.5 and of the API of Kubernetes;
the definitions themselves are a megabyte each. A field that is not here is refused, so that a typing error is, as it is by ``kubectl
apply``: a file that needs another field gets it here, after a look at its definition.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
FLAG: Schema = {"type": "boolean"}
STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGT]|[KMGT]i)?$"}
NAME: Schema = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
PATH: Schema = {"type": "string", "pattern": "^/"}


def fields(*required: str, **properties: Schema) -> Schema:
    """An object with these fields and no other."""
    assert set(required) <= set(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def some(item: Schema) -> Schema:
    """A list with at least one entry."""
    return {"type": "array", "items": item, "minItems": 1}


METADATA = fields("name", name=NAME, namespace=NAME, labels=STRINGS, annotations=STRINGS)
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}
EXPRESSION = fields(
    "key",
    "operator",
    key=STRING,
    operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]},
    values=some(STRING),
)
CONTAINER = fields(
    "name",
    "image",
    "resources",
    name=NAME,
    image=STRING,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    env=some(fields("name", "value", name=STRING, value={"type": "string"})),
    resources=fields("limits", limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=some(fields("name", "mountPath", name=NAME, mountPath=PATH, readOnly=FLAG)),
    lifecycle=fields(
        "preStop", preStop=fields("exec", exec=fields("command", command=some(STRING)))
    ),
)
POD = fields(
    "containers",
    containers=some(CONTAINER),
    securityContext=fields(runAsNonRoot=FLAG, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT),
    serviceAccountName=NAME,
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=STRINGS,
    affinity=fields(
        nodeAffinity=fields(
            requiredDuringSchedulingIgnoredDuringExecution=fields(
                "nodeSelectorTerms",
                nodeSelectorTerms=some(fields(matchExpressions=some(EXPRESSION))),
            )
        )
    ),
    tolerations=some(
        fields(
            key=STRING,
            operator={"enum": ["Exists", "Equal"]},
            value=STRING,
            effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        )
    ),
    volumes=some(
        fields(
            "name",
            "persistentVolumeClaim",
            name=NAME,
            persistentVolumeClaim=fields("claimName", claimName=NAME, readOnly=FLAG),
        )
    ),
)
TEMPLATE = fields("spec", spec=POD, metadata=fields(labels=STRINGS, annotations=STRINGS))
CLUSTER = fields(
    "headGroupSpec",
    "rayVersion",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=NAME),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
    ),
    headGroupSpec=fields("template", rayStartParams=STRINGS, template=TEMPLATE),
    workerGroupSpecs=some(
        fields(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            rayStartParams=STRINGS,
            template=TEMPLATE,
        )
    ),
)


def resource(version: str, kind: str, spec: Schema) -> Schema:
    """A whole document."""
    return fields(
        "apiVersion",
        "kind",
        "metadata",
        "spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


RAY_CLUSTER = resource("ray.io/v1", "RayCluster", CLUSTER)
RAY_JOB = resource(
    "ray.io/v1",
    "RayJob",
    fields(
        "rayClusterSpec",
        "entrypoint",
        entrypoint=STRING,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        runtimeEnvYAML=STRING,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        backoffLimit=COUNT,
        rayClusterSpec=CLUSTER,
    ),
)
CLAIM = resource(
    "v1",
    "PersistentVolumeClaim",
    fields(
        "accessModes",
        "resources",
        accessModes=some({"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]}),
        storageClassName=STRING,
        resources=fields("requests", requests=QUANTITIES),
    ),
)
