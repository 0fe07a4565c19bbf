"""A study of the drift alarm: how often it is false, and after how many changed pictures it comes.

Streams are drawn from the test split, which no part of a model was made from; the space of known lesions was fitted on
the validation split. Lesions are drawn first, then one of their pictures. A stream without a change counts false
alarms; one that changes after CHANGE_AT pictures gives the delay. A change is made to real pictures, or chooses among
them.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from handlers.decoding import decode
from handlers.files import write_json
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.reference import REFERENCE, Reference, drift_values
from handlers.request import Request
from handlers.taxonomy import UNKNOWN
from mlflow_tracking.command_line import console, progress_bar, run, table
from monitoring.drift import ALARM, DriftState
from scripts.studies.study_error import StudyError
from training.data.image_files import IMAGE_ENDINGS
from training.data.manifest import fingerprint, read_manifest
from training.evaluation.command_options import BundleOption, ManifestOption, OutOption, SplitOption

BATCH = 32
STREAM = int(ALARM)  # pictures of a stream without a change
CHANGE_AT = 500  # pictures of a stream before the change
LONGEST = 3000  # changed pictures after which a change counts as missed
OLD_AGE = 75
JPEG_QUALITY = 95  # of changed pictures
MIN_SOURCE = 100  # pictures of a source that can stand alone
NEW_SHARE = 0.2  # of the pictures, when a new disease appears
MIX_WEIGHT = 4.0  # how many times as often melanomas are drawn when the class mix changes
UNCHANGED = "stored again as JPEG"
EXAMPLES = [
    "python scripts/studies/drift_detection.py --bundle model_store/skin_vit --data data/manifest.csv "
    "--other photos/ --out runs/drift"
]

Change = Callable[[Image.Image], Image.Image]


def _cast(image: Image.Image) -> Image.Image:
    """Multiply red by 1.08 and blue by 0.92: warmer light."""
    red, green, blue = image.split()
    return Image.merge("RGB", (red.point(lambda value: value * 1.08), green, blue.point(lambda value: value * 0.92)))


def _mark(image: Image.Image) -> Image.Image:
    """Draw a dark spot on the lens, a tenth of the shorter side wide, always at the same place."""
    spot, side = image.copy(), min(image.size)
    left, top = image.width // 4, image.height // 4
    ImageDraw.Draw(spot).ellipse((left, top, left + side // 10, top + side // 10), fill=(40, 40, 40))
    return Image.blend(image, spot.filter(ImageFilter.GaussianBlur(side / 100)), 0.8)


def _stored(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


CHANGES: dict[str, Change] = {
    UNCHANGED: lambda image: image,
    "warmer light (red × 1.08, blue × 0.92)": _cast,
    "a tenth darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "blur (radius 1 % of the side)": lambda image: image.filter(ImageFilter.GaussianBlur(min(image.size) / 100)),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "JPEG quality 20": lambda image: _stored(image, 20),
    "a mark on the lens": _mark,
}


def change_values(predictor: Predictor, paths: list[str], change: Change | None, label: str) -> NDArray[np.float64]:
    """Return the drift values (N, S) of pictures after a change; pictures that are refused are left out."""
    values = []
    with progress_bar(label) as progress:
        for start in range(0, len(paths), BATCH):
            data = [Path(path).read_bytes() for path in paths[start : start + BATCH]]
            if change is not None:
                data = [_jpeg(change(decode(picture).image)) for picture in data]
            requests = [Request(picture, gradcam="none") for picture in data]
            for answer in predictor.predict(requests):
                if isinstance(answer, Prediction):
                    size, nine = (answer.image.width, answer.image.height), list(answer.probabilities.values())
                    values.append(drift_values(*size, answer.statistics, nine))
            progress(min(start + BATCH, len(paths)), len(paths))
    if not values:
        raise StudyError(f"No picture of {label} could be read. Give a folder with JPEG or PNG files.")
    return np.array(values)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def joint_evidence(state: DriftState, values: NDArray[np.float64], reference: Reference) -> NDArray[np.float64]:
    """Return the joint evidence (N,) after each picture."""
    history = state.update(values, [0.0] * len(values), reference)
    return np.array([figures["joint"] for figures in history])


class Pictures(NamedTuple):
    """The drift values (N, S) of pictures, and the probability (N,) that one is drawn."""

    values: NDArray[np.float64]
    shares: NDArray[np.float64]

    def drawn(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return the values of a stream of pictures, with replacement."""
        return self.values[rng.choice(len(self.values), size=count, p=self.shares / self.shares.sum())]


def false_alarms(pictures: Pictures, reference: Reference, streams: int, rng: np.random.Generator) -> dict[str, float]:
    """Count the alarms in streams of STREAM unchanged pictures. After an alarm the evidence begins again."""
    alarms, peak = 0, 1.0
    with progress_bar("without a change") as progress:
        for number in range(streams):
            stream = pictures.drawn(STREAM, rng)
            while len(stream):
                joint = joint_evidence(DriftState(), stream, reference)
                peak, is_alarm = max(peak, float(joint.max())), joint >= ALARM
                if not is_alarm.any():
                    break
                alarms, stream = alarms + 1, stream[int(np.argmax(is_alarm)) + 1 :]
            progress(number + 1, streams)
    return {
        "alarms": alarms,
        "predictions": streams * STREAM,
        "in_10000": alarms / streams * 10_000 / STREAM,
        "highest_log10": float(np.log10(peak)),
    }


