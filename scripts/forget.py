"""Delete a kept picture, and all rows that the monitor has of it."""

from typing import Annotated

import typer

from handlers.errors import ServiceUnavailable, UserError
from handlers.kept_images import SHA256, delete
from mlflow_tracking.command_line import console, run
from mlflow_tracking.stack_settings import Settings
from monitoring.log_reader import bytes_behind
from monitoring.prediction_store import PredictionStore

EXAMPLES = ["python scripts/forget.py 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]


class NothingToForget(UserError):
    """A picture of which nothing is stored."""


class LogUnread(ServiceUnavailable):
    """Lines of the prediction log that are not stored yet."""


def main(
    sha256: Annotated[str, typer.Argument(help="SHA-256 of the image file (the answer's image.sha256).")],
) -> None:
    """Delete a kept picture, and its predictions, readings and outcomes in the monitor's database.

    Sums by hour and version stay; they hold no picture's hash. The prediction log keeps its lines (hash,
    probabilities, age, sex, site) until their file is the oldest of ten and is deleted. Models that learned from
    the picture do not change. If the same file is sent again, it is a new picture.

    The exit code is 0 if something was deleted, 1 if nothing was stored, and 3 if the monitor has not read the whole
    log or its database does not answer: repeat the command then.
    """
    sha256 = sha256.strip().lower()
    if not SHA256.fullmatch(sha256):
        raise typer.BadParameter(f"{sha256[:80]} is not a SHA-256: it must have 64 hexadecimal digits.")
    settings = Settings.load()
    is_deleted = delete(settings.kept_images_folder, sha256)
    console.print("The kept picture is deleted." if is_deleted else "No picture was kept.")
    store = PredictionStore(settings.monitor_database_url)
    store.migrate()
    counts = store.forget(sha256)
    console.print(
        f"Deleted {counts['predictions']:,} predictions, {counts['readings']:,} readings, "
        f"{counts['outcomes']:,} outcomes."
    )
    if behind := bytes_behind(settings.prediction_logs, store.positions()):
        raise LogUnread(
            f"The monitor has not read {behind:,} bytes of the prediction log, which may name the picture. Start the "
            "monitor, and repeat this command in a minute."
        )
    if not is_deleted and not any(counts.values()):
        raise NothingToForget(f"Nothing is stored of {sha256}.")


if __name__ == "__main__":
    run(main, examples=EXAMPLES)
