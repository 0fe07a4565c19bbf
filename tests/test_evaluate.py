"""Evaluation of a bundle on the command line.

It writes figures with intervals, slices and pictures; takes a manifest or a folder; refuses images that the model was
made from unless they are allowed; logs to the run that made the model. Its submission gets the same score from the
challenge's own package as from ours.
"""

import json
import subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from handlers.taxonomy import CODES
from mlflow_tracking import classification_metrics as metrics
from tests.commands import invoke
from tests.models import tiny_bundle
from tests.tiny_lesions import tiny_manifest
from training import evaluate
from training.data.manifest import fingerprint, read_manifest, write_manifest
from training.data.synthetic import draw_lesion
from training.evaluation import isic_scoring
from training.evaluation.evaluation_report import weakest_slice
from training.evaluation.leakage import manifest_receipt, seen_images

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
PICTURES = {"confusion.png", "roc.png", "precision_recall.png", "reliability.png", "classes.png", "risk_coverage.png",
            "examples.png", "errors.png"}  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return tiny_manifest(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, manifest):
    frame = read_manifest(manifest)
    receipt = manifest_receipt(frame, fingerprint(frame))
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle", receipt=receipt).path


def test_it_writes_figures_and_pictures(bundle, manifest, tmp_path):
    out = tmp_path / "out"
    args = ["--bundle", bundle, "--data", manifest, "--out", out, "--bootstrap", 10, "--tta"]
    code, output = invoke(evaluate.main, *args, "--submission", tmp_path / "submission.csv")
    assert code == 0, output
    table = json.loads((out / "metrics.json").read_text())
    assert table["images"] == 18
    assert table["overlap"] == {"overlaps": False, "same_image": 0, "same_lesion": 0, "same_patient": 0, "near": 0}
    assert table["tta"] is True
    assert table["runtime"] == "openvino"
    assert table["precision"] in ("f32", "bf16")  # which is the processor's affair
    for name in metrics.SUMMARY:
        low, high = table["intervals_95"][name]
        assert low <= high
    assert set(table["per_class_intervals_95"]["MEL"]) == set(table["per_class"]["MEL"]) - {"support"}
    assert set(table["slices"]) == {"source", "site", "sex", "age"}
    assert {path.name for path in out.iterdir()} == {*PICTURES, "metrics.json", "report.txt"}
    for name in PICTURES:
        with Image.open(out / name) as picture:
            picture.verify()
    assert "precision" in (out / "report.txt").read_text()
    submission = pd.read_csv(tmp_path / "submission.csv")
    assert list(submission.columns) == ["image", *CODES]
    assert submission[list(CODES)].sum(axis=1).to_numpy() == pytest.approx(np.ones(18))
    assert "Not logged" not in output  # this bundle names no run


@pytest.mark.parametrize("split", ["train", "val", "calibration"])
def test_images_that_the_model_was_made_from_are_refused(bundle, manifest, tmp_path, split):
    args = ["--bundle", bundle, "--data", manifest, "--split", split, "--out", tmp_path / "out", "--bootstrap", 0]
    code, output = invoke(evaluate.main, *args)
    assert code == 1
    assert "were seen in training" in output
    assert not (tmp_path / "out").exists()


def test_two_bundles_are_compared_on_images_that_neither_has_seen(bundle, manifest, tmp_path):
    frame = read_manifest(manifest)
    tests = frame["split"] == "test"
    seen = frame[tests].iloc[:4]
    known = seen.assign(split="train")
    receipt = manifest_receipt(known, fingerprint(known))
    other = tiny_bundle(tmp_path / "other", seed=7, receipt=receipt, graph=False).path
    args = ["--data", manifest, "--bundle", bundle, "--bootstrap", 20, "--out", tmp_path / "out"]
    code, output = invoke(evaluate.main, *args, "--against", other)
    assert code == 0, output
    table = json.loads((tmp_path / "out" / "metrics.json").read_text())["against"]
    assert table["bundle"] != json.loads((tmp_path / "out" / "metrics.json").read_text())["bundle"]
    lesions = set(seen["lesion_id"])
    left = frame[tests & ~frame["lesion_id"].isin(lesions)]
    assert table["all"]["images"] == int(tests.sum()) - table["seen"] <= len(left)
    assert f"Compared on {table['all']['images']} images" in output

    apart = tmp_path / "apart.csv"  # the other bundle's figures are what an evaluation of it alone gives
    write_manifest(apart, frame[tests & ~frame["image_id"].isin(seen_images(other, frame[tests]))])
    args = ["--data", apart, "--bootstrap", 0, "--bundle", other, "--out", tmp_path / "alone"]
    assert invoke(evaluate.main, *args)[0] == 0
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    for name, row in table["all"].items():
        if name in alone["summary"]:
            assert row["against"] == pytest.approx(alone["summary"][name])
            assert row["value"] - row["against"] == pytest.approx(row["difference"])
            assert row["interval_95"][0] <= row["interval_95"][1]


