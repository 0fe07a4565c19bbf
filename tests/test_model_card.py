"""MODEL_CARD.md states the figures in the shipped bundle, and the shipped bundle gives its golden answers."""

import json
import re
from pathlib import Path

import pytest

from handlers.graph import complete
from handlers.predictor import Predictor

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "model_store" / "skin_vit"


@pytest.fixture(scope="module")
def evidence():
    return json.loads((SHIPPED / "bundle.json").read_text())["evidence"]


@pytest.mark.parametrize(
    ("row", "figure"),
    [
        ("accuracy", "accuracy"),
        ("balanced accuracy, 8 classes", "balanced_accuracy"),
        ("balanced accuracy, UNK counted as wrong", "balanced_accuracy_9"),
        ("macro F1", "macro_f1"),
        ("macro AUC", "macro_auc"),
        ("expected calibration error (15 bins)", "ece"),
        ("Brier score", "brier"),
    ],
)
def test_the_card_states_the_bundles_figures(evidence, row, figure):
    [stated] = re.findall(rf"^\| {re.escape(row)} \| ([\d.]+) \|", (ROOT / "MODEL_CARD.md").read_text(), re.MULTILINE)
    # The card quotes the served graph (bf16 where there is such a processor), the bundle the model in fp32.
    assert float(stated) == pytest.approx(evidence["metrics"]["test"][figure], abs=2e-3)


def test_the_card_states_the_bundles_counts(evidence):
    text = (ROOT / "MODEL_CARD.md").read_text()
    for split, count in evidence["images"].items():
        assert re.search(rf"\b{count:,}\b", text), split


def test_the_shipped_model_is_small_and_gives_its_golden_answers(tmp_path):
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 25e6
    predictor = Predictor(complete(SHIPPED, tmp_path / "bundle"))
    cases = predictor.bundle.golden()
    for case, answer in zip(cases, predictor.predict([case.image for case in cases]), strict=True):
        probability, cam = case.disagreement(answer.probabilities, answer.grid)
        assert probability <= 0.01
        assert cam <= 0.01
