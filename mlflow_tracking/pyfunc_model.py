"""The registered model as MLflow runs it: images in, nine probabilities out, for `mlflow models serve`, Spark, Python.

    model = mlflow.pyfunc.load_model("models:/skin_vit@champion")
    model.predict(pd.DataFrame({"image": [Path("lesion.jpg").read_bytes()]}))

With columns `age`, `sex` and `site`, as far as they are known, for a model that takes them; one that takes none is
content with a list of images, too.

MLflow keeps this file itself with the model (models-from-code): nothing is pickled. TorchServe does not go this way; it
gets the same bundle in an archive.
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

# What memory holds at once when a table of images comes in.
BATCH = 16


class SkinLesionModel(PythonModel):
    """Image bytes to a DataFrame with a column of probabilities for each of the nine classes."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load and verify the bundle. Raises BundleError."""
        self.predictor = Predictor.load(context.artifacts["bundle"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row of nine probabilities for each image.

        Args:
            model_input: a DataFrame with the column `image`, or one column of any name; MLflow makes one of a list.
                Images are bytes, or base64. The columns `age`, `sex` and `site`, with blanks or not there at all,
                count for a model that takes them.

        Raises:
            ValueError: an image cannot be used; the message names its row.
        """
        images, told = _images(model_input), _metadata(model_input)
        rows: list[dict[str, float]] = []
        for start in range(0, len(images), BATCH):
            requests = [
                Request(image, gradcam="none", metadata=values)
                for image, values in zip(images[start : start + BATCH], told[start : start + BATCH], strict=True)
            ]
            for offset, answer in enumerate(self.predictor.predict(requests)):
                if isinstance(answer, ImageError):
                    raise ValueError(f"image {start + offset}: {answer}") from answer
                rows.append(answer.probabilities)
        return pd.DataFrame(rows, columns=list(CODES))


def _images(model_input: Any) -> list[bytes]:
    if isinstance(model_input, pd.DataFrame):
        if "image" in model_input.columns:
            model_input = model_input["image"]
        elif len(model_input.columns) == 1:
            model_input = model_input.iloc[:, 0]
        else:
            raise ValueError("The table has several columns, and none is called `image`.")
    return [_bytes(value) for value in model_input]


def _metadata(model_input: Any) -> list[dict[str, Any]]:
    """What each row tells beside the image."""
    if not isinstance(model_input, pd.DataFrame) or "image" not in model_input.columns:
        return [{} for _ in range(len(model_input))]
    rows = model_input[[name for name in FIELDS if name in model_input.columns]].to_dict("records")
    return [{str(name): value for name, value in row.items() if not pd.isna(value)} for row in rows]


def _bytes(value: bytes | str) -> bytes:
    """An image as bytes. MLflow's scoring server hands base64 on as text, or as the bytes of the text."""
    try:
        return base64.b64decode(value, validate=True)
    except ValueError:  # then it is an image: no image file consists of base64's letters alone
        return value.encode() if isinstance(value, str) else bytes(value)


set_model(SkinLesionModel())