def test_a_bundle_differs_from_itself_by_nothing(bundle, manifest, tmp_path):
    args = ["--data", manifest, "--bundle", bundle, "--against", bundle, "--bootstrap", 5, "--out", tmp_path]
    assert invoke(evaluate.main, *args)[0] == 0
    table = json.loads((tmp_path / "metrics.json").read_text())["against"]["all"]
    assert {"accuracy", "conformal_coverage", "melanoma_recall"} <= set(table)
    for name, row in table.items():
        if name != "images":
            assert (row["difference"], row["interval_95"]) == (0, [0, 0])


def test_a_bundle_that_has_seen_all_images_is_not_compared(bundle, manifest, tmp_path):
    frame = read_manifest(manifest).assign(split="train")
    other = tiny_bundle(tmp_path / "other", receipt=manifest_receipt(frame, fingerprint(frame))).path
    args = ["--data", manifest, "--bundle", bundle, "--against", other, "--out", tmp_path / "out"]
    code, output = invoke(evaluate.main, *args)
    assert code == 1
    assert "was made from all known lesions here" in output
    assert not (tmp_path / "out").exists()


def test_the_weakest_slice_is_named():
    slices = {
        "source": {"A": {"images": 50, "macro_auc": 0.9}, "B": {"images": 40, "macro_auc": 0.7}, "C": {"images": 3}},
        "sex": {"female": {"images": 90, "macro_auc": 0.8}, "male": {"images": 40, "macro_auc": None}},
    }
    assert weakest_slice(slices) == {"column": "source", "value": "B", "images": 40, "macro_auc": 0.7}
    assert weakest_slice({"source": {"C": {"images": 3}}}) is None


def test_images_that_the_model_was_made_from_may_be_allowed(bundle, manifest, tmp_path):
    args = ["--bundle", bundle, "--data", manifest, "--split", "all", "--out", tmp_path, "--bootstrap", 0]
    assert invoke(evaluate.main, *args)[0] == 1
    code, output = invoke(evaluate.main, *args, "--allow-overlap")
    assert code == 0, output
    assert json.loads((tmp_path / "metrics.json").read_text())["overlap"]["overlaps"] is True


def test_a_folder_is_evaluated_whole_and_its_manifest_is_kept_only_with_figures(bundle, tmp_path):
    for seed in range(6):
        folder = tmp_path / "data" / ("melanoma" if seed % 2 else "nevus")
        folder.mkdir(parents=True, exist_ok=True)
        draw_lesion(seed, "MEL" if seed % 2 else "NV", (120, 90)).save(folder / f"{seed}.png")
    args = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--bootstrap", 0]
    assert invoke(evaluate.main, *args, "--bundle", tmp_path / "nowhere")[0] == 1
    assert not (tmp_path / "out").exists()
    code, output = invoke(evaluate.main, *args, "--bundle", bundle)
    assert code == 0, output
    table = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (table["images"], table["split"]) == (6, "all")
    assert len(read_manifest(tmp_path / "out" / "manifest.csv")) == 6


def test_evaluations_with_other_figures_have_other_names(tmp_path):
    (tmp_path / "our clinic").mkdir()
    own, other, folder = tmp_path / "m.csv", tmp_path / "our clinic" / "m.csv", tmp_path / "our clinic"
    names = {
        evaluate.run_prefix(data, data == own, split, tta, alone)
        for data, split in ((own, "test"), (own, "all"), (other, "test"), (folder, "all"))
        for tta in (False, True)
        for alone in (False, True)
    }
    assert len(names) == 16
    assert {"evaluation_test", "evaluation_test_picture_alone", "evaluation_our_clinic_all_tta"} <= names
    assert "evaluation_our_clinic_m_test" in names


def test_an_evaluation_is_logged_under_its_own_name(manifest, tmp_path, monkeypatch):
    frame = read_manifest(manifest)
    named = tiny_bundle(tmp_path / "bundle", receipt=manifest_receipt(frame, fingerprint(frame)), run_id="r").path
    logged = []
    monkeypatch.setattr(evaluate, "log_evaluation", lambda *args: logged.append(args) or "")
    args = ["--bundle", named, "--data", manifest, "--out", tmp_path / "out", "--bootstrap", 0, "--tta"]
    assert invoke(evaluate.main, *args)[0] == 0
    assert [(run_id, prefix) for run_id, _, prefix, _ in logged] == [("r", "evaluation_test_tta")]


