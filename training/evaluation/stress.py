"""What everyday faults of a picture do to a model's answer: `python training/evaluation/stress.py --bundle DIR --data MANIFEST`.

Each fault is put on every test image by itself, at one fixed strength that a person would still read; the answer to
the changed picture is compared with that to the same picture as it was.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from handlers.bundle import BundleError
from handlers.decoding import decode
from handlers.errors import ImageError
from handlers.files import write_json
from handlers.predictor import Predictor
from handlers.taxonomy import CODES, KNOWN_CODES
from mlflow_tracking import metrics
from mlflow_tracking.command_line import console, errors, progress_bar
from training.data.manifest import ManifestError, fingerprint, read_manifest
from training.data.synthetic import draw_lesion
from training.evaluation.assessment import conditional
from training.evaluation.figures import sheet_figure
from training.evaluation.leakage import OverlapError, check_overlap

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB
Fault = Callable[[Pixels, np.random.Generator], Pixels]
BATCH = 32
SEED = 0  # of where rulers, hairs and the like lie
MELANOMA = CODES.index("MEL")


def ruler(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Millimetre ticks along the lower edge."""
    out, (height, width) = image.copy(), image.shape[:2]
    for number, x in enumerate(np.linspace(0.03, 0.97, 30) * width):
        tick = height // (8 if number % 5 == 0 else 14)
        cv2.line(out, (int(x), height - 1), (int(x), height - 1 - tick), (40, 38, 40), max(1, width // 200))
    return out


def ink(image: Pixels, rng: np.random.Generator) -> Pixels:
    """A surgeon's violet line across one corner."""
    out, (height, width) = image.copy(), image.shape[:2]
    start, end = (0, int(height * rng.uniform(0.15, 0.35))), (int(width * rng.uniform(0.2, 0.4)), 0)
    cv2.line(out, start, end, (92, 64, 150), max(2, width // 30), cv2.LINE_AA)
    return _mix(image, out, 0.85)


def hair(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Fifteen dark hairs."""
    out, (height, width) = image.copy(), image.shape[:2]
    for _ in range(15):
        x, y, heading = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, 2 * np.pi)
        angles = heading + np.cumsum(rng.normal(0, 0.08, 24))
        steps = np.stack([np.cos(angles), np.sin(angles)], 1) * 0.03 * width
        points = (np.array([x, y]) + np.cumsum(steps, 0)).round().astype(np.int32)
        cv2.polylines(out, [points], False, (48, 34, 28), max(1, width // 150), cv2.LINE_AA)
    return _mix(image, out, 0.85)


def gel_bubbles(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Ten bright rings."""
    out, (height, width) = image.copy(), image.shape[:2]
    for _ in range(10):
        centre = int(rng.uniform(0, width)), int(rng.uniform(0, height))
        radius = int(width * rng.uniform(0.015, 0.05))
        cv2.circle(out, centre, radius, (255, 250, 244), max(1, width // 120), cv2.LINE_AA)
    return _mix(image, out, 0.7)


def vignette(image: Pixels, rng: np.random.Generator) -> Pixels:
    """The dark corners of a dermoscope's tube."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    radius = np.hypot((x - width / 2) / width, (y - height / 2) / height) * 2
    return _clip(image * np.clip((1.15 - radius) / 0.15, 0, 1)[..., None])


def blur(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Out of focus: a Gaussian of 1 % of the width."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 0.01 * image.shape[1]), np.uint8)


def jpeg(image: Pixels, rng: np.random.Generator) -> Pixels:
    """JPEG at quality 20."""
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 20])[1]  # OpenCV's order is BGR
    return np.ascontiguousarray(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)[..., ::-1])


def warm_white(image: Pixels, rng: np.random.Generator) -> Pixels:
    """White balance of a warm lamp: red up by 15 %, blue down by 15 %."""
    return _clip(image * np.array([1.15, 1.0, 0.85]))


def cold_white(image: Pixels, rng: np.random.Generator) -> Pixels:
    """White balance of a cold lamp: red down by 15 %, blue up by 15 %."""
    return _clip(image * np.array([0.85, 1.0, 1.15]))


def quarter_turn(image: Pixels, rng: np.random.Generator) -> Pixels:
    """The picture turned by 90 degrees; dermoscopy has no upside."""
    return np.ascontiguousarray(np.rot90(image))


def turn_30(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Turned by 30 degrees about the middle, the corners mirrored in."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), 30, 1)
    return np.asarray(cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT), np.uint8)


FAULTS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (ruler, ink, hair, gel_bubbles, vignette, blur, jpeg, warm_white, cold_white, quarter_turn, turn_30)
}


def stress(predictor: Predictor, rows: pd.DataFrame) -> dict[str, Any]:
    """Ask about every image as it is and with each fault: figures for each fault, and for "none".

    `melanoma_change`: mean absolute change of the melanoma probability; `melanoma_drop`: its mean change on melanomas
    alone; `flips`: share of images whose first of the nine codes changes; `balanced_accuracy` over the known classes.

    Raises:
        ManifestError: an image cannot be read.
    """
    truth = rows["label"].map(KNOWN_CODES.index).to_numpy(np.int64)
    nine: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ("none", *FAULTS)}
    with progress_bar("stressing") as progress:
        for start in range(0, len(rows), BATCH):
            pictures = [_open(path) for path in rows["path"].iloc[start : start + BATCH]]
            for number, (name, parts) in enumerate(nine.items()):
                changed = pictures
                if name != "none":
                    drawn = [np.random.default_rng([SEED, number, start + place]) for place in range(len(pictures))]
                    changed = [FAULTS[name](picture, rng) for picture, rng in zip(pictures, drawn, strict=True)]
                parts.append(_ask(predictor, changed))
            progress(start + len(pictures), len(rows))
    whole = {name: np.concatenate(parts) for name, parts in nine.items()}
    plain, is_melanoma = whole["none"], truth == MELANOMA
    table = {}
    for name, answers in whole.items():
        change = answers[:, MELANOMA] - plain[:, MELANOMA]
        table[name] = {
            "melanoma_change": float(np.abs(change).mean()),
            "melanoma_drop": float(change[is_melanoma].mean()) if is_melanoma.any() else None,
            "flips": float((answers.argmax(1) != plain.argmax(1)).mean()),
            "balanced_accuracy": metrics.balanced_accuracy(truth, conditional(answers)),
        }
    return table


def _open(path: str) -> Pixels:
    try:
        return np.asarray(decode(Path(path).read_bytes()).image)
    except (OSError, ImageError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error


def _ask(predictor: Predictor, pictures: list[Pixels]) -> NDArray[np.float64]:
    """Nine probabilities (N, 9), through the model's own resizing."""
    pixels = np.stack([predictor.config.preprocessing.resize(Image.fromarray(picture)) for picture in pictures])
    logits, _, residuals = predictor.runtime(pixels, np.full(len(pixels), -1))
    return predictor.config.calibration.probabilities(logits, predictor.config.classes, residuals)


def _mix(image: Pixels, over: Pixels, share: float) -> Pixels:
    return _clip(image + share * (over.astype(np.float64) - image))


def _clip(values: NDArray[np.float64]) -> Pixels:
    return np.asarray(values.round().clip(0, 255), np.uint8)


def markdown(table: dict[str, Any]) -> str:
    """The sheet as a table for people."""
    lines = [
        "| fault | change of P(MEL) | on melanomas | flips | balanced accuracy |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("none", *FAULTS):  # JSON keeps no order
        row = table[name]
        drop = "" if row["melanoma_drop"] is None else f"{row['melanoma_drop']:+.3f}"
        figures = f"{row['melanoma_change']:.3f} | {drop} | {row['flips']:.3f} | {row['balanced_accuracy']:.3f}"
        lines.append(f"| {name} | {figures} |")
    return "\n".join(lines) + "\n"


def main(
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.")],
    data: Annotated[Path, typer.Option(help="A manifest.csv, as prepare_data writes it.")],
    out: Annotated[Path, typer.Option(help="Folder for stress.json, stress.md and a sheet of the faults, drawn.")],
    split: Annotated[str, typer.Option(help="Which split of the manifest.")] = "test",
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Ask even about images that the model was made from.")
    ] = False,
) -> None:
    """Put ruler, ink, hair, bubbles, vignette, blur, JPEG, white balance and turns on each image, and ask again.

    Images that the model was made from are refused, as by evaluate.py.

    Example:

    python training/evaluation/stress.py --bundle model_store/skin_vit --data data/manifest.csv --out runs/evaluation
    """
    try:
        frame = read_manifest(data)
        rows = frame[(frame["split"] == split) & frame["label"].isin(KNOWN_CODES)].reset_index(drop=True)
        if rows.empty:
            raise ManifestError(f"{data} has no image of a known class in the split {split!r}.")
        seen = check_overlap(bundle, rows, allow_overlap)
        predictor = Predictor.load(bundle)
        table = stress(predictor, rows)
    except (ManifestError, BundleError, OverlapError) as error:
        errors.print(str(error))
        raise SystemExit(1) from None
    out.mkdir(parents=True, exist_ok=True)
    described = {"bundle": predictor.bundle.digest, "data": fingerprint(rows), "split": split, "images": len(rows)}
    write_json(out / "stress.json", described | {"overlap": seen} | {"faults": table})
    (out / "stress.md").write_text(markdown(table), encoding="utf-8")
    picture = np.asarray(draw_lesion(0, "MEL", (320, 240)))
    drawn = {name: fault(picture, np.random.default_rng(0)) for name, fault in FAULTS.items()}
    sheet_figure({"none": picture} | drawn).savefig(out / "stress.png", dpi=110)
    shown = Table("fault", "change of P(MEL)", "on melanomas", "flips", "balanced accuracy")
    for line in markdown(table).splitlines()[2:]:
        shown.add_row(*(cell.strip() for cell in line.strip("|").split("|")))
    console.print(shown)
    console.print(f"{len(rows):,} images. Written to {out}.")


if __name__ == "__main__":
    typer.run(main)
