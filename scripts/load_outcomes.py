"""Give the monitor the true diagnoses of pictures that the model has answered."""

import csv
import io
from pathlib import Path
from typing import Annotated

import typer

from handlers.errors import UserError
from handlers.metadata import FIELDS, OLDEST, SITES, Metadata, MetadataError
from handlers.taxonomy import TAXONOMY
from mlflow_tracking.command_line import console, run
from mlflow_tracking.promotion.audit import person
from mlflow_tracking.stack_settings import Settings
from monitoring.outcomes import PictureOutcome, record
from monitoring.prediction_store import PredictionStore

KEYS = ("request_id", "sha256")
PATIENT = Metadata.of(FIELDS)
DIAGNOSES = {name.lower(): lesion.code for lesion in TAXONOMY for name in (lesion.code, lesion.name)}
EXAMPLES = ["python scripts/load_outcomes.py pathology.csv", "python scripts/load_outcomes.py pathology.csv --by lab"]


class OutcomesError(UserError):
    """A table of outcomes that cannot be used."""


def read_outcomes(path: Path) -> list[PictureOutcome]:
    """Return the outcomes in a CSV file. Raises OutcomesError, which names the first wrong line."""
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), skipinitialspace=True)
        rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OutcomesError(f"{path} cannot be read as CSV ({error}).") from error
    names = reader.fieldnames or ()
    columns = [name for name in KEYS if name in names]
    if len(columns) != 1 or "diagnosis" not in names:
        raise OutcomesError(f"{path} needs a column diagnosis and one of the columns request_id and sha256.")
    if not rows:
        raise OutcomesError(f"{path} has a header and no rows; add the diagnoses.")
    outcomes = []
    for line, row in rows:
        key, text = ((row[name] or "").strip() for name in (columns[0], "diagnosis"))
        if not key or text.lower() not in DIAGNOSES:
            codes = ", ".join(lesion.code for lesion in TAXONOMY)
            raise OutcomesError(
                f"Line {line} of {path} has the {columns[0]} {key!r} and the diagnosis {text!r}. Give both; a "
                f"diagnosis is one of {codes}, or its English name."
            )
        try:
            metadata = PATIENT.parse({name: row[name] for name in FIELDS if name in names})
        except MetadataError:
            raise OutcomesError(
                f"Line {line} of {path} has an age, sex or site that is not usable. Give the age in years (0 to "
                f"{OLDEST}), the sex as female or male, the site as one of {', '.join(SITES)}, or leave them empty."
            ) from None
        values = {name: value for name, value in metadata.items() if value is not None}
        key = key.lower() if columns[0] == "sha256" else key
        outcomes.append(PictureOutcome(key, DIAGNOSES[text.lower()], values))
    return outcomes


def main(
    file: Annotated[
        Path, typer.Argument(help="A CSV file with the columns diagnosis and request_id or sha256.", show_default=False)
    ],
    by: Annotated[str, typer.Option(help="Who found the diagnoses.", show_default="user@host")] = "",
) -> None:
    """Give the monitor the true diagnoses of pictures that the model has answered.

    A picture is named by the request id of its prediction (the answer's header X-Request-Id) or by the SHA-256 of its
    file (the answer's image.sha256). Rows are appended with reader and time; the newest row of a request counts. The
    page's part Monitoring then shows the realised performance. Loading a file twice changes nothing. The columns age,
    sex and site may be there too; then the page shows the performance by them.
    """
    outcomes = read_outcomes(file)
    store = PredictionStore(Settings.load().monitor_database_url)
    store.migrate()
    recorded = record(store, outcomes, by or person())
    console.print(f"{recorded.new:,} outcomes are new, {recorded.unchanged:,} were known.")
    if recorded.unmatched:
        console.print(
            f"{len(recorded.unmatched):,} rows name no prediction that the monitor has, such as "
            f"{recorded.unmatched[0]}."
        )


if __name__ == "__main__":
    run(main, examples=EXAMPLES)
