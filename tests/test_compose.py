"""`docker compose up` with a real Docker Engine; `make test-compose` runs this file.

A copy of the repository starts without any other step, serves the shipped model, and shows it in Chromium. Every
service runs without root and capabilities on a read-only file system. Only loopback ports are published; only the
intended services reach store, database and management. No secret appears in `docker inspect` or in a log. A training
container logs to MLflow and MinIO, and its model is served once its alias moves. Killed services come back, data
survives `down`, and TorchServe serves alone. A broken, empty or lost `.env` never locks users out.

The tests run in this order and share one stack. Without an engine they fail.
"""

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from playwright.sync_api import expect

from handlers.taxonomy import CODES
from tests.chromium import chromium
from tests.compose import OTHER_BUCKETS, REACHED, UNSIGNED, Compose, copy_of_the_repository
from training.data.synthetic import draw_lesion

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]
PUBLISHED = {"streamlit": "8501/tcp", "mlflow": "5001/tcp", "proxy": "8080/tcp", "prometheus": "9090/tcp"}
JOBS = {"secrets", "database", "bucket", "register"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Compose]:
    running = subprocess.run(["docker", "info"], capture_output=True, text=True)
    assert running.returncode == 0, f"A running Docker Engine is needed ($DOCKER_HOST): {running.stderr}"
    stack = Compose(copy_of_the_repository(tmp_path_factory.mktemp("clone")))
    stack("--profile", "*", "down", "--volumes", "--remove-orphans")  # of a run that was killed
    try:
        yield stack
    finally:
        (stack.folder / ".env").unlink(missing_ok=True)
        stack("--profile", "*", "down", "--volumes", "--remove-orphans")


@pytest.fixture(scope="module")
def image(sample_images) -> bytes:
    return sample_images[0]


def secrets_in_force(stack: Compose) -> dict[str, str]:
    code = "print(open('/secrets/kept/secrets.json').read())"
    return json.loads(stack("run", "--rm", "-T", "--entrypoint", "python", "secrets", "-c", code).stdout)


def ready(stack: Compose, image: bytes) -> None:
    """Until a prediction is answered and every service that goes on running is healthy."""
    stack.wait_for(lambda: stack.version_served(image))
    stack.wait_for(
        lambda: all(
            one["State"]["Health"]["Status"] == "healthy"
            for service, one in stack.containers().items()
            if service not in JOBS
        )
    )


def test_up_is_all_that_is_needed(stack, image):
    assert not (stack.folder / ".env").exists()
    began = time.monotonic()
    stack("--profile", "training", "build", timeout=1800)
    seconds = stack.up()
    answer = stack.predict(image, gradcam="overlay").raise_for_status().json()
    print(f"\nimages built in {time.monotonic() - began - seconds:.0f} s, first prediction {seconds:.0f} s after `up`")
    assert answer["model"]["version"] == "1"
    assert list(answer["probabilities"]) == list(CODES)
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert answer["gradcam"]["overlay_png"]
    assert len(answer["gradcam"]["grid"]) == len(answer["gradcam"]["grid"][0]) > 1


def test_an_answer_is_traced_by_its_request_id(stack, image):
    answer = stack.predict(image)
    done = stack("exec", "-T", "promoter", "python", "scripts/lineage.py", answer.headers["x-request-id"], "--json")
    found = json.loads(done.stdout)
    assert found["digest"] == answer.json()["model"]["digest"]
    assert found["prediction"]["image_sha256"] == answer.json()["image"]["sha256"]


def test_the_page_answers(stack, image, tmp_path):
    picture = tmp_path / "lesion.jpg"
    picture.write_bytes(image)
    expected = stack.predict(image).json()["prediction"]["name"]
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.goto(stack.url("STREAMLIT_PORT"))
        page.set_input_files('[data-testid="stFileUploader"] input[type=file]', str(picture))
        expect(page.locator(".sl-verdict h2")).to_contain_text(expected)
        expect(page.get_by_alt_text(re.compile("^Heatmap for "))).to_be_visible()
        expect(page.get_by_text("version 1").first).to_be_visible()
        link = page.get_by_role("link", name="Models and runs in MLflow")
        expect(link).to_have_attribute("href", stack.url("MLFLOW_PORT"))


