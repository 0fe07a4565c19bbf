"""Container images, checked without an engine; tests/test_compose.py runs them.

The pinned requirements of each image contain what its code imports, with the versions of the environment. Every
service is confined, also those of a profile, and publishes ports on loopback only. Secrets are random, valid and kept.
Values in `.env` win; an unusable value gives one sentence. The health check fails for a service that cannot work.
"""

import ast
import importlib.util
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from http.server import HTTPServer
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from scripts.stack import REGISTER
from tests.http_stub import Answer, handler, running, serve

ROOT = Path(__file__).parent.parent
ROOMS = {"handlers", "monitoring", "training", "mlflow_tracking", "streamlit_app", "scripts"}
# requirements/NAME.txt: the code that runs on it
IMAGES = {
    "prediction": ["handlers/*.py"],
    "torchserve": ["handlers/*.py", "torchserve/*.py"],
    "promoter": [
        "handlers/*.py",
        "mlflow_tracking/**/*.py",
        *(f"scripts/{name}.py" for name in ("lineage", "promote", "register_model", "replay")),
    ],
    "training": ["handlers/*.py", "training/**/*.py", "scripts/prepare_data.py", "scripts/register_model.py"],
    "mlflow": ["containers/*.py", "mlflow_tracking/registry_database.py"],
    "monitor": [
        "monitoring/**/*.py",
        "scripts/forget.py",
        "scripts/load_outcomes.py",
        *(f"mlflow_tracking/{name}.py" for name in ("settings", "command_line", "version_card")),
        *(f"mlflow_tracking/promotion/{name}.py" for name in ("audit", "plan")),
        *(f"handlers/{name}.py" for name in ("errors", "files", "kept_images", "taxonomy")),
    ],
    "page": ["streamlit_app/**/*.py"],
}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "containers" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def secrets(tmp_path, monkeypatch) -> ModuleType:
    """make_secrets.py with folders of its own."""
    module = script("make_secrets")
    for name in ("kept", "mlflow", "monitor", "postgres", "minio", "grafana", "page", "promoter"):
        (tmp_path / "secrets" / name).mkdir(parents=True)
    monkeypatch.setattr(module, "SECRETS", tmp_path / "secrets")
    monkeypatch.setattr(module, "ENV_FILE", tmp_path / ".env")
    monkeypatch.setattr(sys, "argv", ["make_secrets.py"])
    monkeypatch.delenv("NAMED_SECRETS", raising=False)
    return module


def test_make_up_and_the_containers_register_the_shipped_model_alike():
    """`--if-empty` decides in both cases."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert services["register"]["command"] == ["python", *REGISTER]


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==([^ ;\n]+)", text, re.MULTILINE))


def imported(path: Path) -> set[str]:
    """Return the top-level names of all modules that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_what_its_code_imports(image):
    distributions, pinned = packages_distributions(), {name.lower().replace("_", "-") for name in pins(image)}
    paths = [path for pattern in IMAGES[image] for path in ROOT.glob(pattern)]
    assert paths
    rooms = {path.relative_to(ROOT).parts[0] for path in paths}
    rooms |= {"mlflow_tracking"} if image == "training" else set()  # made from the promoter's image
    rooms |= {"handlers"} if image == "mlflow" else set()
    for path in paths:
        modules = imported(path)
        assert not modules & ROOMS - rooms, f"{path.relative_to(ROOT)} imports a room that the image lacks"
        for module in modules - ROOMS - set(sys.stdlib_module_names):
            providers = {name.lower().replace("_", "-") for name in distributions[module]}
            assert providers & pinned, f"{path.relative_to(ROOT)} imports {module}, not in requirements/{image}.txt"


def test_the_promoter_has_the_scripts_that_run_there():
    [line] = re.findall(
        r"^COPY --chown=app (scripts/__init__.py .*) scripts/$", (ROOT / "Dockerfile").read_text(), re.M
    )
    scripts = [path for path in IMAGES["promoter"] if path.startswith("scripts/")]
    assert line.split()[1:] == scripts


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_pins_what_the_environment_pins(image):
    assert pins(image).items() <= pins("all").items()


