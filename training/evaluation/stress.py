"""Stress test: how everyday faults of a picture change a model's prediction.

`python training/evaluation/stress.py --bundle DIR --data MANIFEST --out DIR` adds each fault to every test image, at
one fixed strength that a person could still read, and compares the prediction with that for the unchanged image.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from handlers.decoding import decode
from handlers.errors import ImageError
from handlers.files import write_json
from handlers.predictor import Predictor
from handlers.taxonomy import CODES, KNOWN_CODES
from mlflow_tracking import classification_metrics as metrics
from mlflow_tracking.command_line import console, markdown_table, progress_bar, run
from training.data.manifest import ManifestError, fingerprint
from training.data.synthetic import draw_lesion
from training.evaluation.command_options import (
    AllowOverlapOption,
    BundleOption,
    ManifestOption,
    OutOption,
    SplitOption,
    known_lesions,
)
from training.evaluation.evaluation_report import conditional
from training.evaluation.figures import sheet_figure
from training.evaluation.leakage import check_overlap

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB
Fault = Callable[[Pixels, np.random.Generator], Pixels]
BATCH = 32
SEED = 0  # of the positions of hairs, bubbles and ink
MELANOMA = CODES.index("MEL")


def ruler(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw millimetre ticks along the lower edge."""
    out, (height, width) = image.copy(), image.shape[:2]
    for number, x in enumerate(np.linspace(0.03, 0.97, 30) * width):
        tick = height // (8 if number % 5 == 0 else 14)
        cv2.line(out, (int(x), height - 1), (int(x), height - 1 - tick), (40, 38, 40), max(1, width // 200))
    return out


def ink(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw a surgeon's violet line across one corner."""
    out, (height, width) = image.copy(), image.shape[:2]
    start, end = (0, int(height * rng.uniform(0.15, 0.35))), (int(width * rng.uniform(0.2, 0.4)), 0)
    cv2.line(out, start, end, (92, 64, 150), max(2, width // 30), cv2.LINE_AA)
    return _mix(image, out, 0.85)


def hair(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw fifteen dark hairs."""
    out, (height, width) = image.copy(), image.shape[:2]
    for _ in range(15):
        x, y, heading = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, 2 * np.pi)
        angles = heading + np.cumsum(rng.normal(0, 0.08, 24))
        steps = np.stack([np.cos(angles), np.sin(angles)], 1) * 0.03 * width
        points = (np.array([x, y]) + np.cumsum(steps, 0)).round().astype(np.int32)
        cv2.polylines(out, [points], False, (48, 34, 28), max(1, width // 150), cv2.LINE_AA)
    return _mix(image, out, 0.85)


def gel_bubbles(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw ten bright rings."""
    out, (height, width) = image.copy(), image.shape[:2]
    for _ in range(10):
        centre = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        radius = int(width * rng.uniform(0.015, 0.05))
        cv2.circle(out, centre, radius, (255, 250, 244), max(1, width // 120), cv2.LINE_AA)
    return _mix(image, out, 0.7)


def vignette(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Darken the corners as a dermoscope's tube does."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    radius = np.hypot((x - width / 2) / width, (y - height / 2) / height) * 2
    return _clip(image * np.clip((1.15 - radius) / 0.15, 0, 1)[..., None])


def blur(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Defocus by a Gaussian of 1 % of the width."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 0.01 * image.shape[1]), np.uint8)


def jpeg(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Compress as JPEG at quality 20."""
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 20])[1]  # OpenCV's order is BGR
    return np.ascontiguousarray(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)[..., ::-1])


def warm_white(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Apply the white balance of a warm lamp: 15 % more red, 15 % less blue."""
    return _clip(image * np.array([1.15, 1.0, 0.85]))


def cold_white(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Apply the white balance of a cold lamp: 15 % less red, 15 % more blue."""
    return _clip(image * np.array([0.85, 1.0, 1.15]))


def quarter_turn(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn by 90 degrees; dermoscopy has no upside."""
    return np.ascontiguousarray(np.rot90(image))


def turn_30(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Turn by 30 degrees about the centre and fill the corners by reflection."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), 30, 1)
    return np.asarray(cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT), np.uint8)


FAULTS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (ruler, ink, hair, gel_bubbles, vignette, blur, jpeg, warm_white, cold_white, quarter_turn, turn_30)
}


def stress(predictor: Predictor, rows: pd.DataFrame) -> dict[str, Any]:
    """Predict every image unchanged and with each fault; return the figures of each fault and of "none".

    `melanoma_change`: mean absolute change of the melanoma probability; `melanoma_drop`: its mean over melanomas;
    `flips`: share of images whose most probable class changes; `balanced_accuracy`: over the known classes.

    Raises:
        ManifestError: an image cannot be read.
    """
    truth = rows["label"].map(KNOWN_CODES.index).to_numpy(np.int64)
    nine: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ("none", *FAULTS)}
    with progress_bar("stressing") as progress:
        for start in range(0, len(rows), BATCH):
            images = [_open(path) for path in rows["path"].iloc[start : start + BATCH]]
            for number, (name, parts) in enumerate(nine.items()):
                changed = images
                if name != "none":
                    drawn = [np.random.default_rng([SEED, number, start + place]) for place in range(len(images))]
                    changed = [FAULTS[name](image, rng) for image, rng in zip(images, drawn, strict=True)]
                parts.append(_predict(predictor, changed))
            progress(start + len(images), len(rows))
    whole = {name: np.concatenate(parts) for name, parts in nine.items()}
    plain, is_melanoma = whole["none"], truth == MELANOMA
    table = {}
    for name, nine_probabilities in whole.items():
        change = nine_probabilities[:, MELANOMA] - plain[:, MELANOMA]
        table[name] = {
            "melanoma_change": float(np.abs(change).mean()),
            "melanoma_drop": float(change[is_melanoma].mean()) if is_melanoma.any() else None,
            "flips": float((nine_probabilities.argmax(1) != plain.argmax(1)).mean()),
            "balanced_accuracy": metrics.balanced_accuracy(truth, conditional(nine_probabilities)),
        }
    return table


def _open(path: str) -> Pixels:
    try:
        return np.asarray(decode(Path(path).read_bytes()).image)
    except (OSError, ImageError) as error:
        raise ManifestError(f"{path} cannot be read. {error}") from error


def _predict(predictor: Predictor, images: list[Pixels]) -> NDArray[np.float64]:
    """Return nine probabilities (N, 9), through the model's own resizing."""
    pixels = np.stack([predictor.config.preprocessing.resize(Image.fromarray(image)) for image in images])
    logits, _, residuals = predictor.runtime(pixels, np.full(len(pixels), -1))
    return predictor.config.calibration.probabilities(logits, predictor.config.classes, residuals)


def _mix(image: Pixels, over: Pixels, share: float) -> Pixels:
    return _clip(image + share * (over.astype(np.float64) - image))


def _clip(values: NDArray[np.float64]) -> Pixels:
    return np.asarray(values.round().clip(0, 255), np.uint8)


def markdown(table: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    rows = []
    for name in ("none", *FAULTS):  # JSON keeps no order
        row = table[name]
        drop = "" if row["melanoma_drop"] is None else f"{row['melanoma_drop']:+.3f}"
        rows.append((name, row["melanoma_change"], drop, row["flips"], row["balanced_accuracy"]))
    head = ("fault", "change of P(MEL)", "on melanomas", "flips", "balanced accuracy")
    return markdown_table(head, rows) + "\n"


def main(
    bundle: BundleOption,
    data: ManifestOption,
    out: OutOption,
    split: SplitOption = "test",
    allow_overlap: AllowOverlapOption = False,
) -> None:
    """Add ruler, ink, hair, bubbles, vignette, blur, JPEG, white balance and turns to each image, and predict again.

    Writes stress.json, stress.md and a sheet of the faults. Images that the model was made from are refused.
    """
    rows = known_lesions(data, split)
    overlap = check_overlap(bundle, rows, allow_overlap)
    predictor = Predictor.load(bundle)
    table = stress(predictor, rows)
    out.mkdir(parents=True, exist_ok=True)
    header = {"bundle": predictor.bundle.digest, "data": fingerprint(rows), "split": split, "images": len(rows)}
    write_json(out / "stress.json", header | {"overlap": overlap, "faults": table})
    (out / "stress.md").write_text(markdown(table), encoding="utf-8")
    image = np.asarray(draw_lesion(0, "MEL", (320, 240)))
    drawn = {name: fault(image, np.random.default_rng(0)) for name, fault in FAULTS.items()}
    sheet_figure({"none": image} | drawn).savefig(out / "stress.png", dpi=110)
    console.print(markdown(table))
    console.print(f"{len(rows):,} images. Written to {out}.")


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python training/evaluation/stress.py --bundle model_store/skin_vit --data data/manifest.csv "
            "--out runs/evaluation"
        ],
    )
