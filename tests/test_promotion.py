"""Promotion with a real MLflow server and a real TorchServe: moving the alias is the only act of deployment.

- the alias decides which version serves; its predecessor stays loaded, the one before that is drained and retired, and
  no request is lost;
- a version with changed files or wrong golden answers is refused: the old one keeps serving, the reason is in MLflow,
  and there is no retry until the alias moves;
- TorchServe returns to the version that served, from the model store alone;
- a model that takes age, sex and site is promoted on golden answers with them, and reads them from forms and JSON;
- an archive runs its own code, not the repository's;
- the command shows every step, and its exit code says how it ended.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pandas as pd
import pytest

from handlers.bundle import CONFIG, WEIGHTS, Bundle, seal
from handlers.metadata import FIELDS, Metadata
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.registration import register
from mlflow_tracking.registry import Registry
from scripts.child_processes import free_ports
from tests.conftest import ROOT
from tests.live import NOWHERE, Promotion, run_script, torchserve_server, variant
from tests.models import tiny_bundle
from tests.waiting import eventually

pytest_plugins = ["tests.fixtures_registry"]
pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def promotion(registry, first_registration, full_bundle, short_folder):
    """Version 1 is champion, and nothing is loaded yet."""
    registry.set_alias("champion", "1")
    with Promotion.started(short_folder / "p", registry, full_bundle) as promotion:
        yield promotion


@pytest.fixture(scope="module")
def second(promotion, tmp_path_factory) -> str:
    """Another good version."""
    return promotion.register(tmp_path_factory.mktemp("second"))


@pytest.fixture
def serving_first(promotion) -> Promotion:
    """Version 1 serves, whatever the previous test did."""
    promotion.champion("1")
    assert promotion.served() == "1"
    return promotion


@pytest.fixture
def serving_second(serving_first, second) -> Promotion:
    serving_first.champion(second)
    assert serving_first.served() == second
    return serving_first


def test_the_first_champion_is_served(promotion):
    assert promotion.predict().status_code == 404
    steps, result = promotion.settle()
    assert steps == ["store version 1", "load version 1", "check version 1", "serve version 1"]
    assert result.settled
    answer = promotion.predict()
    assert answer.json()["model"]["digest"] == promotion.bundle.digest
    expected = promotion.bundle.golden()[0].probabilities
    assert answer.json()["probabilities"] == pytest.approx(expected, abs=1e-2)
    assert (promotion.tag("1", "status"), promotion.tag("1", "reason")) == ("serving", "")
    ledger = ledgers.read(promotion.store)
    assert ledger.release(ledger.default) == result.desired.champion
    assert promotion.settle()[0] == [], "nothing is left to be done"


def test_predictions_and_management_are_apart(serving_first):
    for path in ("/models", "/models/skin_vit", "/metrics", "/workflows"):
        assert httpx.get(serving_first.url + path, trust_env=False).status_code in (404, 405), path
    assert httpx.delete(f"{serving_first.url}/models/skin_vit/1", trust_env=False).status_code in (404, 405)
    assert serving_first.served() == "1"


def test_two_moves_lose_no_request_and_retire_the_oldest(serving_first, second, tmp_path):
    third = serving_first.register(tmp_path)
    with serving_first.clients() as clients:
        to_second, _ = serving_first.champion(second)
        assert to_second[-1] == f"serve version {second}"
        assert serving_first.predict("/1").is_success, "the version before stays"
        to_third, result = serving_first.champion(third)
        assert to_third[-2:] == [f"serve version {third}", "retire version 1"]
        time.sleep(1)
        clients.stop()
    assert result.settled
    assert set(clients.statuses) == {200}
    assert clients.versions == [["1", second, third]] * 4, "no client goes back to an older version"
    status = {version: serving_first.tag(version, "status") for version in ("1", second, third)}
    assert status == {"1": "retired", second: "standby", third: "serving"}
    assert serving_first.predict("/1").status_code == 404

    back, _ = serving_first.champion(second)
    assert back == [f"serve version {second}"], "what served before is still loaded"


@pytest.mark.parametrize("fault", ["forged digest", "wrong answers", "no digest"])
def test_a_bad_version_is_refused_and_the_old_one_serves(serving_first, tmp_path, monkeypatch, fault):
    bad = serving_first.register(tmp_path, golden_shift=0.05 if fault == "wrong answers" else 0.0)
    if fault == "forged digest":
        serving_first.registry.tag(bad, {"digest": "sha256:" + "0" * 64})
    if fault == "no digest":
        serving_first.registry.tag(bad, {"digest": "../../etc"})
    reconciler = serving_first.reconciler()
    serving_first.registry.set_alias("champion", bad)
    steps, result = serving_first.settle(reconciler)
    assert result.errors
    assert f"serve version {bad}" not in steps
    assert serving_first.served() == "1"
    assert bad not in {held.release.version for held in result.actual.loaded.values()}, "it is not left in memory"
    reason = {
        "forged digest": "is not the one that was registered",
        "wrong answers": "golden parity: golden/MEL.jpg: a probability differs by",
        "no digest": "has no valid digest tag",
    }[fault]
    assert serving_first.tag(bad, "status") == "refused"
    assert reason in serving_first.tag(bad, "reason")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "download_bundle", lambda *_: pytest.fail("it was tried again"))
        again = reconciler.reconcile()
    assert again.done == ()
    assert again.errors == result.errors, "the reason stays to be seen"

    serving_first.registry.set_alias("champion", "1")
    assert serving_first.settle(reconciler)[1].settled, "another alias counts at once"


@pytest.mark.parametrize("tampered", ["weights", "bundle.json", "weights, and every hash made to fit"])
def test_files_tampered_with_in_the_store_are_refused_and_the_old_version_serves(
    serving_first, tmp_path, tmp_path_factory, tampered
):
    """By someone who can write to the artifact store, but not to the registry's database."""
    version = serving_first.register(tmp_path)
    source = serving_first.registry.version(version).source.removeprefix("models:/")
    [bundle] = (path.parent for path in tmp_path_factory.getbasetemp().rglob(f"{source}/**/{CONFIG}"))
    if "weights" in tampered:
        weights = bytearray((bundle / WEIGHTS).read_bytes())
        weights[-1] ^= 1
        (bundle / WEIGHTS).write_bytes(weights)
    if "fit" in tampered:
        seal(bundle, Bundle.load(serving_first.bundle.path).config)
    if "json" in tampered:
        text = (bundle / CONFIG).read_text()
        (bundle / CONFIG).write_text(text.replace('"temperature": 0.7', '"temperature": 7.0'))
        assert (bundle / CONFIG).read_text() != text
    steps, result = serving_first.champion(version)
    assert result.errors
    assert f"load version {version}" not in steps
    assert serving_first.tag(version, "status") == "refused"
    reason = "is damaged" if tampered == "weights" else "is not the one that was registered"
    assert reason in serving_first.tag(version, "reason")
    assert serving_first.served() == "1"