def test_the_compose_file_names_every_secret(secrets):
    named = COMPOSE["services"]["secrets"]["environment"]["NAMED_SECRETS"]
    assert re.findall(r"\$\{(\w+):\+\1\}", named) == [*secrets.NAMES, *secrets.ISSUED]


def users() -> dict[str, str]:
    """The user of each stage of the Dockerfile."""
    found: dict[str, str] = {}
    stage = ""
    for words in (line.split() for line in (ROOT / "Dockerfile").read_text().splitlines()):
        if words[:1] == ["FROM"]:
            stage = words[3]
            found[stage] = found.get(words[1], "root")
        elif words[:1] == ["USER"]:
            found[stage] = words[1]
    return found


COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
JOBS = {"secrets", "database", "bucket", "register", "training"}


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_confined(name):
    one = COMPOSE["services"][name]
    user = one.get("user") or users()[one["build"]["target"]]
    assert user.partition(":")[0] not in ("", "0", "root")
    assert one["read_only"] is True
    assert one["cap_drop"] == ["ALL"]
    assert not one.keys() & {"cap_add", "privileged", "devices", "pid", "ipc", "userns_mode"}
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert one["mem_limit"]
    assert one["pids_limit"] > 0
    assert one["init"] is True
    assert one["logging"]["options"]["max-size"]
    assert one["restart"] == ("no" if name in JOBS else "unless-stopped")
    assert (name in JOBS) != ("healthcheck" in one)
    assert bool(one.get("networks")) != (one.get("network_mode") == "none")
    assert all(port.startswith("127.0.0.1:") for port in one.get("ports", []))
    for mount in one.get("volumes", []):
        source, _, place = (mount if isinstance(mount, str) else f"{mount['source']}:{mount['target']}").partition(":")
        # Nothing of this machine's can be written, and SELinux lets containers read it.
        assert source in COMPOSE["volumes"] or place.endswith(":ro,z")


def test_image_names_are_complete_for_podman():
    named = {one["image"] for one in COMPOSE["services"].values() if "build" not in one}
    named |= {re.search("^ARG PYTHON_IMAGE=(.*)$", (ROOT / "Dockerfile").read_text(), re.M)[1]}
    assert len(named) == 5
    assert all(re.match(r"(\$\{MINIO_IMAGE:-)?docker\.io/\w+/", name) for name in named), named


def test_an_older_compose_prints_the_version_that_is_required():
    """Compose before 2.10 fails at ":+", and prints the value with it."""
    named = COMPOSE["services"]["secrets"]["environment"]["NAMED_SECRETS"]
    sentence = named.partition(" ${")[0]
    version = re.fullmatch(r"Docker Compose ([\d.]+) or later is required\.", sentence)
    assert version and f"Docker Compose {version[1]} or later" in (ROOT / "docs/docker.md").read_text()


@pytest.mark.parametrize("place", ["predictions", "explanations"])
def test_the_proxy_passes_the_methods_that_torchserve_accepts(place):
    text = (ROOT / "containers/nginx.conf").read_text()
    assert re.search(rf"location /{place}/ \{{\s+limit_except POST PUT OPTIONS \{{ deny all; \}}", text)


@pytest.mark.parametrize("name", ["minio", "bucket", "mlflow", "register", "promoter", "training", "grafana"])
def test_services_reach_each_other_without_a_proxy(name):
    environment = COMPOSE["services"][name]["environment"]
    named = {"localhost", "127.0.0.1", "mlflow", "minio", "postgres", "torchserve", "prometheus"}
    assert named <= set(environment["NO_PROXY"].split(","))
    assert environment["no_proxy"] == environment["NO_PROXY"]


