"""How well does a model notice classes that it never saw?

ISIC 2019 has no training images of UNK. Therefore each class is held out in turn: a small network is trained on the
rest (training/configs/held_out.yaml), and the images of the class are its near unknowns, the main result. Far unknowns
(scripts/studies/far_images.py) are easy and reported separately. Every detector of scripts/studies/detectors.py is
judged on the same features and logits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray

from handlers.bundle import Bundle
from handlers.files import write_json
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.preprocessing import Preprocessing
from handlers.request import Request
from handlers.taxonomy import CODES, KNOWN_CODES, MALIGNANT, UNKNOWN
from mlflow_tracking import classification_metrics as metrics
from mlflow_tracking.command_line import console, run
from scripts.studies.detectors import DETECTORS, DetectorInputs
from scripts.studies.extractor import Extractor
from scripts.studies.far_images import far_images
from scripts.studies.small_trainings import trained_bundle
from scripts.studies.study_error import StudyError
from scripts.studies.unknowns_report import markdown, summarise
from training.config import ConfigError, load_config
from training.data.image_cache import build_cache
from training.data.manifest import fingerprint, read_manifest
from training.evaluation.evaluation_report import unknown_figures
from training.evaluation.leakage import check_overlap
from training.evaluation.served_predictions import nine_probabilities, predict_rows
from training.evaluation.unknown_class_fit import KnownLesions

FAR_IMAGES = 40  # of each kind
FALSE_ALARM = 0.05  # the share of known lesions that a threshold calls unknown, as in FPR at 95 %
MIN_IMAGES = 30  # of a class to be held out
RESAMPLES = 500  # for the intervals of near AUROCs
EXAMPLES = [
    "python scripts/studies/unknowns.py --data data/manifest.csv --out runs/unknowns --bundle model_store/skin_vit",
    "python scripts/studies/unknowns.py --data data/manifest.csv --out runs/unknowns --classes MEL --classes VASC",
]


def hold_out(frame: pd.DataFrame, code: str, most: int = 0) -> pd.DataFrame:
    """Return the manifest with the images of a class as UNK in the test split.

    Images that share a lesion with another class are dropped, because the model may see that lesion. `most` is the
    number of training images to keep of each class, those with the smallest hashes (0: all). Raises StudyError if no
    image of the class is left.
    """
    others = set(frame.loc[frame["label"] != code, "lesion_id"])
    frame = frame[(frame["label"] != code) | ~frame["lesion_id"].isin(others)].copy()
    held_out = frame["label"] == code
    if not held_out.any():
        raise StudyError(
            f"No image of {code} can be held out: none exists, or each shares its lesion with another class. "
            "Choose another class with --classes."
        )
    frame.loc[held_out, ["label", "split"]] = [UNKNOWN, "test"]
    if most:
        training = frame[frame["split"] == "train"].sort_values("sha256")
        frame = frame.drop(training.index[training.groupby("label").cumcount() >= most])
    return frame.reset_index(drop=True)


def draw_lesions(frame: pd.DataFrame) -> pd.DataFrame:
    """Return how often each draw with replacement contains each known lesion of the test split: (lesions, RESAMPLES).

    All held-out models are judged on these lesions, except for the class that each lacks. They share the draws, because
    independent draws would make the interval of their mean too narrow.
    """
    lesions = np.unique(frame.loc[(frame["split"] == "test") & (frame["label"] != UNKNOWN), "lesion_id"])
    even = np.full(len(lesions), 1 / len(lesions))
    counts = np.random.default_rng(0).multinomial(len(lesions), even, size=RESAMPLES)
    return pd.DataFrame(counts.T, index=lesions)


def judge(
    bundle: Bundle, rows: pd.DataFrame, far: dict[str, list[NDArray[np.uint8]]], cache: Path, drawn: pd.DataFrame
) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """Judge every detector on one held-out model.

    Near unknowns are the UNK rows of its manifest. Detectors are fitted on the validation split, as in
    training/finish.py, because training features lie closer together than others. `called_malignant` is the share of
    unknowns that pass the threshold and get a malignant class; the threshold calls FALSE_ALARM of the calibration
    split unknown. The interval of the near AUROC is a bootstrap over lesions, whose draws come from `draw_lesions`.
    Returns the figures, and for each detector the near AUROC of each draw (RESAMPLES,).
    """
    classes, preprocessing = bundle.config.classes, bundle.config.preprocessing
    extract = Extractor(bundle)
    unknown = rows["label"] == UNKNOWN

    def outputs(chosen: pd.Series) -> DetectorInputs:
        return extract(build_cache(rows[chosen].reset_index(drop=True), preprocessing, cache))

    fitted = (rows["split"] == "val") & ~unknown
    labels = rows.loc[fitted, "label"].map(classes.index).to_numpy(np.int64)
    fit_outputs = outputs(fitted)
    lesions = KnownLesions(fit_outputs.features, fit_outputs.logits, labels, extract.weight, extract.bias)
    parts = {"calibration": outputs((rows["split"] == "calibration") & ~unknown)}
    parts["test"], parts["near"] = outputs((rows["split"] == "test") & ~unknown), outputs(unknown)
    kinds = {kind: extract(_squash(pictures, preprocessing)) for kind, pictures in far.items()}
    tested = (rows["split"] == "test") & ~unknown
    y = rows.loc[tested, "label"].map(classes.index).to_numpy(np.int64)
    times = drawn.loc[rows.loc[tested, "lesion_id"]].to_numpy()
    known_draws = [np.repeat(np.arange(len(y)), column) for column in times.T]
    pairs = list(zip(known_draws, metrics.resampled(rows.loc[unknown, "lesion_id"], RESAMPLES), strict=True))
    draws = {}

    table: dict[str, Any] = {
        "images": int(unknown.sum()),
        "known_images": len(y),
        "balanced_accuracy": metrics.balanced_accuracy(y, parts["test"].logits),
        "called_malignant_by_all": float(_malignant(parts["near"], classes).mean()),
        "detectors": {},
    }
    for name, fit in DETECTORS.items():
        score = fit(lesions)
        at_test, at_near = score(parts["test"]), score(parts["near"])
        passes = at_near <= np.quantile(score(parts["calibration"]), 1 - FALSE_ALARM)
        draws[name] = np.array([metrics.detection(at_test[a], at_near[b])["auroc"] for a, b in pairs])
        table["detectors"][name] = {
            "near": metrics.detection(at_test, at_near)
            | {"auroc_interval_95": metrics.interval(draws[name])}
            | {"called_malignant": float((passes & _malignant(parts["near"], classes)).mean())},
            "far": {kind: metrics.detection(at_test, score(out)) for kind, out in kinds.items()},
        }
    return table, draws


def served(predictor: Predictor, rows: pd.DataFrame, far: dict[str, list[NDArray[np.uint8]]]) -> dict[str, Any]:
    """Judge the ninth probability of a bundle as it is served, on known lesions (`rows`) and each kind of far picture.

    No request contains age, sex or site, because far pictures have none.
    """
    lesions = nine_probabilities(predict_rows(predictor, rows, picture_alone=True))
    table = {}
    for kind, pictures in far.items():
        encoded = [cv2.imencode(".png", picture[..., ::-1])[1].tobytes() for picture in pictures]
        answers = predictor.predict([Request(data, gradcam="none") for data in encoded])
        table[kind] = unknown_figures(lesions, nine_probabilities([a for a in answers if isinstance(a, Prediction)]))
    return table


def _squash(pictures: Sequence[NDArray[np.uint8]], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    side = (preprocessing.image_size, preprocessing.image_size)
    return np.stack([np.asarray(cv2.resize(picture, side, interpolation=cv2.INTER_AREA)) for picture in pictures])


def _malignant(out: DetectorInputs, classes: Sequence[str]) -> NDArray[np.bool_]:
    malignant = MALIGNANT[[CODES.index(code) for code in classes]]
    return np.asarray(malignant[out.logits.argmax(1)])


def main(
    data: Annotated[Path, typer.Option(help="A manifest.csv of prepare_data.py.")],
    out: Annotated[Path, typer.Option(help="Folder for the held-out models, unknowns.json and unknowns.md.")],
    config: Annotated[str, typer.Option(help="Preset of the held-out models.")] = "held_out",
    classes: Annotated[
        list[str] | None, typer.Option(help="A class to hold out; repeat for more. Default: all.")
    ] = None,
    most: Annotated[int, typer.Option(min=0, help="Largest number of training images of a class; 0: all.")] = 1500,
    bundle: Annotated[Path | None, typer.Option(help="A bundle to judge on far pictures, as it is served.")] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Allow a bundle that was trained on test images.")
    ] = False,
) -> None:
    """Hold out each class in turn, and measure which detector best separates it from the known classes.

    The folder keeps the trained models, so an interrupted study continues where it stopped. Models of other data or
    settings are refused.
    """
    load_config(config)  # a wrong option is reported before the work
    if wrong := [code for code in classes or () if code not in KNOWN_CODES]:
        raise ConfigError(f"--classes is {', '.join(wrong)}: choose from {', '.join(KNOWN_CODES)}.")
    frame = read_manifest(data)
    counts = frame["label"].value_counts()
    chosen = classes or [code for code in KNOWN_CODES if counts.get(code, 0) >= MIN_IMAGES]
    if absent := [code for code in chosen if code not in counts]:
        raise StudyError(f"{data} has no image of {', '.join(absent)}. Choose other classes with --classes.")
    cache = out / "cache"
    test = frame[frame["split"] == "test"]
    far = far_images(FAR_IMAGES, corners=test["path"].tolist())
    lesions = test[test["label"].isin(KNOWN_CODES)]
    if bundle:
        check_overlap(bundle, lesions, allow_overlap)
    held_out, draws, drawn = {}, {}, draw_lesions(frame)
    for code in chosen:
        folder = out / f"without_{code}"
        rows, settings = hold_out(frame, code, most), [f"name=without_{code}"]
        trained = trained_bundle(rows, config, settings, folder.resolve(), cache.resolve())
        held_out[code], draws[code] = judge(trained, read_manifest(folder / "manifest.csv"), far, cache, drawn)
        console.print(f"{code}: judged.")
    predictor = Predictor.load(bundle) if bundle else None
    study = {
        "data": fingerprint(frame),
        "config": config,
        "most": most,
        "means": summarise(held_out, draws),
        "held_out": held_out,
        "bundle": predictor.bundle.digest if predictor else None,
        "served": served(predictor, lesions, far) if predictor else {},
    }
    write_json(out / "unknowns.json", study)
    (out / "unknowns.md").write_text(markdown(study), encoding="utf-8")
    console.print(markdown(study))
    console.print(f"Written: {out / 'unknowns.json'} and {out / 'unknowns.md'}.")


if __name__ == "__main__":
    run(main, examples=EXAMPLES)