def test_the_proxy_passes_predictions_and_nothing_else(stack, image):
    address = stack.url("TORCHSERVE_PORT")
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        assert client.get("/ping").json() == {"status": "Healthy"}
        assert "openapi" in client.options("/").json()
        for path in ("/models", "/models/skin_vit", "/metrics", "/wfpredictions/x", "/anything"):
            assert client.get(path).status_code == 404, path
        assert client.delete("/models/skin_vit").status_code == 404
        refused = client.get("/predictions/skin_vit")
        assert refused.status_code == 405
        assert refused.json().keys() == {"code", "type", "message"}
        explained = client.post("/explanations/skin_vit", files={"data": ("lesion.jpg", image)})
        assert explained.json()["gradcam"]["overlay_png"]
        for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}):  # as curl has it, by itself
            assert client.post("/predictions/skin_vit", content=image, headers=headers).status_code == 200
        assert client.put("/predictions/skin_vit", content=image).status_code == 200, "curl -T"
        damaged = client.post("/predictions/skin_vit", files={"data": ("x.jpg", b"no image")})
        assert damaged.status_code == 415
        assert damaged.json()["error"]["code"]
        too_large = client.post("/predictions/skin_vit", content=b"x" * (152 << 20))
        assert too_large.status_code == 413
        assert too_large.json()["code"] == 413
        assert client.post("/predictions/nothing", content=image).status_code == 404


def test_slow_and_idle_clients_do_not_stop_others(stack, image):
    with ExitStack() as connections:
        for number in range(200):
            one = connections.enter_context(socket.create_connection(("127.0.0.1", stack.ports["TORCHSERVE_PORT"])))
            if number % 2:  # half a request, then silence
                one.sendall(b"POST /predictions/skin_vit HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nhalf")
        began = time.monotonic()
        for _ in range(5):
            assert stack.predict(image).status_code == 200
        print(f"\n5 predictions with 200 idle clients: {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < 20


def test_every_service_is_confined(stack):
    services = stack.containers()
    declared = set(stack("config", "--services").stdout.split())
    assert set(services) == declared >= JOBS
    published = {}
    for name, one in services.items():
        host, user = one["HostConfig"], one["Config"]["User"].partition(":")[0]
        assert user not in ("", "0", "root"), name
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert not host["CapAdd"], name
        assert not host["Privileged"], name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["Memory"] > 0, name
        assert host["PidsLimit"] > 0, name
        assert host["Init"], name
        assert host["LogConfig"]["Config"]["max-size"], name
        assert host["NetworkMode"] != "host", name
        assert host["RestartPolicy"]["Name"] == ("no" if name in JOBS else "unless-stopped"), name
        assert (name in JOBS) != ("Health" in one["State"]), name
        assert not any("docker.sock" in mount["Source"] for mount in one["Mounts"]), name
        for port, doors in (host["PortBindings"] or {}).items():
            assert all(door["HostIp"] == "127.0.0.1" for door in doors), name
            published[name] = port
    assert published == {name: port for name, port in PUBLISHED.items() if name in services}
    # What a container may do is what its processes may do.
    for name in set(services) - JOBS:
        status = stack("exec", "-T", name, "cat", "/proc/1/status").stdout
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE), name
        assert not re.search(r"^Uid:\s+0\s", status, re.MULTILINE), name


def test_who_has_no_business_there_reaches_nothing(stack):
    may_reach = {
        "streamlit": {"proxy:8080", "promoter:8083"},
        "proxy": {"torchserve:8080", "promoter:8083", "streamlit:8501"},
        "torchserve": {"proxy:8080", "promoter:8083"},
        "promoter": {"mlflow:5001", "torchserve:8080", "proxy:8080", "streamlit:8501"},
        "mlflow": {"postgres:5432", "minio:9000", "promoter:8083"},
    }
    doors = ["postgres:5432", "minio:9000", "mlflow:5001", "torchserve:8080", "torchserve:8081", "proxy:8080"]
    doors += ["promoter:8083", "streamlit:8501", "1.1.1.1:443"]
    code = REACHED.format(doors=doors)
    for service, allowed in may_reach.items():
        assert (
            set(stack.python(service, code).split()) - {f"{service}:{p}" for p in (5001, 8080, 8083, 8501)} == allowed
        )


def test_the_stores_user_may_use_one_bucket_and_nothing_else(stack):
    assert set(stack.python("mlflow", OTHER_BUCKETS).split()) == {"AccessDenied"}
    assert b"AccessDenied" in stack.python("mlflow", UNSIGNED).encode()


