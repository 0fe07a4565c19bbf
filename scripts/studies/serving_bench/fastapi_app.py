"""The naive model behind FastAPI: `uvicorn --factory scripts.studies.serving_bench.fastapi_app:create`, in the model's folder.

`server.json` there has the threads.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, UploadFile

from scripts.studies.serving_bench.naive_model import NaiveModel

SETTINGS = "server.json"


def create() -> FastAPI:
    """The application, with its model loaded."""
    folder = Path.cwd()
    model = NaiveModel(folder, json.loads((folder / SETTINGS).read_text())["threads"], "torch")
    app = FastAPI()

    @app.get("/ping")
    async def ping() -> int:
        """This worker's process, by which the bench sees that all workers are up."""
        return os.getpid()

    # Not in threads: the grad-cam package keeps one request's activations in the model's hooks.
    @app.post("/predictions/skin_vit")
    async def predict(data: Annotated[UploadFile, File()], gradcam: Annotated[str, Form()]) -> dict[str, Any]:
        images, pictures = model.decode([await data.read()])
        return model.answers(pictures, *model.infer(images, gradcam != "none"))[0]

    return app