def delays(
    before: Pictures, after: Pictures, reference: Reference, streams: int, rng: np.random.Generator
) -> dict[str, float]:
    """Return the percentiles of the number of changed pictures until the alarm; LONGEST stands for a missed change."""
    waits = []
    for _ in range(streams):
        state = DriftState()
        joint_evidence(state, before.drawn(CHANGE_AT, rng), reference)
        is_alarm = joint_evidence(state, after.drawn(LONGEST, rng), reference) >= ALARM
        waits.append(int(np.argmax(is_alarm)) + 1 if is_alarm.any() else LONGEST)
    missed = np.array(waits) == LONGEST
    return {"median": float(np.median(waits)), "p90": float(np.quantile(waits, 0.9)), "missed": float(missed.mean())}


def selections(rows: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
    """Return changes that choose among the rows: the weight (N,) of each row."""
    weights = {
        "four times as many melanomas": np.where(rows["label"] == "MEL", MIX_WEIGHT, 1.0),
        f"only people of {OLD_AGE} and older": (rows["age"] >= OLD_AGE).to_numpy(float),
    }
    for source, count in rows["source"].value_counts().items():
        if count >= MIN_SOURCE:
            weights[f"only pictures of {source}"] = (rows["source"] == source).to_numpy(float)
    return {name: values for name, values in weights.items() if values.any()}


def changed_pictures(
    predictor: Predictor, rows: pd.DataFrame, unchanged: Pictures, others: list[Path], count: int
) -> dict[str, Pictures]:
    """Return the pictures after each change: at most `count` of those that must be made or read."""
    lesions = rows[rows["label"] != UNKNOWN].reset_index(drop=True)
    sample = lesions.drop_duplicates("lesion_id").sample(frac=1, random_state=0)["path"].tolist()[:count]
    made = {name: change_values(predictor, sample, change, name) for name, change in CHANGES.items()}
    for folder in others:
        paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.casefold() in IMAGE_ENDINGS)
        made[f"pictures of {folder.name}"] = change_values(predictor, paths[:count], None, folder.name)
    pictures = {name: Pictures(values, np.ones(len(values))) for name, values in made.items()}
    for name, weights in selections(lesions).items():
        pictures[name] = Pictures(unchanged.values, unchanged.shares * weights)
    if paths := rows.loc[rows["label"] == UNKNOWN, "path"].tolist()[:count]:
        values = change_values(predictor, paths, None, "none of the eight")
        shares = unchanged.shares / unchanged.shares.sum() * (1 - NEW_SHARE)
        pictures[f"{NEW_SHARE:.0%} have a diagnosis that is none of the eight"] = Pictures(
            np.concatenate([unchanged.values, values]),
            np.concatenate([shares, np.full(len(values), NEW_SHARE / len(values))]),
        )
    return pictures


def study(
    predictor: Predictor, reference: Reference, rows: pd.DataFrame, others: list[Path], streams: int, count: int
) -> dict[str, Any]:
    """Measure false alarms and every change's delay; docs/lab-notes.md quotes them."""
    rng = np.random.default_rng(0)
    lesions = rows[rows["label"] != UNKNOWN].reset_index(drop=True)
    values = change_values(predictor, lesions["path"].tolist(), None, "unchanged")
    if len(values) < len(lesions):
        raise StudyError("The model refuses some pictures of the manifest. Prepare the manifest again.")
    shares = 1 / lesions["lesion_id"].map(lesions["lesion_id"].value_counts()).to_numpy(float)
    unchanged = Pictures(values, shares)
    after = changed_pictures(predictor, rows, unchanged, others, count)
    return {
        "reference": {"pictures": reference.pictures, "lesions": reference.lesions},
        "pictures": len(values),
        "streams": streams,
        "false_alarms": false_alarms(unchanged, reference, streams, rng),
        "delays": {name: delays(unchanged, pictures, reference, streams, rng) for name, pictures in after.items()},
    }


def main(
    bundle: BundleOption,
    data: ManifestOption,
    out: OutOption,
    split: SplitOption = "test",
    other: Annotated[list[Path] | None, typer.Option(help="A folder of pictures from elsewhere; repeatable.")] = None,
    streams: Annotated[int, typer.Option(min=1, help="Streams for each figure.")] = 100,
    pictures: Annotated[int, typer.Option(min=50, help="Pictures that are changed, for each change.")] = 500,
) -> None:
    """Measure the drift alarm's false alarms, and its delay after real changes of real pictures."""
    predictor = Predictor.load(bundle)
    try:
        reference = Reference.from_dict(json.loads((predictor.bundle.path / REFERENCE).read_bytes()))
    except OSError:
        raise StudyError(f"{bundle} has no {REFERENCE}. Train the model again to get one.") from None
    frame = read_manifest(data)
    rows = frame[frame["split"] == split].reset_index(drop=True)
    results = {"bundle": predictor.bundle.digest, "data": fingerprint(rows), "split": split}
    results |= study(predictor, reference, rows, other or [], streams, pictures)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "drift.json", results)
    show(results)
    console.print(f"Written: {out / 'drift.json'}.")


def show(results: dict[str, Any]) -> None:
    """Print the false alarms and a table of the delays."""
    false = results["false_alarms"]
    console.print(
        f"Without a change: {false['alarms']} alarms in {false['predictions']:,} predictions "
        f"({false['in_10000']:.2f} in 10,000)."
    )
    grid = table("Changed pictures until the alarm", ("Median", "90 %", "Missed"), folded=("Change",))
    for name, delay in results["delays"].items():
        grid.add_row(f"{delay['median']:.0f}", f"{delay['p90']:.0f}", f"{delay['missed']:.0%}", name)
    console.print(grid)


if __name__ == "__main__":
    run(main, examples=EXAMPLES)