def test_no_secret_is_to_be_seen(stack):
    secrets = secrets_in_force(stack)
    assert len(set(secrets.values())) == len(secrets) >= 7
    shown = json.dumps(stack.containers()) + stack("logs").stdout + stack("config").stdout
    for image in stack("config", "--images").stdout.split():
        shown += subprocess.run(["docker", "history", "--no-trunc", image], capture_output=True, text=True).stdout
    for name, value in secrets.items():
        assert value not in shown, name
    for service in ("torchserve", "promoter", "streamlit", "proxy"):  # and who does not need them has none
        listed = stack("exec", "-T", service, "sh", "-c", "cat /secrets/*/* 2>/dev/null; env").stdout
        seen = {name for name, value in secrets.items() if value in listed}
        own = {"streamlit": {"PAGE_COOKIE_SECRET"}, "promoter": {"JUDGEMENT_KEY"}}
        assert seen == own.get(service, set()), service


@pytest.fixture(scope="module")
def small_training(stack):
    """The words of a short training, on drawn lesions."""
    for code, name in (("MEL", "melanoma"), ("NV", "nevus"), ("BCC", "basal cell carcinoma")):
        folder = stack.folder / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(40):
            draw_lesion(seed, code).resize((96, 72)).save(folder / f"{code.lower()}_{seed}.jpg", quality=90)
    return "training", "--config", "resnet18", "pretrained=false", "image_size=64", "batch_size=16", "bootstrap=0"