def test_a_version_whose_worker_does_not_start_is_reported_soon(serving_first, tmp_path, monkeypatch):
    broken = variant(serving_first.bundle, tmp_path, starts=False)
    with pytest.raises(RuntimeError):
        register(serving_first.registry, broken.path)
    monkeypatch.setattr("mlflow_tracking.registration.tags", lambda bundle: {"digest": bundle.digest})  # which tried it
    version = register(serving_first.registry, broken.path).version.version
    began = time.monotonic()
    _, result = serving_first.champion(version)
    assert time.monotonic() - began < 60, "not only after the whole start-up time-out"
    assert "could not be loaded" in result.errors[0]
    assert version not in {held.release.version for held in result.actual.loaded.values()}
    assert serving_first.tag(version, "status") == "failed"
    assert serving_first.served() == "1"


def test_a_worker_that_is_gone_is_brought_back(serving_first):
    reconciler = serving_first.reconciler()
    reconciler.executor.torchserve.scale("1", 0, synchronous=True)
    assert not serving_first.predict().is_success
    steps, result = serving_first.settle(reconciler)
    assert steps == ["revive version 1"]
    assert result.actual.default == "1"
    assert serving_first.served() == "1"


def test_torchserve_comes_back_alone_and_the_promoter_completes_it_without_mlflow(serving_second, second):
    serving_second.kill()
    began = time.monotonic()
    serving_second.server.start()
    eventually(lambda: serving_second.served() == second)
    print(f"TorchServe served again {time.monotonic() - began:.1f} s after its start")
    assert serving_second.predict("/1").status_code == 404, "what served before does not delay the first answer"
    steps, result = serving_second.settle(serving_second.reconciler(NOWHERE))
    assert steps[-1] == "load version 1"
    [error] = result.errors
    assert error.startswith(f"MLflow at {NOWHERE} does not answer.")
    assert serving_second.predict("/1").is_success


