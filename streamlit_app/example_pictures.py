"""The example pictures for visitors without one: drawn by `scripts/studies/draw_examples.py`, not real."""

from pathlib import Path

from streamlit_app.readings import Upload

FOLDER = Path(__file__).parent / "examples"


def uploads() -> list[Upload]:
    """Return the drawn pictures by name. Each file name says that the picture is not real."""
    return [Upload.of(path.name, path.read_bytes()) for path in sorted(FOLDER.glob("*.jpg"))]


def title(upload: Upload) -> str:
    """Return the words of the file name, such as "Drawn nevus"."""
    return upload.name.removesuffix("_not_real.jpg").replace("_", " ").capitalize()
