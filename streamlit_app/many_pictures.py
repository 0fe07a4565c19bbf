"""Many pictures: the table on the page, and the CSV download with one row for each picture, refused ones too."""

import csv
import io
from collections.abc import Sequence

import pandas as pd

from streamlit_app import wording
from streamlit_app.answer_schema import METADATA, UNKNOWN, Answer
from streamlit_app.certainty import certainty
from streamlit_app.readings import Reading

PICTURE = "picture"
PERCENTAGES = ("probability", "malignancy", "unknown")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def overview(answers: Sequence[tuple[str, str | None, Answer]], sensitivity: float | None = None) -> pd.DataFrame:
    """Return one row for each file name, thumbnail and answer; probabilities in percent."""
    words = {True: "yes", False: "no", None: "–"}
    return pd.DataFrame(
        {
            PICTURE: thumbnail,
            "file": name,
            "flagged": words[answer.is_flagged(sensitivity)],
            "top": answer.classes[answer.ranking[0]].name,
            "kind": wording.kind(answer, answer.ranking[0]),
            "probability": 100 * answer.probabilities[answer.ranking[0]],
            "malignancy": 100 * answer.malignancy,
            "unknown": 100 * answer.probabilities.get(UNKNOWN, 0.0),
            "certainty": certainty(answer),
        }
        for name, thumbnail, answer in answers
    )


def to_csv(readings: Sequence[Reading], sensitivity: float | None = None) -> str:
    """Return all readings as CSV. No cell can start a formula in a spreadsheet."""
    rows = [{"file": r.upload.name, "sha256": r.upload.sha256} | _cells(r.answer, sensitivity) for r in readings]
    header = dict.fromkeys(name for row in rows for name in row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*header, "problem"], restval="")
    writer.writeheader()
    for reading, row in zip(readings, rows, strict=True):
        row["problem"] = str(reading.problem or "")
        writer.writerow({name: _harmless(value) for name, value in row.items()})
    return stream.getvalue()


def _cells(answer: Answer | None, sensitivity: float | None) -> dict[str, object]:
    if answer is None:
        return {}
    top, promise = answer.ranking[0], answer.promise(sensitivity)
    alarm: dict[str, object] = {}
    if answer.suspicion and promise:
        alarm = {
            "malignant_share": answer.suspicion.malignant,
            "flagged": answer.is_flagged(sensitivity),
            "promised_sensitivity": promise.sensitivity,
            "threshold": promise.threshold,
        }
    return {
        "code": top,
        "name": answer.classes[top].name,
        "probability": answer.probabilities[top],
        "malignant": answer.classes[top].malignant,
        **answer.probabilities,
        **alarm,
        "entropy": answer.uncertainty.entropy,
        "conformal_set": " ".join(answer.uncertainty.conformal_set or []),
        "confidence_level": answer.uncertainty.confidence_level,
        "model": answer.model.name,
        "version": answer.model.version,
        "digest": answer.model.digest,
        **{name: answer.metadata[name] for name in METADATA if name in answer.metadata},
    }


def _harmless(value: object) -> object:
    """Return text that a spreadsheet would take for a formula with an apostrophe in front (OWASP, "CSV injection")."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value