def test_only_ports_of_people_and_scrapers_are_published():
    published = {name for name, one in COMPOSE["services"].items() if one.get("ports")}
    assert published == {"streamlit", "mlflow", "proxy", "prometheus", "grafana"}
    reached = {network for name in published for network in COMPOSE["services"][name]["networks"]}
    assert COMPOSE["networks"]["outside"] == {}
    assert "outside" not in reached
    for name in reached - {"database", "store", "inference"}:
        assert COMPOSE["networks"][name]["driver_opts"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    for name in ("database", "store", "inference"):
        assert COMPOSE["networks"][name] == {"internal": True}


def test_secrets_are_random_kept_and_private(secrets, capsys):
    assert secrets.main() == 0
    folder = secrets.SECRETS
    first = json.loads((folder / secrets.KEPT).read_text())
    assert first.keys() == secrets.NAMES.keys()
    assert len(set(first.values())) == len(first)
    assert all(secrets.ALLOWED.fullmatch(value) for value in first.values())
    assert first["MLFLOW_DATABASE_PASSWORD"] in (folder / "mlflow/pgpass").read_text()
    assert (folder / "postgres/mlflow").read_text() == first["MLFLOW_DATABASE_PASSWORD"]
    for private in (secrets.KEPT, "mlflow/pgpass", "mlflow/aws", "monitor/pgpass"):  # libpq insists, for its own
        assert stat.S_IMODE((folder / private).stat().st_mode) == 0o600
    assert secrets.main() == 0
    assert json.loads((folder / secrets.KEPT).read_text()) == first
    shown = capsys.readouterr()
    assert not any(value in shown.out + shown.err for value in first.values())


def test_rotation_replaces_all_secrets(secrets, monkeypatch):
    secrets.main()
    first = json.loads((secrets.SECRETS / secrets.KEPT).read_text())
    monkeypatch.setattr(sys, "argv", ["make_secrets.py", "--rotate"])
    assert secrets.main() == 0
    second = json.loads((secrets.SECRETS / secrets.KEPT).read_text())
    assert not set(first.values()) & set(second.values())


@pytest.mark.parametrize(
    ("line", "named", "file", "kept"),
    [
        ("MINIO_ROOT_PASSWORD='chosen-by-me'\nSTREAMLIT_PORT=9\n", "A sentence for old versions.  MINIO_ROOT_PASSWORD ",
         "minio/config.env", 'export MINIO_ROOT_PASSWORD="chosen-by-me"'),
        ("OIDC_CLIENT_SECRET='any \"characters\" of any length'\n", "OIDC_CLIENT_SECRET",
         "page/oidc_client_secret", 'any "characters" of any length'),
    ],
    ids=["chosen", "issued by a provider"],
)  # fmt: skip
def test_a_value_of_env_wins_and_stays(secrets, monkeypatch, line, named, file, kept):
    secrets.ENV_FILE.write_text(line)
    monkeypatch.setenv("NAMED_SECRETS", named)
    assert secrets.main() == 0
    secrets.ENV_FILE.unlink()
    monkeypatch.setenv("NAMED_SECRETS", "")
    assert secrets.main() == 0
    assert kept in (secrets.SECRETS / file).read_text().splitlines()


def test_only_the_file_for_the_sign_in_lets_the_page_reach_the_outside():
    override = yaml.safe_load((ROOT / "docker-compose.sign-in.yml").read_text())["services"]
    assert override == {"streamlit": {"networks": ["frontend", "outside"]}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("MINIO_ROOT_PASSWORD=short\n", "is not valid. Use 8 to 40 letters"),
        ('MINIO_ROOT_PASSWORD="with a: blank"\n', "is not valid. Use 8 to 40 letters"),
        ("", "cannot read it from the .env next to docker-compose.yml"),
        ("MINIO_ROOT_PASSWORD=\n", "cannot read it from the .env next to docker-compose.yml"),
    ],
)
def test_a_bad_value_is_reported_and_changes_nothing(secrets, monkeypatch, capsys, text, sentence):
    secrets.main()
    before = (secrets.SECRETS / secrets.KEPT).read_text()
    secrets.ENV_FILE.write_text(text)
    monkeypatch.setenv("NAMED_SECRETS", "MINIO_ROOT_PASSWORD")
    assert secrets.main() == 1
    assert sentence in capsys.readouterr().err
    assert (secrets.SECRETS / secrets.KEPT).read_text() == before


