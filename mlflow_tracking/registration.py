"""Registration: a bundle becomes a version of skin_vit in MLflow."""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import handlers
from handlers.bundle import Bundle
from handlers.graph_export import complete
from mlflow_tracking.registry import BUNDLE_ARTIFACT, Registration, Registry, RegistryError
from mlflow_tracking.stack_settings import MODEL_NAME
from mlflow_tracking.version_card import description, requirements, signature_types, tags

PYFUNC_MODEL = Path(__file__).parent / "pyfunc_model.py"
DEFAULT_EXPERIMENT = "0"  # exists in every MLflow database


def register(registry: Registry, source: Path, run_id: str | None = None) -> Registration:
    """Register the bundle in folder `source`, completed with its serving graph, as a new version.

    A bundle that is registered already is not registered again. The version is linked to run `run_id`, or else to the
    run in the bundle's evidence if this MLflow has that run.

    Raises:
        BundleError: the bundle is damaged, or its graph disagrees with its weights.
        RegistryError: there is no such run.
        RegistryUnavailable
    """
    bundle = Bundle.load(source)
    if existing := registry.find(bundle.digest):
        return Registration(existing, created=False)
    run_id = _training_run(registry, run_id, bundle)
    with tempfile.TemporaryDirectory() as temporary:
        completed = complete(bundle, Path(temporary) / BUNDLE_ARTIFACT)
        if existing := registry.find(completed.digest):
            return Registration(existing, created=False)
        version_tags = tags(completed) | {"source_digest": bundle.digest}
        with registry.translated_errors():
            number = _log(registry, completed, run_id, version_tags)
            registry.client.update_model_version(MODEL_NAME, number, description=description(completed))
    version = registry.version(number)
    if version is None:
        raise RegistryError(f"Version {number} was deleted while it was registered. Register the bundle again.")
    return Registration(version, created=True)


def _training_run(registry: Registry, run_id: str | None, bundle: Bundle) -> str | None:
    """Return the id of the run to link the version to, or None. Raises RegistryError if there is no run `run_id`."""
    if run_id and registry.run(run_id) is None:
        raise RegistryError(f"There is no run {run_id} in {registry.uri}. Training prints the id of its run.")
    recorded = bundle.config.evidence.get("run_id")
    return run_id or (recorded if recorded and registry.run(recorded) else None)


def _log(registry: Registry, bundle: Bundle, run_id: str | None, version_tags: Mapping[str, str]) -> str:
    """Log the bundle as a model that MLflow itself can run, register it, and return the version's number."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    mlflow = registry.mlflow
    # Always explicit: MLFLOW_EXPERIMENT_ID or an earlier set_experiment may belong to another server.
    experiment = registry.client.get_run(run_id).info.experiment_id if run_id else DEFAULT_EXPERIMENT
    # Logged next to the run, not inside it: re-opening a finished run would change its end time and status.
    model = mlflow.initialize_logged_model(
        name=MODEL_NAME,
        source_run_id=run_id,
        experiment_id=experiment,
        tags=dict(version_tags),
        model_type="classifier",
    )
    inputs, outputs = signature_types(bundle)
    # MLflow refuses a plain list of images if the only column has a name.
    image_alone = Schema([ColSpec("binary")])
    table = Schema([ColSpec(kind, name, required=name == "image") for name, kind in inputs])
    signature = ModelSignature(
        inputs=table if len(inputs) > 1 else image_alone,
        outputs=Schema([ColSpec(kind, name) for name, kind in outputs]),
    )
    with warnings.catch_warnings():
        # The golden images serve as examples, so none is stored a second time.
        warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
        logged = mlflow.pyfunc.log_model(
            name=MODEL_NAME,
            model_id=model.model_id,
            python_model=str(PYFUNC_MODEL),
            artifacts={BUNDLE_ARTIFACT: str(bundle.path)},
            code_paths=[str(Path(handlers.__file__).parent)],
            signature=signature,
            pip_requirements=requirements(bundle),
            registered_model_name=MODEL_NAME,
            tags=dict(version_tags),
        )
    return str(logged.registered_model_version)
