"""MODEL_CARD.md has the figures of the evaluations of the shipped bundle, and the bundle gives its golden answers."""

import json
import re
import shutil
from pathlib import Path

import pytest

from handlers.predictor import Predictor
from handlers.receipt import SEEN_SPLITS, read_receipt
from handlers.request import Request
from scripts.studies import model_card

pytest_plugins = ["tests.fixtures_serving"]
ROOT = Path(__file__).parents[1]
SHIPPED, EVALUATION = model_card.SHIPPED, model_card.EVALUATION


@pytest.fixture(scope="module")
def evidence():
    return json.loads((SHIPPED / "bundle.json").read_text())["evidence"]


def test_the_card_is_what_its_template_and_the_evaluations_give():
    assert (ROOT / "MODEL_CARD.md").read_text() == model_card.render(), "run python scripts/studies/model_card.py"


def test_another_figure_makes_another_card(tmp_path):
    shutil.copytree(EVALUATION, tmp_path / "evaluation")
    path = tmp_path / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["summary"]["balanced_accuracy"] += 0.01
    path.write_text(json.dumps(metrics))
    assert model_card.render(evaluation=tmp_path / "evaluation") != (ROOT / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("digest", ["sha256:0", None])  # of a study of the unknown that was shown no bundle
def test_figures_of_another_bundle_make_no_card(tmp_path, digest):
    shutil.copytree(EVALUATION, tmp_path / "evaluation")
    path = tmp_path / "evaluation" / "unknowns.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bundle": digest}))
    with pytest.raises(model_card.CardError, match=r"^unknowns\.json in .* describe another bundle than "):
        model_card.render(evaluation=tmp_path / "evaluation")


def test_a_comparison_with_another_former_model_makes_no_card(tmp_path):
    shutil.copytree(EVALUATION, tmp_path / "evaluation")
    path = tmp_path / "evaluation" / f"{model_card.FORMER}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bundle": "sha256:0"}))
    with pytest.raises(model_card.CardError, match="describe two former bundles"):
        model_card.render(evaluation=tmp_path / "evaluation")


def test_figures_stand_under_their_names():
    text = model_card.render()
    metrics = json.loads((EVALUATION / "metrics.json").read_text())
    unknowns = json.loads((EVALUATION / "unknowns.json").read_text())
    melanoma, served = metrics["per_class"]["MEL"], unknowns["means"]["vim"]
    assert re.search(rf"^\| MEL \| {melanoma['support']} \| {melanoma['recall']:.2f} \(", text, re.MULTILINE)
    assert f"| `vim` | {served['near_auroc']:.3f} | {served['near_fpr_at_95']:.3f} |" in text
    assert text.index("| MEL |") < text.index("| NV |") < text.index("| SCC |")
    row = metrics["against"]["all"]["macro_auc"]
    assert f"| macro AUC | {row['value']:.3f} | {row['against']:.3f} | {row['difference']:+.3f} |" in text
    [promise] = [
        p for p in metrics["suspicion"]["malignant"]["sources"]["ham10000"]["promises"] if p["promised"] == 0.9
    ]
    assert re.search(rf"^\| ham10000 \| .* \| {promise['sensitivity']:.2f} \(", text, re.MULTILINE)
    assert text.index("age: under 30") < text.index("age: 70 and over") < text.index("age: not recorded")


def test_the_evaluations_are_of_the_shipped_bundle(evidence):
    tables = {path.stem: json.loads(path.read_text()) for path in EVALUATION.glob("*.json")}
    former = tables.pop(model_card.FORMER)
    assert set(tables) == set(model_card.PARTS)
    digest = tables["metrics"]["bundle"]
    assert {table["bundle"] for table in tables.values()} == {digest}
    assert former["bundle"] == tables["metrics"]["against"]["bundle"] != digest
    assert Predictor.load(SHIPPED, runtime="torch").bundle.digest == digest
    for table in (tables["metrics"], tables["tta"]):
        assert (table["runtime"], table["precision"]) == ("torch", "f32")  # a bundle without a graph
        assert table["images"] + table["unknown"]["images"] == evidence["images"]["test"]
        assert table["overlap"]["overlaps"] is False
    for name, value in tables["metrics"]["summary"].items():
        assert evidence["metrics"]["test"][name] == pytest.approx(value, abs=7e-3), (
            name
        )  # fp16 weights; a rare class has 19 images
    assert [tables[table]["tta"] for table in ("metrics", "tta")] == [False, True]
    assert tables["unknowns"]["data"] == evidence["dataset_fingerprint"]


def test_the_receipt_is_of_the_images_it_was_made_from(evidence):
    receipt = read_receipt(SHIPPED)
    assert receipt.dataset_fingerprint == evidence["dataset_fingerprint"]
    assert {split: len(receipt.splits[split].sha256) for split in SEEN_SPLITS} == {
        split: evidence["images"][split] for split in SEEN_SPLITS
    }


def test_the_shipped_model_is_small():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 25e6


@pytest.mark.live  # there its graph is made anyway
def test_the_shipped_model_gives_its_golden_answers(shipped_bundle):
    predictor = Predictor(shipped_bundle)
    cases = predictor.bundle.golden()
    requests = [Request(case.image, metadata=case.metadata) for case in cases]
    for case, answer in zip(cases, predictor.predict(requests), strict=True):
        probability, cam = case.disagreement(answer.probabilities, answer.grid)
        assert probability <= 0.01
        assert cam <= 0.01
