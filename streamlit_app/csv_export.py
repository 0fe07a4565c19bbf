"""The CSV download: one row for each picture, refused ones too."""

import csv
import io
from collections.abc import Sequence

from streamlit_app.answer_schema import METADATA, Answer
from streamlit_app.readings import Reading

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def to_csv(readings: Sequence[Reading]) -> str:
    """Return all readings as CSV. No cell can start a formula in a spreadsheet."""
    answers = [reading.answer for reading in readings if reading.answer]
    codes = list(answers[0].probabilities) if answers else []
    details = [name for name in METADATA if any(name in answer.metadata for answer in answers)]
    header = ["file", "sha256", "code", "name", "probability", "malignant", *codes, "entropy", "conformal_set"]
    header += ["confidence_level", "model", "version", "digest", *details, "problem"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, restval="")
    writer.writeheader()
    for reading in readings:
        row: dict[str, object] = {"file": reading.upload.name, "sha256": reading.upload.sha256}
        if reading.answer:
            row |= _answer_cells(reading.answer)
            row |= {name: reading.answer.metadata.get(name) for name in details}
        row["problem"] = str(reading.problem or "")
        writer.writerow({key: _harmless(value) for key, value in row.items()})
    return stream.getvalue()


def _answer_cells(answer: Answer) -> dict[str, object]:
    top = answer.ranking[0]
    return {
        "code": top,
        "name": answer.classes[top].name,
        "probability": answer.probabilities[top],
        "malignant": answer.classes[top].malignant,
        **answer.probabilities,
        "entropy": answer.uncertainty.entropy,
        "conformal_set": " ".join(answer.uncertainty.conformal_set or []),
        "confidence_level": answer.uncertainty.confidence_level,
        "model": answer.model.name,
        "version": answer.model.version,
        "digest": answer.model.digest,
    }


def _harmless(value: object) -> object:
    """Return text that a spreadsheet would take for a formula with an apostrophe in front (OWASP, "CSV injection")."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value
