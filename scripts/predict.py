"""Ask for predictions on the command line: of the running stack, or of a bundle without any server."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import requests
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from handlers.bundle import BundleError
from handlers.errors import ImageError
from mlflow_tracking.settings import MODEL_NAME, Settings, SettingsError

EPILOG = """
Examples:

  python scripts/predict.py lesion.jpg                              # asks TorchServe at http://127.0.0.1:8080

  python scripts/predict.py *.jpg --bundle model_store/skin_vit     # no server needed

  python scripts/predict.py lesion.jpg --json | jq .probabilities

  python scripts/predict.py lesion.jpg --age 71 --sex female --site head/neck   # for a model that takes them
"""
TIMEOUT_S = 75.0  # longer than TorchServe waits for its worker (torchserve/model-config.yaml)


def main(
    images: Annotated[list[Path], typer.Argument(help="Image files (JPEG, PNG, WebP, BMP, TIFF).")],
    bundle: Annotated[Path | None, typer.Option(help="A bundle folder; predicts in this process.")] = None,
    url: Annotated[
        str | None, typer.Option(help="TorchServe's address.", show_default="that of TORCHSERVE_URL, or of make up")
    ] = None,
    version: Annotated[str | None, typer.Option(help="With --url: a version other than the served default.")] = None,
    tta: Annotated[bool, typer.Option("--tta", help="Average over the picture and its mirror images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON answer a line instead of a table.")] = False,
    age: Annotated[str | None, typer.Option(help="The patient's age in years; the same for all images.")] = None,
    sex: Annotated[str | None, typer.Option(help="female or male.")] = None,
    site: Annotated[str | None, typer.Option(help="Where on the body, such as 'anterior torso'.")] = None,
) -> None:
    """Nine class probabilities for each image.

    The exit code is 1 when an image was refused or the bundle cannot be used, 2 for wrong options, 3 when TorchServe is
    away.
    """
    if bundle and (url or version):
        raise typer.BadParameter(
            "--bundle predicts in this process; --url and --version ask TorchServe. Give one of them."
        )
    if url and not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"--url must be an address such as http://127.0.0.1:8080, not {url}.")
    console = Console(stderr=as_json)
    given = {"age": age, "sex": sex, "site": site}
    metadata = {name: value for name, value in given.items() if value is not None}
    ask = _ask_bundle(bundle, tta, metadata) if bundle else _ask_server(url or _served(), version, tta, metadata)
    refused = False
    answers: list[tuple[Path, dict[str, Any]]] = []
    for path in images:
        try:
            answer = ask(path.read_bytes())
        except OSError as error:
            answer = {"error": {"code": "unreadable_file", "message": error.strerror or str(error)}}
        refused |= "error" in answer
        answers.append((path, answer))
        if as_json:
            print(json.dumps({"file": str(path), **answer}))
    if not as_json:
        console.print(_table(answers))
        console.print("[dim]Research use only. Not a medical device.[/dim]")
    raise typer.Exit(1 if refused else 0)


def _served() -> str:
    try:
        return Settings.load().inference_url
    except SettingsError as error:
        _stop(str(error))


def _ask_bundle(folder: Path, tta: bool, metadata: dict[str, str]) -> Any:
    from handlers.predictor import Predictor
    from handlers.request import Request

    try:
        predictor = Predictor.load(folder)
    except BundleError as error:
        _stop(str(error))

    def ask(data: bytes) -> dict[str, Any]:
        [answer] = predictor.predict([Request(data, tta=tta, metadata=metadata)])
        if isinstance(answer, ImageError):
            return {"error": {"code": answer.code, "message": str(answer)}}
        return answer.to_dict()

    return ask


def _ask_server(url: str, version: str | None, tta: bool, metadata: dict[str, str]) -> Any:
    session = requests.Session()
    session.trust_env = False  # a proxy must not stand between the command and its server
    path = f"/predictions/{MODEL_NAME}"
    # Also where somebody gives the whole address that README's curl has.
    address = url.rstrip("/").removesuffix(path) + path + (f"/{version}" if version else "")
    options = {"tta": str(tta).lower(), **metadata}

    def ask(data: bytes) -> dict[str, Any]:
        try:
            response = session.post(address, files={"data": ("image", data)}, data=options, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            _stop(
                f"TorchServe does not answer at {url} ({type(error).__name__}). Start it with `make up`, "
                "or use --bundle model_store/skin_vit.",
                3,
            )
        try:
            answer = response.json()
        except requests.JSONDecodeError:
            # TorchServe refuses more than its max_request_size without a word.
            hint = "the file is too large" if response.status_code == 413 else f"is TorchServe at {url}?"
            message = f"The server answered {response.status_code} and nothing that can be read: {hint}"
            answer = {"type": response.reason or "no answer", "message": message}
        if "error" not in answer and (not response.ok or "prediction" not in answer):  # TorchServe's own shape
            return {"error": {"code": answer.get("type", response.status_code), "message": answer.get("message", "")}}
        return answer

    return ask


def _table(answers: list[tuple[Path, dict[str, Any]]]) -> Table:
    """One row an image, narrow enough for a terminal: the top class, and the others worth a percent."""
    table = Table(title="Skin-lesion predictions")
    table.add_column("image", overflow="fold")
    table.add_column("prediction")
    table.add_column("p", justify="right")
    table.add_column("others")
    table.add_column("model")
    for path, answer in answers:
        if "error" in answer:
            table.add_row(escape(path.name), f"[red]refused: {escape(str(answer['error']['message']))}[/red]")
            continue
        top, model = answer["prediction"], answer["model"]
        others = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[1:]
        table.add_row(
            escape(path.name),
            f"[bold {'red' if top['malignant'] else 'green'}]{top['code']} {top['name']}[/]",
            f"{top['probability']:.3f}",
            "  ".join(f"{code} {p:.2f}" for code, p in others if p >= 0.01),
            f"v{model['version']}" if model["version"] else model["digest"][7:15],
        )
    return table


def _stop(message: str, code: int = 1) -> NoReturn:
    Console(stderr=True).print(f"[red]{escape(message)}[/red]", highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(epilog=EPILOG)(main)
    app()
