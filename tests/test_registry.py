"""The registry, on a real MLflow server.

- a bundle becomes a version with its graph, tags and description; the same bundle never becomes two;
- a version from a run is linked to it, and the run is left as it was;
- bundles are fetched as files, and are then what was registered;
- MLflow itself can run a version, without pickle: image bytes or base64 in, nine probabilities out;
- what is not there is None or a sentence, a server that is away is another, and neither takes minutes;
- the server answers only to its own names, and sends no statistics.
"""

import base64
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pandas as pd
import pytest

from handlers.bundle import WEIGHTS, Bundle, BundleError
from handlers.predictor import Predictor
from handlers.taxonomy import CODES
from mlflow_tracking.promotion.gates import judgement_report as report
from mlflow_tracking.promotion.gates.base import Outcome, Verdict
from mlflow_tracking.promotion.gates.judge import Judgement, Question
from mlflow_tracking.promotion.shared_judgements import SharedJudgements
from mlflow_tracking.registration import register
from mlflow_tracking.registry import Registry, RegistryError, RegistryUnavailable
from tests.commands import call_script
from tests.http_stub import Answer, serve
from tests.live import variant
from training import export

pytest_plugins = ["tests.fixtures_registry"]
pytestmark = [pytest.mark.live, pytest.mark.timeout(400)]


@pytest.fixture(scope="module", autouse=True)
def champion(registry, first_registration):
    """Version 1, though other modules may have moved the alias on the server that they share."""
    if registry.resolve("champion").version != "1":
        registry.set_alias("champion", "1")


def test_the_command_registers_a_bundle_as_champion(first_registration, registry, full_bundle):
    assert "skin_vit version 1 is registered" in first_registration.stdout
    assert "champion is version 1" in first_registration.stdout
    [version] = [one for one in registry.versions() if one.version == "1"]
    assert "champion" in version.aliases
    assert version.tags["digest"] == full_bundle.digest
    assert version.tags["architecture"] == full_bundle.config.architecture
    assert version.tags["balanced_accuracy"] == "0.1250"
    assert version.tags["dataset_fingerprint"] == "sha256:test"
    assert version.tags["runtime"] == "openvino"
    assert version.tags["golden"].startswith("4 golden answers, probabilities within ")
    text = registry.client.get_model_version("skin_vit", "1").description
    assert full_bundle.config.architecture in text
    assert "0.1250" in text


def test_the_same_bundle_is_not_registered_twice(registry, first_registration, full_bundle, tmp_path):
    slim = export.slim(full_bundle.path, tmp_path / "slim")
    registry.tag("1", {"source_digest": slim.digest})  # as if version 1 had been completed from it
    before = registry.versions()
    for bundle in (slim, full_bundle):
        registration = register(registry, bundle.path)
        assert (registration.created, registration.version.version) == (False, "1")
    assert registry.versions() == before


