"""Draw the Grad-CAM heatmap over a picture, as a PNG."""

from pathlib import Path
from typing import Annotated

import typer

from handlers.errors import UsageError, UserError
from handlers.files import atomic_file
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.request import Request
from mlflow_tracking.command_line import console, run
from mlflow_tracking.stack_settings import SHIPPED


def main(
    image: Annotated[Path, typer.Option(help="The picture to explain.")],
    output: Annotated[Path, typer.Option(help="The PNG file to write.")],
    target: Annotated[str | None, typer.Option(help="Class code to explain. Default: the most probable.")] = None,
    bundle: Annotated[Path, typer.Option(help="The model's bundle.")] = SHIPPED,
) -> None:
    """Write the Grad-CAM overlay of one image."""
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output} is not a PNG file. Give a name that ends in .png.")
    try:
        data = image.read_bytes()
        [answer] = Predictor.load(bundle).predict([Request(data, gradcam="overlay", target=target)])
        if not isinstance(answer, Prediction):
            raise answer
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as file:
            file.write(answer.overlay_png or b"")
    except OSError as error:
        raise UserError(f"{error.filename2 or error.filename}: {error.strerror}.") from None
    probability = answer.probabilities[answer.code]
    console.print(f"{answer.code} {probability:.3f}. Wrote the heatmap for {answer.target} to {output}.")
    console.print("Research use only. Not a medical device.", style="dim")


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python scripts/explain.py --image lesion.jpg --output heatmap.png",
            "python scripts/explain.py --image lesion.jpg --output melanoma.png --target MEL",
        ],
    )