def test_a_changed_archive_is_left_out_and_fetched_again(serving_second, second):
    ledger = ledgers.read(serving_second.store)
    archive = serving_second.store / str(ledger.default)
    serving_second.kill()
    archive.write_bytes(archive.read_bytes().replace(b"Research use only", b"Diagnostic device"))
    serving_second.server.start()
    eventually(lambda: serving_second.served() == "1")
    assert f"Version {second} is left out" in serving_second.server.text()
    steps, result = serving_second.settle()
    assert result.settled
    assert f"store version {second}" in steps
    assert serving_second.served() == second


def test_an_archive_runs_its_own_code(serving_first, short_folder):
    """TorchServe from a copy of the repository with changed handlers, on the same store."""
    copy = short_folder / "copy"
    for name in ("handlers", "torchserve"):
        shutil.copytree(ROOT / name, copy / name)
    prediction = copy / "handlers" / "prediction.py"
    before = prediction.read_text()
    prediction.write_text(before.replace("Research use only.", "Changed."))
    assert prediction.read_text() != before
    folder = short_folder / "c"
    folder.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    server = torchserve_server(folder, serving_first.store, root=copy, PYTHONPATH=str(copy), PATH=path).start()
    try:
        other = Promotion(folder, server, serving_first.registry, serving_first.bundle)
        answer = eventually(lambda: (found := other.predict()).is_success and found.json())
        assert answer["disclaimer"] == "Research use only. Not a medical device."
        assert answer["model"] == serving_first.predict().json()["model"]
        assert serving_first.server.healthy(), "two stacks live side by side"
    finally:
        server.stop()


def test_the_command_moves_the_alias_and_shows_every_step(serving_first, second):
    done = run_script("promote.py", "to", second, **serving_first.env)
    assert done.returncode == 0, done.stderr
    assert f"champion is version {second}" in done.stdout
    assert f"serve version {second}" in done.stdout
    assert f"Version {second} serves." in done.stdout
    assert serving_first.served() == second
    table = run_script("promote.py", "status", **serving_first.env).stdout
    [row] = [line for line in table.splitlines() if "champion" in line]
    assert "answers" in row
    assert "serving" in row


def test_the_commands_errors_are_sentences_and_codes(serving_first):
    unknown = run_script("promote.py", "to", "99", **serving_first.env)
    assert unknown.returncode == 1
    assert "has no version 99" in unknown.stderr
    away = run_script("promote.py", "to", "1", **serving_first.env | {"MLFLOW_TRACKING_URI": NOWHERE})
    assert away.returncode == 3
    assert away.stderr.startswith(f"MLflow at {NOWHERE} does not answer.")
    assert "Traceback" not in unknown.stderr + away.stderr
    assert serving_first.served() == "1"


