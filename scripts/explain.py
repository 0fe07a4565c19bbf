"""Draw where the model looked: the picture with its Grad-CAM heatmap, as a PNG."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from handlers.bundle import BundleError
from handlers.errors import ImageError
from handlers.files import atomic_file
from mlflow_tracking.settings import SHIPPED

EPILOG = """
Examples:

  python scripts/explain.py --image lesion.jpg --output heatmap.png

  python scripts/explain.py --image lesion.jpg --output melanoma.png --target MEL
"""


def main(
    image: Annotated[Path, typer.Option(help="The picture to explain.")],
    output: Annotated[Path, typer.Option(help="Where to write the PNG; its name ends in .png.")],
    target: Annotated[str | None, typer.Option(help="Class code to explain; default: the most probable.")] = None,
    bundle: Annotated[Path, typer.Option(help="The model's bundle.")] = SHIPPED,
) -> None:
    """Write the Grad-CAM overlay of one image."""
    if output.suffix.lower() != ".png":
        raise typer.BadParameter(f"{output} is to be a PNG; give a name that ends in .png.")
    from handlers.predictor import Predictor
    from handlers.request import Request

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    try:
        data = image.read_bytes()
        [answer] = Predictor.load(bundle).predict([Request(data, gradcam="overlay", target=target)])
        if isinstance(answer, ImageError):
            raise answer
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as file:
            file.write(answer.overlay_png or b"")
    except OSError as error:
        console.print(f"{error.filename2 or error.filename}: {error.strerror}", style="red")
        sys.exit(1)
    except (ImageError, BundleError) as error:
        console.print(str(error), style="red")
        sys.exit(1)
    console.print(
        f"{answer.code} {answer.probabilities[answer.code]:.3f}; {output} shows where the model looked for "
        f"{answer.target}. Research use only."
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(epilog=EPILOG)(main)
    app()
