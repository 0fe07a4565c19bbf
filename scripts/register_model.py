"""Register a trained model: a bundle becomes a version of skin_vit in MLflow.

The bundle is verified, its serving graph is derived from its weights if
it lacks one, and both are checked against the bundle's golden answers. A
bundle that is registered already is not registered twice. The exit code
is 1 when it cannot be registered, 2 for wrong options, 3 when MLflow is away.
"""

import sys
import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from handlers.bundle import BundleError
from mlflow_tracking.registry import Registry, RegistryError, RegistryUnavailable
from mlflow_tracking.settings import MODEL_NAME, Settings, SettingsError
from scripts.options import known_alias

EPILOG = """
Examples:

  python scripts/register_model.py --bundle model_store/skin_vit --alias champion

  python scripts/register_model.py --run-id RUN     # the bundle that this training run logged; train.py prints its id
"""

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__, epilog=EPILOG)
def register(
    run_id: str = typer.Option("", "--run-id", help="Register the bundle that this MLflow run logged."),
    bundle: Path = typer.Option(None, "--bundle", help="Register the bundle in this folder."),
    alias: str = typer.Option(
        "",
        "--alias",
        callback=known_alias,
        help="Point this alias at it: champion, which serves, or challenger, which stands by.",
    ),
    if_empty: bool = typer.Option(False, "--if-empty", help="Do nothing where the registry has a version already."),
) -> None:
    if bool(run_id) == bool(bundle):
        raise typer.BadParameter("give either --run-id or --bundle.")
    registry = Registry(Settings.load().registry_uri)
    if if_empty and (known := registry.versions()) and (len(known) > 1 or known[0].aliases):
        # A single version without an alias may be what an interrupted start has left.
        console.print(f"{MODEL_NAME} has version {known[0].version} already: nothing to do.")
        return
    progress = console.status("Checking the bundle, deriving its serving graph, registering …")
    with tempfile.TemporaryDirectory() as temporary, progress:
        source = bundle or registry.download_run_bundle(run_id, Path(temporary))
        registration = registry.register(source, run_id or None)
    version = registration.version
    if registration.created:
        console.print(f"[green]✓[/] {MODEL_NAME} version [bold]{version.version}[/] is registered.")
        for name in ("architecture", "balanced_accuracy", "golden", "dataset_fingerprint", "digest"):
            if name in version.tags:
                console.print(f"  [dim]{name:<20}[/]{escape(version.tags[name])}")
    else:
        console.print(f"This bundle is registered already: {MODEL_NAME} version [bold]{version.version}[/].")
    console.print(f"  [dim]{'page':<20}[/]{registry.uri}/#/models/{MODEL_NAME}/versions/{version.version}")
    if alias:
        registry.set_alias(alias, version.version)
        console.print(f"[green]✓[/] {alias} is version [bold]{version.version}[/]; the promoter does the rest.")


if __name__ == "__main__":
    try:
        app()
    except RegistryUnavailable as error:
        errors.print(f"[red]{escape(str(error))}[/]\nIs it running? `make up`, or mlflow_tracking/mlflow_server.sh.")
        sys.exit(3)
    except (BundleError, RegistryError, SettingsError) as error:
        errors.print(f"[red]{escape(str(error))}[/]")
        sys.exit(1)