def test_the_service_follows_the_alias_and_reports_it(serving_first, second, tmp_path):
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        service = subprocess.Popen(
            [sys.executable, "-m", "mlflow_tracking.promotion.service"],
            env=os.environ | serving_first.env | {"PROMOTER_PORT": str(port)},
            stdout=log,
            stderr=log,
        )
    try:

        def status() -> dict:
            return httpx.get(f"{url}/status", trust_env=False).json()

        eventually(lambda: status()["settled"])
        assert httpx.get(f"{url}/healthz", trust_env=False).json() == {"status": "ok"}
        serving_first.registry.set_alias("champion", second)
        began = time.monotonic()
        eventually(lambda: serving_first.served() == second)
        print(f"the moved alias was served after {time.monotonic() - began:.1f} s")
        told = eventually(lambda: (now := status())["actual"]["serving"]["version"] == second and now)
        assert told["desired"]["champion"] == told["actual"]["serving"]
        assert f"serve {second}" in [f"{step['action']} {step['version']}" for step in told["steps"]]
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        assert f"promoter_serving_version {float(second)}" in metrics
        assert 'promoter_steps_total{action="serve",state="done"} 1.0' in metrics
        assert httpx.get(f"{url}/nothing", trust_env=False).status_code == 404
    finally:
        service.send_signal(signal.SIGTERM)
        code = service.wait(20)
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert (lines[0]["message"], lines[-1]["message"]) == ("started", "stopped")


def test_a_model_that_takes_metadata_is_promoted_and_reads_it_over_rest(serving_first, tmp_path, sample_images):
    refused = serving_first.tell("/1", sample_images[0], age="71")
    assert (refused.status_code, "takes no age" in refused.text) == (400, True)

    bundle = tiny_bundle(tmp_path / "bundle", metadata=Metadata.of(FIELDS))
    version = register(serving_first.registry, bundle.path).version.version
    steps, result = serving_first.champion(version)
    assert f"serve version {version}" in steps, result.errors
    for case in bundle.golden():
        answer = serving_first.tell("", case.image, **{name: str(v) for name, v in case.metadata.items()})
        assert answer.json()["probabilities"] == pytest.approx(case.probabilities, abs=1e-2)
    told = serving_first.tell("", sample_images[0], age="71", sex="", site="Head/Neck").json()
    assert told["metadata"] == {"age": 71.0, "sex": None, "site": "head/neck"}
    assert told["model"]["takes"] == Metadata.of(FIELDS).choices
    body = {"image": base64.b64encode(sample_images[0]).decode(), "age": 71, "site": "head/neck", "sex": None}
    as_json = httpx.post(f"{serving_first.url}/predictions/skin_vit", json=body, timeout=60, trust_env=False)
    assert as_json.json()["probabilities"] == pytest.approx(told["probabilities"], abs=1e-6)
    for field, value in (("age", "-1"), ("age", "1e400"), ("sex", "\x00"), ("site", "../../etc/passwd")):
        refused = serving_first.tell("", sample_images[0], **{field: value})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
        assert refused.json()["error"]["message"].startswith(f"{field} is ")
    assert serving_first.tell("", sample_images[0], age="71", site="head/neck").json() == told

    # As MLflow runs it.
    import mlflow

    model = mlflow.pyfunc.load_model(f"models:/skin_vit/{version}")
    table = pd.DataFrame({"image": sample_images[:2], "age": [71.0, None], "site": ["head/neck", None]})
    answers = model.predict(table)
    assert answers.iloc[0].to_dict() == pytest.approx(told["probabilities"], abs=1e-2)
    alone = serving_first.tell("", sample_images[1]).json()["probabilities"]
    assert answers.iloc[1].to_dict() == pytest.approx(alone, abs=1e-2)
    with pytest.raises(ValueError, match="row 0 is refused. age is"):
        model.predict(pd.DataFrame({"image": sample_images[:1], "age": [500.0]}))


def test_stopping_leaves_no_process(serving_first):
    group = ["pgrep", "-g", str(serving_first.server.process.pid)]
    serving_first.server.process.send_signal(signal.SIGTERM)
    serving_first.server.process.wait(20)
    eventually(lambda: subprocess.run(group, check=False, capture_output=True).returncode == 1, 15)
