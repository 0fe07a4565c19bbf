"""How well a model says "none of the above": `python scripts/studies/unknowns.py --data MANIFEST --out DIR`.

ISIC 2019 has no training images of UNK, so the question is asked of models that were never shown a class: each class
is held out in turn, a small network trained on the rest (training/configs/held_out.yaml), and the images of the class
are its unknowns. These near unknowns are the headline; far ones (scripts/studies/far_images.py) are easy and stand apart.
Every detector of training/evaluation/detectors.py is judged on the same features and logits.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import pandas as pd
import torch
import typer
from numpy.typing import NDArray
from rich.table import Table

from handlers.bundle import Bundle, BundleError
from handlers.errors import UserError
from handlers.files import write_json
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.preprocessing import Preprocessing
from handlers.request import Request
from handlers.serving_graph import serving_module
from handlers.taxonomy import CODES, KNOWN_CODES, MALIGNANT, UNKNOWN
from mlflow_tracking import metrics
from mlflow_tracking.command_line import console, errors
from scripts.studies.far_images import far_images
from training.checkpoints import LAST, CheckpointError, load
from training.config import ROOT, ConfigError, TrainConfig, load_config
from training.data.image_cache import DataError, build_cache
from training.data.manifest import COLUMNS, ManifestError, fingerprint, read_manifest
from training.evaluate import ask, nine_of
from training.evaluation.assessment import unknown_figures
from training.evaluation.detectors import DETECTORS, Known, Outputs
from training.evaluation.leakage import OverlapError, check_overlap
from training.evaluation.network_outputs import pooled

BATCH = 128
FAR_IMAGES = 40  # of each kind
FALSE_ALARM = 0.05  # the share of known lesions that a threshold calls unknown, as in FPR at 95 %
MIN_IMAGES = 30  # of a class to be held out
RESAMPLES = 500  # for the intervals of near AUROCs
SERVED = "vim"  # the detector that training/finish.py gives to a bundle
FIGURES = {
    "near AUROC": "near_auroc",
    "near FPR at 95 %": "near_fpr_at_95",
    "called malignant": "near_called_malignant",
    "far AUROC": "far_auroc",
    "far FPR at 95 %": "far_fpr_at_95",
}


class StudyError(UserError):
    """A class that cannot be held out, or a model that was not trained, with a sentence saying why."""


def hold_out(frame: pd.DataFrame, code: str, most: int = 0) -> pd.DataFrame:
    """The manifest without a class: its images become UNK and test, whatever split they were in.

    Images that share a lesion with another class are dropped, since the model may see that lesion.

    Args:
        most: keep at most this many training images of a class (those with the smallest hashes); 0: all.

    Raises:
        StudyError: nothing of the class is left.
    """
    others = set(frame.loc[frame["label"] != code, "lesion_id"])
    frame = frame[(frame["label"] != code) | ~frame["lesion_id"].isin(others)].copy()
    mine = frame["label"] == code
    if not mine.any():
        raise StudyError(f"No image of {code} can be held out: there is none, or each shares its lesion with another.")
    frame.loc[mine, ["label", "split"]] = [UNKNOWN, "test"]
    if most:
        training = frame[frame["split"] == "train"].sort_values("sha256")
        frame = frame.drop(training.index[training.groupby("label").cumcount() >= most])
    return frame.reset_index(drop=True)


def train_without(frame: pd.DataFrame, code: str, config: str, folder: Path, cache: Path, most: int) -> Bundle:
    """The bundle of a model that never saw `code`, trained now unless `folder` holds it.

    Raises:
        StudyError: it was not trained, or the folder holds one of other data or settings.
        ConfigError, CheckpointError: an unknown preset, a damaged run.
    """
    rows = hold_out(frame, code, most)
    settings = [f"name=without_{code}", f"manifest={folder / 'manifest.csv'}", f"cache_dir={cache}"]
    begun = (folder / LAST).is_file() or (folder / "bundle").is_dir()
    if begun:
        state = load(folder / LAST)
        wanted, had = load_config(config, settings), load_config(base=state["config"])
        if state["dataset_fingerprint"] != fingerprint(rows) or _essence(wanted) != _essence(had):
            raise StudyError(
                f"{folder} holds a model of other data or settings; delete it, or give another folder with --out."
            )
    if not (folder / "bundle").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        rows.assign(image=rows["path"])[list(COLUMNS)].to_csv(folder / "manifest.csv", index=False)
        command = [sys.executable, str(ROOT / "training" / "train.py")]
        command += ["--resume", str(folder)] if begun else ["--config", config, "--output", str(folder), *settings]
        console.print(f"Training without {code}: {int((rows['split'] == 'train').sum()):,} images, {folder}.")
        if subprocess.run(command, check=False).returncode:
            raise StudyError(
                f"The model without {code} was not trained; its messages are above, its files in {folder}."
            )
    return Bundle.load(folder / "bundle")


def _essence(config: TrainConfig) -> dict[str, Any]:
    """The settings but for where things lie."""
    return config.model_copy(update=dict.fromkeys(("manifest", "data_dir", "cache_dir", "output"), "")).to_dict()


class Extractor:
    """Features and logits of a bundle's network: pixels uint8 (N, S, S, 3) to Outputs."""

    def __init__(self, bundle: Bundle) -> None:
        module = serving_module(bundle)
        self.backbone, self.module = module.cam.backbone, module
        head = self.backbone.get_classifier()
        if not isinstance(head, torch.nn.Linear):
            raise StudyError("Detectors need a head of one linear layer; choose a preset without head_hidden.")
        self.weight, self.bias = (t.detach().double().numpy() for t in (head.weight, head.bias))

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8]) -> Outputs:
        features = []
        for start in range(0, len(pixels), BATCH):
            images = self.module.images(torch.tensor(pixels[start : start + BATCH]))
            features.append(pooled(self.backbone, images).double().numpy())
        together = np.concatenate(features)  # and the head in double, as detectors work on both
        return Outputs(together, together @ self.weight.T + self.bias)


