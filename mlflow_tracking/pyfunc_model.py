"""The registered model for MLflow itself (`mlflow models serve`, Spark, Python): images in, nine probabilities out.

    model = mlflow.pyfunc.load_model("models:/skin_vit@champion")
    model.predict(pd.DataFrame({"image": [Path("lesion.jpg").read_bytes()]}))

A model that takes metadata also reads the columns `age`, `sex` and `site`, which may be blank or missing. A model
without metadata also takes a list of images.

MLflow stores this file with the model (models from code), so nothing is pickled. TorchServe does not use it; it gets
the same bundle in an archive.
"""

import base64
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from handlers.errors import ImageError
from handlers.metadata import FIELDS
from handlers.predictor import Predictor
from handlers.request import Request
from handlers.taxonomy import CODES

BATCH = 16  # images decoded at a time, which limits memory


class SkinLesionModel(PythonModel):
    """A model that turns image bytes into a table with a column of probabilities for each of the nine classes."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load and verify the bundle. Raises BundleError."""
        self.predictor = Predictor.load(context.artifacts["bundle"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return one row of nine probabilities for each image. Raises ValueError that names the row of a refused image.

        Images are bytes or base64, in the column `image`, or in a single column of any name, as MLflow makes of a list.
        """
        images, metadata = _images(model_input), _metadata(model_input)
        rows: list[dict[str, float]] = []
        for start in range(0, len(images), BATCH):
            requests = [
                Request(image, gradcam="none", metadata=values)
                for image, values in zip(images[start : start + BATCH], metadata[start : start + BATCH], strict=True)
            ]
            for offset, answer in enumerate(self.predictor.predict(requests)):
                if isinstance(answer, ImageError):
                    raise ValueError(f"The image in row {start + offset} is refused. {answer}") from answer
                rows.append(answer.probabilities)
        return pd.DataFrame(rows, columns=list(CODES))


def _images(model_input: Any) -> list[bytes]:
    if isinstance(model_input, pd.DataFrame):
        if "image" in model_input.columns:
            model_input = model_input["image"]
        elif len(model_input.columns) == 1:
            model_input = model_input.iloc[:, 0]
        else:
            raise ValueError("The table has several columns, but none is called `image`.")
    return [_bytes(value) for value in model_input]


def _metadata(model_input: Any) -> list[dict[str, Any]]:
    """Return the metadata of each row."""
    if not isinstance(model_input, pd.DataFrame) or "image" not in model_input.columns:
        return [{} for _ in range(len(model_input))]
    rows = model_input[[name for name in FIELDS if name in model_input.columns]].to_dict("records")
    return [{str(name): value for name, value in row.items() if not pd.isna(value)} for row in rows]


def _bytes(value: bytes | str) -> bytes:
    """Return an image as bytes. MLflow's scoring server passes base64 on as text, or as the text's bytes."""
    try:
        return base64.b64decode(value, validate=True)
    except ValueError:  # an image file never consists of base64's letters only
        return value.encode() if isinstance(value, str) else bytes(value)


set_model(SkinLesionModel())
