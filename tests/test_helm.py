"""The Helm chart.

Helm accepts it, and Kubernetes' schemas accept each manifest, for three sets of values. Wrong values are refused. The
chart and docker-compose.yml agree on images, variables, volumes, commands, memory and health checks; each difference is
listed here with its reason. All pods are restricted. Secrets are references. NetworkPolicies allow, in both directions,
only connections that the networks of docker-compose.yml allow too.

Helm is built by Go, so these tests carry the marker `containers`. tests/test_helm_pods.py runs the pods.
"""

import json
import re

import kubernetes_validate
import pytest

from tests.helm_chart import (
    CHART,
    KUBERNETES,
    RELEASE,
    VALUES,
    arrows,
    composed,
    containers,
    environment,
    helm,
    pods,
    render,
)

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]
COMPOSE = dict(composed())
# Services whose container has the same name in the chart.
SHARED = ("torchserve", "promoter", "monitor", "proxy", "streamlit", "mlflow", "postgres", "minio")
JOBS = ("database", "bucket", "register", "training")
# Variables in docker-compose.yml alone. Secrets are files there, and references here; pods get no proxies of a client.
COMPOSE_ONLY = {"NO_PROXY", "no_proxy", "PGPASSFILE", "AWS_SHARED_CREDENTIALS_FILE", "POSTGRES_PASSWORD_FILE"}
COMPOSE_ONLY |= {"MINIO_CONFIG_ENV_FILE", "PAGE_SECRETS", "PROMOTER_KEY_FILE"}
COMPOSE_ONLY |= {"TORCHSERVE_REPLICAS"}  # several TorchServes of one machine; pods have stores of their own
COMPOSE_ONLY |= {"TINI_KILL_PROCESS_GROUP"}  # train.sh is process 1 in a pod
# Variables in the chart alone, with the reason.
CHART_ONLY = {
    "torchserve": {"TORCHSERVE_MANAGEMENT"},  # its number decides in docker-compose.yml
    "promoter": {"POD_IP"},
    "monitor": {"PGPASSWORD"},
    "proxy": set(),
    "streamlit": {"STREAMLIT_SERVER_ALLOWED_HOSTS"},  # host names of an Ingress
    "mlflow": {"PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "postgres": {"POSTGRES_PASSWORD"},
    "minio": {"MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"},
    "register": set(),
    "training": {"NODE_RANK", "TRAINING_LAUNCHER"},  # torchrun
}
# Values that differ: a volume belongs to root, so TorchServe uses a folder inside it; one pod is one address.
OTHER_VALUES = {
    ("torchserve", "TORCHSERVE_RUN_DIR"): "/run/torchserve/own",
    ("torchserve", "STACK_STATE"): "/run/torchserve/own",
    ("promoter", "TORCHSERVE_URL"): "http://$(POD_IP):8080",
    ("promoter", "TORCHSERVE_MANAGEMENT"): "unix:/run/management/management.sock",
    ("promoter", "PROMOTER_REPLICA"): None,  # the pod's name
    ("promoter", "MODEL_STORE"): "/var/lib/model_store",
    ("monitor", "MODEL_STORE"): "/var/lib/model_store",
    ("mlflow", "MLFLOW_BACKEND_STORE_URI"): "postgresql://mlflow@postgres:5432/mlflow",
    ("monitor", "MONITOR_DATABASE"): "postgresql+psycopg://monitor@postgres:5432/monitor",
}
# The components of the chart, as services.
SERVICES = {
    "serving": ("torchserve", "promoter", "monitor"),
    "page": ("streamlit",),
    "migrations": ("postgres", "bucket"),  # `database` uses Postgres' socket in docker-compose.yml
}


@pytest.fixture(scope="module", params=VALUES)
def manifests(request):
    return render(*VALUES[request.param])


@pytest.fixture(scope="module")
def everything():
    return render(*VALUES["training-values"])


@pytest.fixture(scope="module")
def chart(everything) -> dict[str, dict]:
    """All containers with all parts on, by name."""
    return {container["name"]: container for pod in pods(everything).values() for container in containers(pod)}


@pytest.mark.parametrize("values", VALUES)
def test_helm_finds_no_fault(values):
    done = helm("lint", "--strict", f"--kube-version={KUBERNETES}", str(CHART), *VALUES[values])
    assert done.returncode == 0, done.stdout


def test_kubernetes_knows_every_field(manifests):
    assert len(manifests) > 15
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("postgres.inside=false", "/postgres/host"),
        ("training.enabled=true", "/training/data"),
        ("serving.replicas=0", "/serving/replicas"),
        ("images.tag=", "/images/tag"),
        ("serving.review.keepImagesDays=3", "/serving/review/claim"),
        ("store.endpoint=minio:9000", "/store/endpoint"),
        ("page.signIn.clientId=x", "/page/signIn/metadataUrl"),
        ("replicas=2", "'replicas' not allowed"),
    ],
)
def test_wrong_values_are_refused(setting, fault):
    done = helm("template", RELEASE, str(CHART), f"--kube-version={KUBERNETES}", "--set", setting)
    assert done.returncode != 0
    assert fault in done.stderr


