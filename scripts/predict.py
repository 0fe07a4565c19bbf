"""Predict on the command line: with the running stack, or with a bundle and no server."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from handlers.errors import UsageError
from mlflow_tracking.command_line import console, run, table
from mlflow_tracking.stack_settings import MODEL_NAME, Settings
from mlflow_tracking.torchserve_client import TorchServe, TorchServeError, with_retries

Answer = dict[str, Any]
Ask = Callable[[bytes], Answer]


def main(
    images: Annotated[list[Path], typer.Argument(help="Image files (JPEG, PNG, WebP, BMP, TIFF).")],
    bundle: Annotated[Path | None, typer.Option(help="A bundle folder. Predicts in this process.")] = None,
    url: Annotated[
        str | None, typer.Option(help="TorchServe's address.", show_default="TORCHSERVE_URL, or that of make up")
    ] = None,
    version: Annotated[str | None, typer.Option(help="With --url: a version other than the default.")] = None,
    tta: Annotated[bool, typer.Option("--tta", help="Average over the picture and its mirror images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON answer per line instead of a table.")] = False,
    age: Annotated[str | None, typer.Option(help="The patient's age in years, for all images.")] = None,
    sex: Annotated[str | None, typer.Option(help="female or male.")] = None,
    site: Annotated[str | None, typer.Option(help="Where on the body, such as 'anterior torso'.")] = None,
) -> None:
    """Print nine class probabilities for each image.

    The exit code is 1 if an image was rejected or the bundle is damaged, 2 for wrong options, and 3 if TorchServe does
    not answer.
    """
    if bundle and (url or version):
        raise UsageError(
            "--bundle predicts in this process; --url and --version need TorchServe. Use one or the other."
        )
    if url and not url.startswith(("http://", "https://")):
        raise UsageError(f"--url is '{url}'. Use an address such as http://127.0.0.1:8080.")
    metadata = {key: value for key, value in (("age", age), ("sex", sex), ("site", site)) if value is not None}
    if bundle:
        ask = ask_bundle(bundle, tta, metadata)
    else:
        ask = ask_server(url or Settings.load().inference_url, version, tta, metadata)
    answers: list[tuple[Path, Answer]] = []
    for path in images:
        try:
            data = path.read_bytes()
        except OSError as error:
            answer: Answer = {"error": {"code": "unreadable_file", "message": error.strerror or str(error)}}
        else:
            answer = ask(data)
        answers.append((path, answer))
        if as_json:
            print(json.dumps({"file": str(path), **answer}))
    if not as_json:
        console.print(answer_table(answers))
        console.print("Research use only. Not a medical device.", style="dim")
    raise typer.Exit(any("error" in answer for _, answer in answers))


def ask_bundle(folder: Path, tta: bool, metadata: Mapping[str, str]) -> Ask:
    """Return a function that predicts with a bundle. Raises BundleError."""
    # OpenVINO and torch are imported here, because a client of a server needs neither.
    from handlers.bundle import Bundle
    from handlers.graph_export import complete_once
    from handlers.prediction import Prediction
    from handlers.predictor import Predictor
    from handlers.request import Request

    predictor = Predictor(complete_once(Bundle.load(folder), Settings.load().completed_bundles))

    def ask(data: bytes) -> Answer:
        [answer] = predictor.predict([Request(data, tta=tta, metadata=metadata)])
        if isinstance(answer, Prediction):
            return answer.to_dict()
        return {"error": {"code": answer.code, "message": str(answer)}}

    return ask


def ask_server(url: str, version: str | None, tta: bool, metadata: Mapping[str, str]) -> Ask:
    """Return a function that predicts with TorchServe, and raises TorchServeUnavailable."""
    # The whole address of README's curl command is accepted, too.
    torchserve = TorchServe(url.rstrip("/").removesuffix(f"/predictions/{MODEL_NAME}"))
    fields = {"tta": str(tta).lower(), **metadata}

    def ask(data: bytes) -> Answer:
        try:
            return with_retries(lambda: torchserve.predict(data, version or "", metadata=fields))
        except TorchServeError as error:
            return {"error": {"code": error.code, "message": str(error)}}

    return ask


def answer_table(answers: list[tuple[Path, Answer]]) -> Table:
    """Return a table of one row per image: the top class, and the others above one percent."""
    grid = table("Skin-lesion predictions", (), folded=("Image", "Prediction", "p", "Suspicious", "Others", "Model"))
    for path, answer in answers:
        if "error" in answer:
            grid.add_row(path.name, Text(f"rejected: {answer['error']['message']}", "red"))
            continue
        top, model = answer["prediction"], answer["model"]
        others = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[1:]
        grid.add_row(
            path.name,
            Text(f"{top['code']} {top['name']}", "bold red" if top["malignant"] else "bold green"),
            f"{top['probability']:.3f}",
            suspicion_text(answer.get("suspicion")),
            "  ".join(f"{code} {p:.2f}" for code, p in others if p >= 0.01),
            f"v{model['version']}" if model["version"] else model["digest"][7:15],
        )
    return grid


def suspicion_text(suspicion: dict[str, Any] | None) -> Text:
    """Return "yes" or "no" with the promised sensitivity; a dash for a model without a promise."""
    if not suspicion or suspicion["flagged"] is None:
        return Text("–")
    word, style = ("yes", "bold red") if suspicion["flagged"] else ("no", "")
    return Text(f"{word} ({suspicion['sensitivity']:.0%})", style)


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python scripts/predict.py lesion.jpg  # TorchServe at http://127.0.0.1:8080",
            "python scripts/predict.py *.jpg --bundle model_store/skin_vit  # no server needed",
            "python scripts/predict.py lesion.jpg --json | jq .probabilities",
            "python scripts/predict.py lesion.jpg --age 71 --sex female --site head/neck  # for a model that uses them",
        ],
    )