@pytest.mark.parametrize("damage", ["{", "[]", '{"MINIO_ROOT_USER": 1}', "\udcff"])
def test_damaged_secrets_are_reported_and_replaced(secrets, monkeypatch, capsys, damage):
    (secrets.SECRETS / secrets.KEPT).write_bytes(damage.encode(errors="surrogateescape"))
    assert secrets.main() == 1
    assert "--rotate" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["make_secrets.py", "--rotate"])
    assert secrets.main() == 0
    assert json.loads((secrets.SECRETS / secrets.KEPT).read_text()).keys() == secrets.NAMES.keys()
    monkeypatch.setattr(sys, "argv", ["make_secrets.py"])
    assert secrets.main() == 0


class UnixServer(HTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)


@pytest.fixture
def answers() -> dict[str, tuple[int, object]]:
    return {}


@pytest.fixture(params=["tcp", "unix"])
def server(request, answers, tmp_path) -> Iterator[str]:
    def answer(asked, _) -> Answer:
        status, value = answers.get(asked.path, (404, {}))
        return Answer(status, json.dumps(value).encode())

    if request.param == "tcp":
        with serve(answer) as url:
            yield url
    else:
        with running(UnixServer(str(tmp_path / "s"), handler(answer))):
            yield str(tmp_path / "s")


@pytest.mark.parametrize("server", ["tcp"], indirect=True)
def test_a_url_must_answer_2xx(server, answers):
    check = script("healthcheck")
    answers |= {"/good": (200, {}), "/bad": (503, {})}
    assert check.main([f"{server}/good"]) == 0
    assert check.main([f"{server}/bad"]) == 1
    assert check.main(["http://127.0.0.1:1/"]) == 1


@pytest.mark.parametrize("server", ["unix"], indirect=True)
@pytest.mark.parametrize(
    ("models", "workers", "code"),
    [
        ([], [], 1),
        (["skin_vit"], [], 1),
        (["skin_vit"], ["UNLOADING", "STARTED"], 1),
        (["skin_vit"], ["STARTED", "READY"], 0),
    ],
)
def test_torchserve_must_have_a_ready_worker(server, answers, models, workers, code):
    answers["/models"] = (200, {"models": [{"modelName": name} for name in models]})
    answers["/models/skin_vit"] = (200, [{"workers": [{"status": status} for status in workers]}])
    assert script("healthcheck").main(["--torchserve", server]) == code
    assert script("healthcheck").main(["--torchserve", f"{server}.not"]) == 1


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (["--epochs", "3"], ["manifest=/app/runs/manifest.csv", "data_dir=/app/data", "--epochs", "3"]),
        (["epochs=3", "manifest=mine.csv"], ["epochs=3", "manifest=mine.csv"]),
        (["--resume", "runs/mine/last.pt", "epochs=9"], ["--resume", "runs/mine/last.pt", "epochs=9"]),
    ],
)
def test_the_training_container_makes_a_manifest_unless_one_is_set(tmp_path, given, asked):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/asked\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", ROOT / "containers" / "train.sh", *given], check=True, env=environment)
    assert (tmp_path / "asked").read_text().split() == ["training/train.py", *asked]


def test_the_training_container_may_start_torchrun(tmp_path):
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/asked\n')
    torchrun.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TRAINING_LAUNCHER": "torchrun --nnodes=2"}
    subprocess.run(["sh", ROOT / "containers" / "train.sh", "manifest=m.csv"], check=True, env=environment)
    assert (tmp_path / "asked").read_text().split() == ["--nnodes=2", "training/train.py", "manifest=m.csv"]