def bare(value: str | None) -> str | None:
    """A value without the release's name in front of the Services."""
    return value and value.replace(f"{RELEASE}-", "")


@pytest.mark.parametrize("name", CHART_ONLY)
def test_variables_are_those_of_docker_compose(chart, name):
    variables = COMPOSE[name]["environment"]
    theirs = {key: "" if value is None else str(value) for key, value in variables.items() if key not in COMPOSE_ONLY}
    ours = environment(chart[name])
    assert set(ours) - set(theirs) == CHART_ONLY[name]
    expected = {key: OTHER_VALUES.get((name, key), value) for key, value in theirs.items()}
    assert {key: bare(ours.get(key)) for key in expected} == expected


@pytest.mark.parametrize("name", SHARED + JOBS)
def test_images_memory_and_volumes_are_those_of_docker_compose(chart, name):
    service, container = COMPOSE[name], chart[name]
    assert container["image"] == service["image"]
    memory = service["mem_limit"].replace("m", "Mi").replace("g", "Gi")
    assert container["resources"]["limits"]["memory"] == memory
    mounts = [mount for mount in service.get("volumes", []) if isinstance(mount, str)]
    theirs = {tuple(mount.split(":")) for mount in mounts if not mount.startswith(("secrets", "."))}
    if name == "database":
        theirs = set()  # it uses the network instead of the socket
    ours = {
        (mount["name"], mount["mountPath"], *(["ro"] if mount.get("readOnly") else []))
        for mount in container["volumeMounts"]
    }
    assert theirs <= ours
    temporary = {path.partition(":")[0] for path in service.get("tmpfs", [])}
    assert temporary <= {mount[1] for mount in ours}


def test_commands_are_those_of_docker_compose(chart):
    for name in ("mlflow", "minio"):
        assert chart[name]["args"] == COMPOSE[name]["command"]
    assert chart["register"]["command"] == COMPOSE["register"]["command"]
    assert chart["bucket"]["command"] == COMPOSE["bucket"]["entrypoint"]
    statements = [
        [line.strip() for line in text.splitlines() if re.match(r"\s*(SELECT|WHERE|ALTER|REVOKE)\b", line)]
        for text in (chart["database"]["args"][0], COMPOSE["database"]["command"][0])
    ]
    statements[1].remove("ALTER ROLE postgres PASSWORD :'postgres';")  # Postgres' socket lets it change its own
    assert statements[0] == statements[1]
    assert len(statements[0]) == 10


@pytest.mark.parametrize("name", SHARED)
def test_a_container_is_ready_if_it_is_healthy_in_docker_compose(chart, name):
    """The promoter and the monitor have no say in a pod's readiness; their check restarts them."""
    command = COMPOSE[name]["healthcheck"]["test"][1:]
    if name == "torchserve":
        socket = environment(chart[name])["TORCHSERVE_MANAGEMENT"]  # its own, not that of a number
        command[-1] = str(socket).removeprefix("unix:")
        assert command[-1].endswith("/management.sock")
    probe = chart[name].get("readinessProbe") or chart[name]["livenessProbe"]
    assert ("readinessProbe" in chart[name]) == (name not in ("promoter", "monitor"))
    if "exec" in probe:
        assert probe["exec"]["command"] == command
    else:
        ports = {port["name"]: port["containerPort"] for port in chart[name]["ports"]}
        assert command[-1] == f"http://127.0.0.1:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"


def test_all_pods_are_restricted(manifests):
    for name, pod in pods(manifests).items():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert all(volume.keys() & {"emptyDir", "persistentVolumeClaim", "secret"} for volume in pod.get("volumes", []))
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


def test_secrets_are_references(manifests):
    assert not [manifest for manifest in manifests if manifest["kind"] == "Secret"]
    for pod in pods(manifests).values():
        for container in containers(pod):
            for name, value in environment(container).items():
                secret = re.search("PASSWORD|SECRET|_KEY|ROOT_USER", name) and not name.endswith("_FILE")
                assert not (secret and value), name


