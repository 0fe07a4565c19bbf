"""Register a trained model: a bundle becomes a version of skin_vit in MLflow."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from handlers.errors import UsageError
from mlflow_tracking.command_line import console, run
from mlflow_tracking.registration import register
from mlflow_tracking.registry import BUNDLE_ARTIFACT, Registry, check_alias
from mlflow_tracking.stack_settings import MODEL_NAME, Settings


def register_model(
    run_id: Annotated[str, typer.Option(help="Register the bundle that this training run logged to MLflow.")] = "",
    bundle: Annotated[Path | None, typer.Option(help="Register the bundle in this folder.")] = None,
    alias: Annotated[
        str, typer.Option(callback=check_alias, help="Point this alias at the version: champion or challenger.")
    ] = "",
    if_empty: Annotated[
        bool, typer.Option("--if-empty", help="Do nothing if the registry has or had a champion.")
    ] = False,
) -> None:
    """Register a trained model: a bundle becomes a version of skin_vit in MLflow.

    The bundle is verified, its serving graph is derived from its weights if it
    has none, and its golden answers are checked. A bundle that is registered
    already is not registered again. Exit codes: 0 done, 1 refused, 2 wrong
    options, 3 MLflow does not answer.
    """
    if bool(run_id) == bool(bundle):
        raise UsageError("Give either --run-id or --bundle.")
    registry = Registry(Settings.load().registry_uri)
    if if_empty and not is_empty(registry):
        return
    with tempfile.TemporaryDirectory() as temporary, console.status("Verifying, completing and registering …"):
        source = bundle or registry.download(f"runs:/{run_id}/{BUNDLE_ARTIFACT}", Path(temporary))
        registration = register(registry, source, run_id or None)
    version = registration.version
    if registration.created:
        console.print(f"✓ {MODEL_NAME} version {version.version} is registered.")
        for name in ("architecture", "balanced_accuracy", "golden", "dataset_fingerprint", "digest"):
            if name in version.tags:
                console.print(f"  {name:<20}{version.tags[name]}")
    else:
        console.print(f"This bundle is registered already: {MODEL_NAME} version {version.version}.")
    console.print(f"  {'page':<20}{registry.uri}/#/models/{MODEL_NAME}/versions/{version.version}")
    if alias:
        registry.set_alias(alias, version.version)
        console.print(f"✓ {alias} is version {version.version}. The promoter deploys it.")


def is_empty(registry: Registry) -> bool:
    """Return whether the registry awaits its first model; otherwise print why not.

    An interrupted first start may have left version 1 without an alias, which does not count. MLflow deletes aliases
    with their version, so the record of an alias shows that a version was deleted.
    """
    versions = registry.versions()
    if any(version.aliases for version in versions):
        console.print(f"{MODEL_NAME} has version {versions[0].version} already: nothing to do.")
        return False
    if [version.version for version in versions] in ([], ["1"]) and not registry.had_champion():
        return True
    console.print(
        f"{MODEL_NAME} has no champion: the version with the alias was deleted, or the alias was removed. Nothing is "
        "registered. Deploy a version with `promote.py to VERSION`."
    )
    return False


if __name__ == "__main__":
    run(
        register_model,
        examples=[
            "python scripts/register_model.py --bundle model_store/skin_vit --alias champion",
            "python scripts/register_model.py --run-id RUN     # train.py prints the id of its run",
        ],
    )
