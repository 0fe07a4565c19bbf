"""Draw the example pictures that the page offers to visitors without a picture."""

import io

from handlers.files import atomic_file
from mlflow_tracking.command_line import console, run
from training.config import ROOT
from training.data.synthetic import draw_lesion

FOLDER = ROOT / "streamlit_app" / "examples"
SIZE = (480, 360)  # pixels
EXAMPLES = {"melanoma": ("MEL", 25), "nevus": ("NV", 11), "basal_cell_carcinoma": ("BCC", 0)}  # class and seed


def drawings() -> dict[str, bytes]:
    """Return the JPEG bytes of each example by file name. The name says that the picture is drawn."""
    files = {}
    for name, (code, seed) in EXAMPLES.items():
        buffer = io.BytesIO()
        draw_lesion(seed, code, SIZE).save(buffer, "JPEG", quality=85, comment=b"Drawn, not real.")
        files[f"drawn_{name}_not_real.jpg"] = buffer.getvalue()
    return files


def main() -> None:
    """Write the page's example pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, jpeg in drawings().items():
        with atomic_file(FOLDER / name) as file:
            file.write(jpeg)
    console.print(f"Wrote {len(EXAMPLES)} drawn pictures to {FOLDER.relative_to(ROOT)}.")


if __name__ == "__main__":
    run(main, examples=["python scripts/studies/draw_examples.py"])
