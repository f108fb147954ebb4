"""A strict JSON schema of the KubeRay resources in cluster/, for checking them without a Kubernetes cluster.

The API server drops a misspelt field without a word, and then the cluster has no token or no autoscaler. So every
object here is closed: a field that is not listed is an error. Field names, types and enumerations are those of the
CRDs of KubeRay v1.7.0 (compared field by field) and of the Kubernetes core types, as far as cluster/ has a use for
them; a new one is added here when it is used there.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STR: Schema = {"type": "string"}
INT: Schema = {"type": "integer"}
BOOL: Schema = {"type": "boolean"}
STRINGS: Schema = {"type": "array", "items": STR}
STRING_MAP: Schema = {"type": "object", "additionalProperties": STR}
QUANTITY: Schema = {
    "anyOf": [INT, {"type": "string", "pattern": r"^[0-9.]+(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}]
}


def one_of(*values: str) -> Schema:
    """Return the schema of an enumeration."""
    return {"enum": list(values)}


def many(item: Schema) -> Schema:
    """Return the schema of a list with at least one item."""
    return {"type": "array", "items": item, "minItems": 1}


def record(required: str = "", **fields: Schema) -> Schema:
    """Return the schema of an object that has these fields and no others.

    Args:
        required: Names of the fields that must be there, separated by blanks.
        **fields: The schema of each field.
    """
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def resource(api_version: str, kind: str, spec: Schema | None, **others: Schema) -> Schema:
    """Return the schema of a whole Kubernetes resource; `others` are fields beside its spec that may be there."""
    fields: dict[str, Schema] = {
        "apiVersion": {"const": api_version},
        "kind": {"const": kind},
        "metadata": METADATA,
    }
    if spec is not None:
        fields["spec"] = spec
    return record(" ".join(fields), **fields, **others)


METADATA = record(name=STR, namespace=STR, labels=STRING_MAP, annotations=STRING_MAP)
MATCH_EXPRESSION = record(
    "key operator",
    key=STR,
    operator=one_of("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"),
    values=STRINGS,
)
NODE_TERM = record(matchExpressions=many(MATCH_EXPRESSION), matchFields=many(MATCH_EXPRESSION))
AFFINITY = record(
    nodeAffinity=record(
        requiredDuringSchedulingIgnoredDuringExecution=record(
            "nodeSelectorTerms", nodeSelectorTerms=many(NODE_TERM)
        ),
        preferredDuringSchedulingIgnoredDuringExecution=many(
            record("weight preference", weight=INT, preference=NODE_TERM)
        ),
    )
)
KEY_REFERENCE = record("name key", name=STR, key=STR, optional=BOOL)
NAME_REFERENCE = record("name", name=STR, optional=BOOL)
ENV = many(
    record(
        "name",
        name=STR,
        value=STR,
        valueFrom=record(secretKeyRef=KEY_REFERENCE, configMapKeyRef=KEY_REFERENCE),
    )
)
ENV_FROM = many(record(secretRef=NAME_REFERENCE, configMapRef=NAME_REFERENCE, prefix=STR))
RESOURCES = record(
    requests={"type": "object", "additionalProperties": QUANTITY},
    limits={"type": "object", "additionalProperties": QUANTITY},
)
CONTAINER = record(
    "name image resources",
    name=STR,
    image=STR,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=STRINGS,
    args=STRINGS,
    workingDir=STR,
    env=ENV,
    envFrom=ENV_FROM,
    ports=many(record("containerPort", name=STR, containerPort=INT, protocol=STR)),
    resources=RESOURCES,
    securityContext=record(
        allowPrivilegeEscalation=BOOL,
        readOnlyRootFilesystem=BOOL,
        runAsNonRoot=BOOL,
        runAsUser=INT,
        capabilities=record(drop=STRINGS),
    ),
    volumeMounts=many(
        record("name mountPath", name=STR, mountPath=STR, readOnly=BOOL, subPath=STR)
    ),
)
VOLUME = record(
    "name",
    name=STR,
    emptyDir=record(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
    secret=record("secretName", secretName=STR, optional=BOOL),
    configMap=NAME_REFERENCE,
    persistentVolumeClaim=record("claimName", claimName=STR, readOnly=BOOL),
)
POD_TEMPLATE = record(
    "spec",
    metadata=METADATA,
    spec=record(
        "containers",
        containers=many(CONTAINER),
        volumes=many(VOLUME),
        affinity=AFFINITY,
        nodeSelector=STRING_MAP,
        tolerations=many(
            record(
                key=STR,
                operator=one_of("Exists", "Equal"),
                value=STR,
                effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
            )
        ),
        serviceAccountName=STR,
        automountServiceAccountToken=BOOL,
        terminationGracePeriodSeconds=INT,
        imagePullSecrets=many(record("name", name=STR)),
        priorityClassName=STR,
        securityContext=record(runAsNonRoot=BOOL, runAsUser=INT, runAsGroup=INT, fsGroup=INT),
    ),
)
GROUP: dict[str, Schema] = {
    "rayStartParams": STRING_MAP,
    "resources": STRING_MAP,
    "labels": STRING_MAP,
    "template": POD_TEMPLATE,
}
CLUSTER_SPEC = record(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=STR,
    authOptions=record(mode=one_of("token", "disabled"), secretName=STR, enableK8sTokenAuth=BOOL),
    enableInTreeAutoscaling=BOOL,
    autoscalerOptions=record(
        version=one_of("v1", "v2"),
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=INT,
        image=STR,
        imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
        resources=RESOURCES,
        env=ENV,
        envFrom=ENV_FROM,
    ),
    headServiceAnnotations=STRING_MAP,
    headGroupSpec=record(
        "rayStartParams template",
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        enableIngress=BOOL,
        **GROUP,
    ),
    workerGroupSpecs=many(
        record(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=STR,
            replicas=INT,
            minReplicas=INT,
            maxReplicas=INT,
            idleTimeoutSeconds=INT,
            priority=INT,
            numOfHosts=INT,
            **GROUP,
        )
    ),
)
JOB_SPEC = record(
    "entrypoint rayClusterSpec",
    entrypoint=STR,
    runtimeEnvYAML=STR,
    rayClusterSpec=CLUSTER_SPEC,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterPodTemplate=POD_TEMPLATE,
    backoffLimit=INT,
    activeDeadlineSeconds=INT,
    preRunningDeadlineSeconds=INT,
    shutdownAfterJobFinishes=BOOL,
    ttlSecondsAfterFinished=INT,
    suspend=BOOL,
)
POD_SELECTOR = record(matchLabels=STRING_MAP, matchExpressions=many(MATCH_EXPRESSION))
NETWORK_POLICY_SPEC = record(
    "podSelector policyTypes",
    podSelector=POD_SELECTOR,
    policyTypes=many(one_of("Ingress", "Egress")),
    ingress=many(
        record(
            **{
                "from": many(record(podSelector=POD_SELECTOR, namespaceSelector=POD_SELECTOR)),
                "ports": many(record(port=INT, protocol=STR)),
            }
        )
    ),
)

KINDS: dict[str, Schema] = {
    "RayJob": resource("ray.io/v1", "RayJob", JOB_SPEC),
    "RayCluster": resource("ray.io/v1", "RayCluster", CLUSTER_SPEC),
    "NetworkPolicy": resource("networking.k8s.io/v1", "NetworkPolicy", NETWORK_POLICY_SPEC),
    "ServiceAccount": resource(
        "v1", "ServiceAccount", None, imagePullSecrets=many(record("name", name=STR))
    ),
}