def test_nothing_in_a_version_is_pickled(registry, first_registration, tmp_path):
    import mlflow

    files = Path(mlflow.artifacts.download_artifacts("models:/skin_vit/1", dst_path=str(tmp_path)))
    names = {path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt"))]
    assert "code/handlers/predictor.py" in names
    assert "artifacts/bundle/bundle.json" in names
    pinned = (files / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in pinned)
    assert not [line for line in pinned if line.startswith("torch")], "the exported graph does without"


@pytest.fixture(scope="module")
def pyfunc(first_registration):
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        return mlflow.pyfunc.load_model("models:/skin_vit@champion")


@pytest.mark.parametrize(
    "form", ["list of bytes", "table of bytes", "list of base64", "table of base64", "bytes of base64", "one image"]
)
def test_mlflow_gives_the_predictors_probabilities(pyfunc, full_bundle, sample_images, form):
    images = sample_images[:1] if form == "one image" else sample_images
    encoded = [base64.b64encode(image).decode() for image in images]
    if form == "bytes of base64":  # from MLflow's scoring server
        encoded = [text.encode() for text in encoded]
    values = encoded if "base64" in form else images
    given = pd.DataFrame({"image": values}) if "table" in form else values[0] if form == "one image" else values
    answers = pyfunc.predict(given)
    assert list(answers.columns) == list(CODES)
    expected = [answer.probabilities for answer in Predictor(full_bundle).predict(images)]
    assert answers.to_numpy() == pytest.approx(pd.DataFrame(expected).to_numpy(), abs=1e-3)


def test_mlflow_names_the_image_that_cannot_be_used(pyfunc, sample_images):
    with pytest.raises(ValueError, match=r"The image in row 1 is refused. This is not a picture"):
        pyfunc.predict([sample_images[0], b"no picture"])


@pytest.fixture(scope="module")
def run_with_bundle(registry, full_bundle, tmp_path_factory) -> tuple[str, Bundle]:
    """A finished run that logged a bundle, as training does."""
    bundle = variant(full_bundle, tmp_path_factory.mktemp("run"))
    client = registry.client
    run_id = client.create_run(client.create_experiment("training")).info.run_id
    client.log_artifacts(run_id, str(bundle.path), "bundle")
    client.set_terminated(run_id, "FINISHED", end_time=123456789)
    return run_id, bundle


def test_a_runs_bundle_is_registered_and_linked(registry, run_with_bundle, mlflow_uri):
    run_id, bundle = run_with_bundle
    done = call_script("register_model.py", "--run-id", run_id, MLFLOW_TRACKING_URI=mlflow_uri)
    assert done.returncode == 0, done.stderr
    version = registry.find(bundle.digest)
    assert f"version {version.version} is registered" in done.stdout
    assert version.run_id == run_id
    assert version.aliases == (), "no alias was requested"
    info = registry.client.get_run(run_id).info
    assert (info.status, info.end_time) == ("FINISHED", 123456789)


def test_unknown_runs_and_bundles_are_sentences(registry, full_bundle, tmp_path, mlflow_uri):
    before = registry.versions()
    with pytest.raises(RegistryError, match="There is no run nowhere"):
        register(registry, variant(full_bundle, tmp_path).path, run_id="nowhere")
    done = call_script("register_model.py", "--run-id", "nowhere", MLFLOW_TRACKING_URI=mlflow_uri)
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    damaged = variant(full_bundle, tmp_path).path
    (damaged / WEIGHTS).write_bytes(b"")
    with pytest.raises(BundleError, match="is damaged"):
        register(registry, damaged)
    assert registry.versions() == before


def test_a_signed_judgement_reaches_other_promoters(registry, first_registration, full_bundle, tmp_path):
    question = Question(full_bundle.digest, None, "sha256:settings", "sha256:champion")
    verdict = Verdict("stress", Outcome.PASSED, "No answer changes.", {"images": 48, "share": 0.0})
    judgement = Judgement(question, "1", (verdict,), "2026-11-26T12:00:00+00:00", 12.0)
    own = SharedJudgements(registry, b"our key")
    assert own.find("1", question) is None
    report.write_report(tmp_path, judgement)
    registry.log_report("1", tmp_path, report.REPORT)
    registry.tag("1", own.tags(judgement))
    assert SharedJudgements(registry, b"our key").find("1", question) == judgement
    assert own.find("1", replace(question, champion=None)) == judgement, "a new replica has no champion"
    assert own.find("1", replace(question, settings="sha256:others")) is None
    assert SharedJudgements(registry, b"another key").find("1", question) is None


def test_what_is_not_there(registry, first_registration, tmp_path):
    assert registry.resolve("missing") is None
    assert registry.version("99") is None
    with pytest.raises(RegistryError, match=r"skin_vit has no version 99 in .* Its versions are: .*1\."):
        registry.set_alias("champion", "99")
    with pytest.raises(RegistryError):
        registry.download_bundle("99", tmp_path)
    registry.tag("99", {"serving.status": "serving"})
    registry.tag("1", {"serving.reason": "", "serving.since": "now"})
    tags = registry.version("1").tags
    assert (tags["serving.reason"], tags["serving.since"]) == ("", "now")


def test_a_server_that_is_away_is_said_soon(mlflow_uri):
    away = Registry("http://127.0.0.1:9")
    began = time.monotonic()
    for ask in (lambda: away.resolve("champion"), away.versions, lambda: away.tag("1", {"a": "b"})):
        with pytest.raises(RegistryUnavailable, match=r"MLflow at http://127\.0\.0\.1:9 does not answer\."):
            ask()
    assert time.monotonic() - began < 20


def test_a_server_with_a_fault_of_its_own_is_not_taken_for_one_that_is_away():
    """As when the disk of its store is full."""
    with (
        serve(lambda *_: Answer(500)) as url,
        pytest.raises(RegistryUnavailable, match="answers with errors. Read its log"),
    ):
        Registry(url).versions()


def test_an_empty_registry_alone_is_given_the_shipped_model(full_bundle, mlflow_uri, first_registration, registry):
    count = len(registry.versions())
    args = ("--bundle", str(full_bundle.path), "--alias", "challenger", "--if-empty")
    done = call_script("register_model.py", *args, MLFLOW_TRACKING_URI=mlflow_uri)
    assert done.returncode == 0, done.stderr
    assert "already: nothing to do" in done.stdout
    assert len(registry.versions()) == count
    assert registry.resolve("challenger") is None


def test_the_server_answers_to_its_own_names_alone(mlflow_uri):
    path = f"{mlflow_uri}/api/2.0/mlflow/experiments/search?max_results=1"
    port = mlflow_uri.rsplit(":", 1)[1]
    status = {
        host: httpx.get(path, headers={"Host": host}, trust_env=False).status_code
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", "evil.example", f"evil.example:{port}")
    }
    assert list(status.values()) == [200, 200, 403, 403]


def test_the_server_sends_no_statistics(mlflow_uri):
    answer = httpx.get(f"{mlflow_uri}/ajax-api/3.0/mlflow/ui-telemetry", trust_env=False).json()
    assert answer["disable_ui_telemetry"] is True