def draw_lesions(frame: pd.DataFrame) -> pd.DataFrame:
    """How often each known lesion of the test split is drawn, in RESAMPLES draws with replacement: a row a lesion.

    The held-out models are all judged on these lesions (but for the class that each lacks), so they share the draws:
    the mean of their figures is no surer than the lesions are many.
    """
    lesions = np.unique(frame.loc[(frame["split"] == "test") & (frame["label"] != UNKNOWN), "lesion_id"])
    even = np.full(len(lesions), 1 / len(lesions))
    counts = np.random.default_rng(0).multinomial(len(lesions), even, size=RESAMPLES)
    return pd.DataFrame(counts.T, index=lesions)


def judge(
    bundle: Bundle, rows: pd.DataFrame, far: dict[str, list[NDArray[np.uint8]]], cache: Path, drawn: pd.DataFrame
) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """Every detector on one held-out model: near unknowns (the UNK rows of its manifest), and far ones by kind.

    The interval of the near AUROC is by bootstrap over lesions: known ones as `drawn` by draw_lesions, unknown ones
    resampled. Beside the table stands the near AUROC of each draw (RESAMPLES,), by detector.

    Detectors are fitted on the validation split, as in training/finish.py: on the training images a network's features
    are closer together than on any others. The thresholds of `called_malignant` (the share of unknowns that pass
    and get a malignant class) let FALSE_ALARM of the calibration split be called unknown, as serving does.
    """
    classes, preprocessing = bundle.config.classes, bundle.config.preprocessing
    extract = Extractor(bundle)
    unknown = rows["label"] == UNKNOWN

    def outputs(chosen: pd.Series) -> Outputs:
        return extract(build_cache(rows[chosen].reset_index(drop=True), preprocessing, cache))

    fitted = (rows["split"] == "val") & ~unknown
    labels = rows.loc[fitted, "label"].map(classes.index).to_numpy(np.int64)
    known = Known(outputs(fitted), labels, extract.weight, extract.bias)
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
        score = fit(known)
        limit, at_test, at_near = (
            np.quantile(score(parts["calibration"]), 1 - FALSE_ALARM),
            *map(score, (parts["test"], parts["near"])),
        )
        passes = at_near <= limit
        draws[name] = np.array([metrics.detection(at_test[a], at_near[b])["auroc"] for a, b in pairs])
        table["detectors"][name] = {
            "near": metrics.detection(at_test, at_near)
            | {"auroc_interval_95": metrics.interval(draws[name])}
            | {"called_malignant": float((passes & _malignant(parts["near"], classes)).mean())},
            "far": {kind: metrics.detection(at_test, score(out)) for kind, out in kinds.items()},
        }
    return table, draws