def test_it_logs_to_the_run_that_made_the_model(mlflow_store, tmp_path):
    import mlflow

    client = mlflow.MlflowClient(mlflow_store)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    message = evaluate.log_evaluation(run_id, tmp_path / "out", "evaluation_test", {"ece": 0.5, "macro_auc": None})
    assert message == f"Logged to run {run_id} of {mlflow_store}."
    assert client.get_run(run_id).data.metrics == {"evaluation_test_ece": 0.5}
    assert [file.path for file in client.list_artifacts(run_id, "evaluation_test")] == ["evaluation_test/metrics.json"]
    assert "Not logged" in evaluate.log_evaluation("0" * 32, tmp_path / "out", "x", {})


# ---- the challenge's scoring


def submissions(folder, images=300):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, len(CODES), images)
    logits = rng.normal(size=(images, len(CODES))) + 2 * np.eye(len(CODES))[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    names = [f"ISIC_{i:07d}" for i in range(images)]
    isic_scoring.write_submission(folder / "truth.csv", names, np.eye(len(CODES))[truth])
    isic_scoring.write_submission(folder / "submission.csv", names, probabilities)
    return truth, probabilities


@pytest.mark.parametrize(
    ("text", "message"),
    [("image,MEL\nISIC_1,1\n", "has no column NV"), (None, "cannot be read"), ("other", "no image in common")],
)
def test_files_that_do_not_match_are_refused(tmp_path, text, message):
    submissions(tmp_path)
    if text == "other":
        isic_scoring.write_submission(tmp_path / "submission.csv", ["x"], np.eye(9)[:1])
    elif text is None:
        (tmp_path / "submission.csv").unlink()
    else:
        (tmp_path / "submission.csv").write_text(text)
    code, output = invoke(isic_scoring.main, tmp_path / "truth.csv", tmp_path / "submission.csv")
    assert code == 1
    assert message in output


@pytest.fixture
def scorer(monkeypatch):
    """Return a function: set what the scorer prints. The tables that it gets are in the attribute `tables`."""

    def printing(text):
        def run(command, **options):
            printing.tables = [pd.read_csv(path, dtype={"image": str}) for path in command[-2:]]
            return subprocess.CompletedProcess(command, 0, text, "")

        monkeypatch.setattr(isic_scoring.subprocess, "run", run)

    return printing


@pytest.mark.parametrize("printed", ["", "no figures today", "{half a figure"])
def test_a_scorer_without_figures_is_one_sentence(tmp_path, scorer, printed):
    submissions(tmp_path)
    scorer(printed)
    code, output = invoke(isic_scoring.main, tmp_path / "truth.csv", tmp_path / "submission.csv")
    assert code == 1
    assert f"printed '{printed}' instead of figures" in output


def test_the_scorer_gets_the_truths_weights_and_names_that_meet(tmp_path, scorer):
    table = {"auc": dict.fromkeys(CODES, 0.25) | {"UNK": None}}
    figures = {"per_category": table, "macro_average": {"auc": 0.987}, "aggregate": {"balanced_accuracy": 0.5}}
    scorer(f"A warning.\n{json.dumps(figures)}")
    one_hot = np.eye(len(CODES))
    truth, submission = tmp_path / "truth.csv", tmp_path / "submission.csv"
    isic_scoring.write_submission(truth, ["ISIC_0000001_downsampled", "ISIC_0000002", "001", "1"], one_hot[:4])
    pd.read_csv(truth, dtype={"image": str}).assign(score_weight=[1.0, 0.0, 2.0, 1.0]).to_csv(truth, index=False)
    isic_scoring.write_submission(submission, ["001", "ISIC_0000001"], one_hot[:2])
    code, output = invoke(isic_scoring.main, truth, submission)
    assert code == 0, output
    assert "2 images are in both files." in output
    assert output.count("0.250") == 8
    assert "0.987" in output
    ours, theirs = scorer.tables
    assert list(ours["image"]) == ["ISIC_0000001", "001"]
    assert list(ours["score_weight"]) == [1, 2]
    assert sorted(theirs["image"]) == ["001", "ISIC_0000001"]
    assert list(theirs.columns) == ["image", *CODES]

    isic_scoring.write_submission(submission, ["ISIC_0000001", "ISIC_0000001_downsampled"], one_hot[:2])
    code, output = invoke(isic_scoring.main, truth, submission)
    assert code == 1
    assert "several rows of ISIC_0000001" in output


@pytest.mark.slow  # fetches the scorer from the package index the first time
@pytest.mark.timeout(isic_scoring.TIMEOUT)
def test_our_figures_equal_the_challenges(tmp_path):
    truth, probabilities = submissions(tmp_path)
    scored = isic_scoring.score(tmp_path / "truth.csv", tmp_path / "submission.csv")
    assert scored["images"] == 300
    assert scored["aggregate"]["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy(truth, probabilities))
    ours = metrics.per_class(truth, probabilities, CODES)
    for code in CODES:
        assert scored["per_category"]["auc"][code] == pytest.approx(ours[code]["auc"])
        assert scored["per_category"]["auc_sens_80"][code] == pytest.approx(ours[code]["auc_above_80"])