def test_a_training_that_is_stopped_ends_by_itself(stack, small_training):
    """It is no child of the container's init, which has to tell it all the same."""
    container = stack("run", "--detach", "-T", *small_training, "--epochs", "1000").stdout.split()[-1]

    def docker(*words: str) -> str:
        done = subprocess.run(["docker", *words, container], env=stack.env, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    try:
        stack.wait_for(lambda: re.search(r"epoch +1/1000 .*lr", docker("logs")), 120)
        docker("stop", "--time", "30")
        said = docker("logs")
        assert re.search(r"Interrupted after [1-9]\d* whole epochs", said), said
        assert "--resume" in said
        assert docker("inspect", "--format", "{{.State.ExitCode}}").strip() == "143"
        runs = stack.registry("POST", "/runs/search", experiment_ids=[str(n) for n in range(9)])["runs"]
        assert "KILLED" in {run["info"]["status"] for run in runs}
    finally:
        docker("rm", "--force")


def test_training_in_its_container_logs_registers_and_is_served(stack, image, small_training):
    began = time.monotonic()
    done = stack("run", "--rm", "-T", *small_training, "--epochs", "1")
    print(f"\none epoch in the container: {time.monotonic() - began:.0f} s")
    assert "version 2 is registered" in done.stdout, done.stdout + done.stderr
    version = stack.registry("GET", "/model-versions/get", name="skin_vit", version="2")["model_version"]
    run = stack.registry("GET", "/runs/get", run_id=version["run_id"])["run"]
    assert run["info"]["status"] == "FINISHED"
    assert {"val_loss", "train_loss"} <= {metric["key"] for metric in run["data"]["metrics"]}
    code = """
import boto3
pages = boto3.client("s3", endpoint_url="http://minio:9000").get_paginator("list_objects_v2").paginate(Bucket="mlflow")
print("\\n".join(entry["Key"] for page in pages for entry in page["Contents"]))
"""
    objects = stack.python("mlflow", code)
    assert re.search(rf"{run['info']['run_id']}/artifacts/bundle/model.safetensors", objects), "not in MinIO"

    assert stack.version_served(image) == "1"
    stack.registry("POST", "/registered-models/alias", name="skin_vit", alias="champion", version="2")
    seconds = stack.wait_for(lambda: stack.version_served(image) == "2")
    print(f"from moved alias to served version: {seconds:.1f} s")
    assert stack.predict(image).json()["model"]["run_id"] == run["info"]["run_id"]


@pytest.mark.parametrize("service", ["torchserve", "promoter", "mlflow", "postgres", "minio", "proxy", "streamlit"])
def test_what_is_killed_and_started_again_heals_the_stack(stack, image, service):
    stack("kill", service)
    if service not in ("torchserve", "proxy"):
        assert stack.version_served(image) == "2", "predictions go on without it"
    stack("start", service)
    ready(stack, image)
    assert stack.version_served(image) == "2"
    for version in ("1", "2"):  # promotion works, too
        stack.registry("POST", "/registered-models/alias", name="skin_vit", alias="champion", version=version)
        stack.wait_for(lambda wanted=version: stack.version_served(image) == wanted)


def test_torchserve_restarts_to_its_version_on_its_own(stack, image):
    stack("stop", "promoter", "mlflow", "postgres", "minio")
    stack("restart", "torchserve")
    seconds = stack.wait_for(lambda: stack.version_served(image) == "2")
    print(f"\nTorchServe alone serves again after {seconds:.1f} s")
    stack.up()
    ready(stack, image)


def test_prometheus_sees_every_service_and_the_dashboard_has_data(stack, image):
    stack("--profile", "monitoring", "up", "--detach", "--wait", "prometheus")
    for _ in range(3):
        stack.predict(image)

    def query(expression: str) -> list:
        address = f"{stack.url('PROMETHEUS_PORT')}/api/v1/query"
        answer = httpx.get(address, params={"query": expression}, timeout=30, trust_env=False).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    assert stack.predict(b"no image").status_code == 415
    for version in ("1", "2"):  # a promoter that has just started has counted nothing yet
        stack.registry("POST", "/registered-models/alias", name="skin_vit", alias="champion", version=version)
        stack.wait_for(lambda wanted=version: stack.version_served(image) == wanted)
    jobs = {"torchserve", "promoter", "mlflow", "minio", "monitor"}
    stack.wait_for(lambda: {one["metric"]["job"] for one in query("up") if one["value"][1] == "1"} == jobs)
    dashboard = json.loads((stack.folder / "containers/grafana/dashboards/stack.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    for expression in expressions:
        if "Requests5XX" in expression:
            query(expression)  # nothing has failed, it may be
            continue
        stack.wait_for(lambda wanted=expression: stack.predict(image) and query(wanted), 150)


def test_data_survives_down(stack, image):
    runs = {"experiment_ids": ["0", "1"], "max_results": 10}
    before = stack.registry("POST", "/runs/search", **runs)["runs"]
    stack("--profile", "*", "down")
    assert not stack("ps", "--all", "--quiet").stdout
    stack.up()
    ready(stack, image)
    assert stack.version_served(image) == "2"
    assert stack.registry("POST", "/runs/search", **runs)["runs"] == before


def test_a_wrong_env_file_is_told_and_a_lost_one_locks_nobody_out(stack, image):
    kept = secrets_in_force(stack)
    env = stack.folder / ".env"

    def up(text: str) -> None:
        env.write_text(text)
        stack("down")
        stack.up()
        ready(stack, image)

    stack.folder.chmod(0o755)  # pytest makes it 0700, and a clone may be
    env.write_text("MINIO_ROOT_PASSWORD=short\n")
    stack("down")
    refused = stack("up", "--detach", "--wait", check=False)
    assert refused.returncode != 0
    assert "MINIO_ROOT_PASSWORD in .env is not valid. Use 8 to 40 letters" in stack("logs", "secrets").stdout

    env.chmod(0o600)
    env.write_text("MINIO_ROOT_PASSWORD=long-enough-for-all\n")
    refused = stack("up", "--detach", "--wait", check=False)
    assert refused.returncode != 0
    assert "Write it there and run `chmod a+rx" in stack("logs", "secrets").stdout
    env.chmod(0o644)

    up("POSTGRES_PASSWORD=\nMINIO_ROOT_PASSWORD=\nnothing-that-anybody-knows=1\n")
    assert secrets_in_force(stack) == kept

    other = {"MLFLOW_DATABASE_PASSWORD": "my-own-database-password", "MINIO_ROOT_PASSWORD": "my-own-root-password"}
    up("".join(f"{name}={value}\n" for name, value in other.items()))
    assert secrets_in_force(stack) == kept | other

    env.unlink()
    stack("run", "--rm", "-T", "secrets", "--rotate")
    stack("down")
    stack.up()
    ready(stack, image)
    rotated = secrets_in_force(stack)
    assert not set(rotated.values()) & set((kept | other).values())
    version = stack.registry("GET", "/model-versions/get", name="skin_vit", version="2")["model_version"]
    stack.registry("POST", "/registered-models/alias", name="skin_vit", alias="champion", version="1")
    stack.wait_for(lambda: stack.version_served(image) == "1")
    assert version["status"] == "READY"


def test_the_gpu_file_adds_devices(stack):
    files = ["-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml"]
    config = json.loads(stack(*files, "--profile", "*", "config", "--format", "json").stdout)["services"]
    for name in ("torchserve", "training"):
        assert config[name]["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
        assert config[name]["build"]["args"]["TORCH_INDEX"] == ""
        assert config[name]["image"].endswith("-gpu")