def served(predictor: Predictor, rows: pd.DataFrame, far: dict[str, list[NDArray[np.uint8]]]) -> dict[str, Any]:
    """A bundle's own ninth probability, as served: training.evaluation.assessment.unknown_figures of each kind of far picture.

    Of age, sex and site, which far pictures lack, it is told nothing, for known lesions neither.

    Args:
        rows: of known lesions that the bundle has not seen.
    """
    known = nine_of(ask(predictor, rows, picture_alone=True))
    table = {}
    for kind, pictures in far.items():
        encoded = [cv2.imencode(".png", picture[..., ::-1])[1].tobytes() for picture in pictures]
        answers = predictor.predict([Request(data, gradcam="none") for data in encoded])
        table[kind] = unknown_figures(known, nine_of([a for a in answers if isinstance(a, Prediction)]))
    return table


def summarise(
    held_out: dict[str, dict[str, Any]], draws: dict[str, dict[str, NDArray[np.float64]]]
) -> dict[str, dict[str, Any]]:
    """Means over the held-out classes (and, for far, over the kinds), best near AUROC first.

    The interval of the mean near AUROC is that of the draws' means: it is about other pictures, not other trainings.
    """
    means = {}
    for name in DETECTORS:
        tables = [table["detectors"][name] for table in held_out.values()]
        far = [figures for table in tables for figures in table["far"].values()]
        means[name] = {
            "near_auroc": float(np.mean([table["near"]["auroc"] for table in tables])),
            "near_auroc_interval_95": metrics.interval(np.mean([draws[code][name] for code in held_out], axis=0)),
            "near_fpr_at_95": float(np.mean([table["near"]["fpr_at_95"] for table in tables])),
            "near_called_malignant": float(np.mean([table["near"]["called_malignant"] for table in tables])),
            "far_auroc": float(np.mean([figures["auroc"] for figures in far])),
            "far_fpr_at_95": float(np.mean([figures["fpr_at_95"] for figures in far])),
        }
    return dict(_ranked(means))