def test_a_sign_in_brings_its_secrets_and_the_way_to_the_provider():
    manifests = render(*VALUES["outside-values"])
    [page] = pods(manifests)["page"]["containers"]
    references = {v["name"]: v["valueFrom"]["secretKeyRef"] for v in page["env"] if "valueFrom" in v}
    assert references == {
        "OIDC_CLIENT_SECRET": {"name": "skin-lesion-page", "key": "client-secret"},
        "PAGE_COOKIE_SECRET": {"name": "skin-lesion-page", "key": "cookie-secret"},
    }
    assert environment(page)["OIDC_REVIEWERS"] == "ann@example.com,@lab.example.com"
    [policy] = [m for m in manifests if m["kind"] == "NetworkPolicy" and m["metadata"]["name"] == "demo-page"]
    provider = {"to": [{"ipBlock": {"cidr": "10.1.2.5/32"}}], "ports": [{"protocol": "TCP", "port": 8443}]}
    assert provider in policy["spec"]["egress"]


def test_network_policies_allow_the_same_in_both_directions(manifests):
    assert arrows(manifests, "ingress") == arrows(manifests, "egress")
    restricted = {m["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
                  for m in manifests if m["kind"] == "NetworkPolicy"}  # fmt: skip
    assert restricted == set(pods(manifests))


def test_network_policies_allow_no_more_than_docker_compose(everything):
    allowed = arrows(everything, "ingress")
    assert ("proxy", "serving", 8080) in allowed
    for source, target, _ in allowed - {("training", "training", "any")}:
        networks = [
            {network for service in SERVICES.get(end, (end,)) for network in COMPOSE[service]["networks"]}
            for end in (source, target)
        ]
        assert networks[0] & networks[1], f"{source} to {target}"
    assert {source for source, target, _ in allowed if target == "minio"} == {"mlflow", "migrations"}
    assert {source for source, target, _ in allowed if target == "postgres"} == {"mlflow", "serving", "migrations"}
    services = [manifest["spec"] for manifest in everything if manifest["kind"] == "Service"]
    ports = {
        (service["selector"]["app.kubernetes.io/component"], port.get("targetPort", port["port"]))
        for service in services
        for port in service["ports"]
    }
    scraped = {("serving", 8082)}
    reached = {(target, port) for _, target, port in allowed} | {("page", 8501), ("training", 29500)}
    assert ports - scraped <= reached, "a Service that no pod may reach"


def test_replicas_have_stores_of_their_own_and_leave_one_after_the_other():
    manifests = render(*VALUES["outside-values"])
    by_kind = {manifest["kind"]: manifest for manifest in manifests if manifest["metadata"]["name"] == "demo-serving"}
    serving = by_kind["StatefulSet"]["spec"]
    assert [claim["metadata"]["name"] for claim in serving["volumeClaimTemplates"]] == ["model-store"]
    assert "replicas" not in serving, "the autoscaler decides"
    scaler = by_kind["HorizontalPodAutoscaler"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 12)
    assert scaler["scaleTargetRef"]["name"] == by_kind["StatefulSet"]["metadata"]["name"]
    assert by_kind["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    for constraint in serving["template"]["spec"]["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"].items() <= serving["template"]["metadata"]["labels"].items()


def test_training_is_an_indexed_job_of_torchrun(everything, chart):
    [job] = [m for m in everything if m["kind"] == "Job" and m["spec"].get("completionMode") == "Indexed"]
    [service] = [m for m in everything if m["kind"] == "Service" and m["metadata"]["name"] == job["metadata"]["name"]]
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    assert pod["subdomain"] == service["metadata"]["name"]
    launcher = environment(chart["training"])["TRAINING_LAUNCHER"].split()
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    expected = ["--nnodes=3", "--nproc-per-node=2", "--node-rank=$(NODE_RANK)", f"--master-addr={first}"]
    assert launcher[:5] == ["torchrun", *expected]
    names = list(environment(chart["training"]))
    assert names.index("NODE_RANK") < names.index("TRAINING_LAUNCHER"), "Kubernetes expands earlier variables only"
    assert chart["training"]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert service["spec"]["clusterIP"] == "None"


def test_the_schema_names_every_value():
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["additionalProperties"] is False
    assert all("additionalProperties" in part for part in schema["properties"].values() if "properties" in part)