def _ranked(means: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(means.items(), key=lambda item: (-item[1]["near_auroc"], -item[1]["far_auroc"], item[0]))


def _squash(pictures: Sequence[NDArray[np.uint8]], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    side = (preprocessing.image_size, preprocessing.image_size)
    return np.stack([np.asarray(cv2.resize(picture, side, interpolation=cv2.INTER_AREA)) for picture in pictures])


def _malignant(out: Outputs, classes: Sequence[str]) -> NDArray[np.bool_]:
    malignant = MALIGNANT[[CODES.index(code) for code in classes]]
    return np.asarray(malignant[out.logits.argmax(1)])


def markdown(study: dict[str, Any]) -> str:
    """The study as tables for people; in an order of its own, as JSON keeps none."""
    ranked = _ranked(study["means"])
    means = [
        [f"`{name}`", *(f"{row[key]:.3f}" for key in FIGURES.values()), _span(row["near_auroc_interval_95"])]
        for name, row in ranked
    ]
    lines = _table(["detector", *FIGURES, "95 % interval of near AUROC"], means)
    detectors = ("max_softmax", "energy", SERVED)
    rows = []
    for code in (code for code in KNOWN_CODES if code in study["held_out"]):
        table = study["held_out"][code]
        near = (table["detectors"][name]["near"]["auroc"] for name in detectors)
        span = _span(table["detectors"][SERVED]["near"]["auroc_interval_95"])
        rows.append((code, f"{table['images']:,}", table["balanced_accuracy"], *near, span))
    head = ["held out", "images", "balanced accuracy of the rest", *(f"near AUROC, `{name}`" for name in detectors)]
    head.append(f"95 % interval, `{SERVED}`")
    lines += ["", *_table(head, rows)]
    if study["served"]:
        shown = [
            (kind, row["auroc"], row["fpr_at_95"], row["recall"], row["called_malignant"])
            for kind, row in sorted(study["served"].items())
        ]
        head = ["far pictures, this model as served", "AUROC", "FPR at 95 %", "called UNK", "called malignant"]
        lines += ["", *_table(head, shown)]
    return "\n".join(lines) + "\n"


def _span(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> list[str]:
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells)]


def main(
    data: Annotated[Path, typer.Option(help="A manifest.csv, as prepare_data writes it.")],
    out: Annotated[Path, typer.Option(help="Folder for the held-out models, unknowns.json and unknowns.md.")],
    config: Annotated[str, typer.Option(help="Preset of the held-out models.")] = "held_out",
    classes: Annotated[
        list[str] | None, typer.Option(help="A class to hold out; repeat for more. Default: all.")
    ] = None,
    most: Annotated[int, typer.Option(min=0, help="Training images of a class, at most; 0: all.")] = 1500,
    bundle: Annotated[Path | None, typer.Option(help="Also show far pictures to this bundle, as it is served.")] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Even if the bundle was made from images of the test split.")
    ] = False,
) -> None:
    """Hold out each class in turn, and see which detector best tells it from the known ones.

    Models that are in the folder already are not trained again, so an interrupted study goes on where it stopped; those
    of other data or settings are refused.

    Example:

    python scripts/studies/unknowns.py --data data/manifest.csv --out runs/unknowns --bundle model_store/skin_vit

    python scripts/studies/unknowns.py --data data/manifest.csv --out runs/unknowns --classes MEL --classes VASC
    """
    try:
        # What the command line is wrong about is told before the work.
        load_config(config)
        if wrong := [code for code in classes or () if code not in KNOWN_CODES]:
            raise ConfigError(f"There is no class {', '.join(wrong)} to hold out; there are {', '.join(KNOWN_CODES)}.")
        frame = read_manifest(data)
        counts = frame["label"].value_counts()
        chosen = classes or [code for code in KNOWN_CODES if counts.get(code, 0) >= MIN_IMAGES]
        if absent := [code for code in chosen if code not in counts]:
            raise ManifestError(f"{data} has no class {', '.join(absent)} to hold out.")
        cache = out / "cache"
        test = frame.loc[frame["split"] == "test", "path"].tolist()
        far = far_images(FAR_IMAGES, corners=test)
        held_out, draws, drawn = {}, {}, draw_lesions(frame)
        known = frame[(frame["split"] == "test") & frame["label"].isin(KNOWN_CODES)]
        if bundle:
            check_overlap(bundle, known, allow_overlap)
        for code in chosen:
            folder = out / f"without_{code}"
            trained = train_without(frame, code, config, folder.resolve(), cache.resolve(), most)
            held_out[code], draws[code] = judge(trained, read_manifest(folder / "manifest.csv"), far, cache, drawn)
            console.print(f"{code} judged.")
        predictor = Predictor.load(bundle) if bundle else None
        as_served = served(predictor, known, far) if predictor else {}
    except (
        ManifestError, BundleError, CheckpointError, ConfigError, DataError, OverlapError, StudyError, OSError,
    ) as error:  # fmt: skip
        errors.print(str(error))
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    means = summarise(held_out, draws)
    study = {"data": fingerprint(frame), "config": config, "most": most, "means": means, "held_out": held_out}
    study |= {"bundle": predictor.bundle.digest if predictor else None, "served": as_served}
    write_json(out / "unknowns.json", study)
    (out / "unknowns.md").write_text(markdown(study), encoding="utf-8")
    shown = Table("detector", *FIGURES)
    for name, figures in means.items():
        shown.add_row(name, *(f"{figures[key]:.3f}" for key in FIGURES.values()))
    console.print(shown)
    console.print(f"Written to {out}.")


if __name__ == "__main__":
    typer.run(main)
