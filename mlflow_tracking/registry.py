"""The registry: versions of skin_vit, their aliases, tags and files. Nothing else in the project speaks to it.

Versions are fetched as files only: `load_model` runs the code that comes with a version, and is never used here.
"""

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import handlers
from handlers.bundle import Bundle
from handlers.completion import complete
from handlers.errors import ServiceUnavailable, UserError
from mlflow_tracking.digests import short
from mlflow_tracking.settings import MODEL_NAME, quiet_client
from mlflow_tracking.version_card import Signature, description, requirements, signature_types, tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

ALIASES = ("champion", "challenger")  # those that the promoter reads
BUNDLE_ARTIFACT = "bundle"
# The frozen evaluation sets are versions of a "model" of their own, so that they have numbers, tags and an alias.
EVALUATION_SET = "skin_vit_evaluation"
CURRENT = "current"
PYFUNC_MODEL = Path(__file__).parent / "pyfunc_model.py"
_MISSING = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"}

DEFAULT_EXPERIMENT = "0"  # MLflow makes it with every new database


class RegistryError(UserError):
    """What was asked of the registry is not there or cannot be done; a sentence."""


class RegistryUnavailable(ServiceUnavailable):
    """MLflow does not answer; a sentence."""


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of the model. `digest` is its bundle's; None where something else registered the version."""

    version: str
    digest: str | None
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None
    created_ms: int = 0
    source: str = ""


@dataclass(frozen=True)
class Registration:
    """The outcome of registering: the version, and whether it is new."""

    version: RegisteredVersion
    created: bool


class Registry:
    """MLflow's model registry at `uri`, for one model."""

    def __init__(self, uri: str) -> None:
        quiet_client(uri)  # before any import of mlflow
        self.uri = uri

    @cached_property
    def client(self) -> "MlflowClient":
        """MLflow's client; made at first use, as importing mlflow takes seconds."""
        return self._mlflow().MlflowClient(self.uri)

    def _mlflow(self) -> ModuleType:
        """MLflow's own functions, which speak to whatever registry they were told of last: to this one."""
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        return mlflow

    def resolve(self, alias: str) -> RegisteredVersion | None:
        """The version an alias points at; None without such an alias or model. Raises RegistryUnavailable."""
        with self._speaking(missing_is_none=True):
            return _registered(self.client.get_model_version_by_alias(MODEL_NAME, alias))
        return None

    def version(self, number: str) -> RegisteredVersion | None:
        """One version, or None. Raises RegistryUnavailable."""
        with self._speaking(missing_is_none=True):
            return _registered(self.client.get_model_version(MODEL_NAME, number))
        return None

    def versions(self) -> list[RegisteredVersion]:
        """All versions, newest first, with aliases and tags. Raises RegistryUnavailable."""
        found: list[ModelVersion] = []
        with self._speaking():
            page = self.client.search_model_versions(f"name='{MODEL_NAME}'", max_results=1000)
            found += page
            while page.token:
                page = self.client.search_model_versions(
                    f"name='{MODEL_NAME}'", max_results=1000, page_token=page.token
                )
                found += page
            # A search tells no aliases; the model does.
            aliases = self.client.get_registered_model(MODEL_NAME).aliases if found else {}
        versions = [
            _registered(
                one, tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(one.version)))
            )
            for one in found
        ]
        return sorted(versions, key=lambda one: int(one.version), reverse=True)

    def signature(self, number: str) -> Signature | None:
        """The (name, type) of a version's inputs and of its outputs; None without. Raises RegistryUnavailable."""
        with self._speaking(missing_is_none=True):
            found = self._mlflow().models.get_model_info(f"models:/{MODEL_NAME}/{number}").signature
            if found is None or found.inputs is None or found.outputs is None:
                return None
            inputs, outputs = (
                tuple((str(one.get("name", "")), str(one["type"])) for one in schema.to_dict())
                for schema in (found.inputs, found.outputs)
            )
            return inputs, outputs
        return None

    def log_report(self, number: str, folder: Path, name: str) -> None:
        """Keep the files of a folder with a version, under `name`. Raises RegistryError, RegistryUnavailable."""
        version = self.version(number)
        model = version.source.removeprefix("models:/") if version else ""
        if not model.startswith("m-"):
            raise RegistryError(f"Version {number} was not registered by register_model.py: it holds no reports.")
        with self._speaking():
            self.client.log_model_artifacts(model, str(folder), name)

    def download(self, number: str, path: str, folder: Path) -> Path:
        """Fetch one of a version's files or folders into `folder`. Raises RegistryError, RegistryUnavailable."""
        return self._download(f"models:/{MODEL_NAME}/{number}/{path}", folder)

    def run(self, run_id: str) -> "Run | None":
        """A training run, or None. Raises RegistryUnavailable."""
        with self._speaking(missing_is_none=True):
            return self.client.get_run(run_id)
        return None

    def model_tag(self, name: str) -> str | None:
        """A tag of the model itself. Raises RegistryUnavailable."""
        with self._speaking(missing_is_none=True):
            return self.client.get_registered_model(MODEL_NAME).tags.get(name)
        return None

    def set_model_tag(self, name: str, value: str) -> None:
        """Write a tag of the model itself, if there is one. Raises RegistryUnavailable."""
        with self._speaking(missing_is_none=True):
            self.client.set_registered_model_tag(MODEL_NAME, name, value)

    def evaluation_set(self) -> RegisteredVersion | None:
        """The frozen evaluation set that counts now; None if there is none. Raises RegistryUnavailable."""
        with self._speaking(missing_is_none=True):
            return _registered(self.client.get_model_version_by_alias(EVALUATION_SET, CURRENT))
        return None

    def download_evaluation_set(self, number: str, folder: Path) -> Path:
        """Fetch a frozen set's files, unverified. Raises RegistryError, RegistryUnavailable."""
        return self._download(f"models:/{EVALUATION_SET}/{number}", folder)

    def freeze(self, folder: Path, tags: Mapping[str, str]) -> Registration:
        """Keep the evaluation set in `folder` and make it the one that counts; `tags` hold its digest, and more.

        A set that is there already is not stored twice. Raises RegistryUnavailable.
        """
        from mlflow.exceptions import MlflowException

        with self._speaking():
            found = self.client.search_model_versions(f"name='{EVALUATION_SET}'")
            existing = next((one for one in found if one.tags.get("digest") == tags["digest"]), None)
            if existing is None:
                experiment = self.client.get_experiment_by_name(EVALUATION_SET)
                number = experiment.experiment_id if experiment else self.client.create_experiment(EVALUATION_SET)
                run = self.client.create_run(number, run_name=short(tags["digest"]))
                self.client.log_artifacts(run.info.run_id, str(folder), EVALUATION_SET)
                self.client.set_terminated(run.info.run_id)
                try:
                    self.client.create_registered_model(EVALUATION_SET)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                made = self.client.create_model_version(
                    EVALUATION_SET,
                    f"runs:/{run.info.run_id}/{EVALUATION_SET}",
                    run_id=run.info.run_id,
                    tags=dict(tags),
                )
            version = existing or made
            self.client.set_registered_model_alias(EVALUATION_SET, CURRENT, str(version.version))
        return Registration(_registered(version), created=existing is None)

    def set_alias(self, alias: str, number: str) -> None:
        """Point an alias at a version. Raises RegistryError if there is none, RegistryUnavailable."""
        if self.version(number) is None:
            have = ", ".join(one.version for one in self.versions()) or "none yet"
            raise RegistryError(f"{MODEL_NAME} has no version {number} in {self.uri} (it has {have}).")
        with self._speaking():
            self.client.set_registered_model_alias(MODEL_NAME, alias, number)

    def tag(self, number: str, tags: Mapping[str, str]) -> None:
        """Write tags on a version; one that is gone is no error. Raises RegistryUnavailable."""
        for name, value in tags.items():
            with self._speaking(missing_is_none=True):
                self.client.set_model_version_tag(MODEL_NAME, number, name, value)

    def download_bundle(self, number: str, folder: Path) -> Path:
        """Fetch the bundle's files of a version, unverified, into `folder`; returns where they lie.

        Raises:
            RegistryError: the version has no bundle.
            RegistryUnavailable
        """
        return self.download(number, f"artifacts/{BUNDLE_ARTIFACT}", folder)

    def download_run_bundle(self, run_id: str, folder: Path) -> Path:
        """Fetch the bundle that a training run logged, unverified. Raises as download_bundle."""
        return self._download(f"runs:/{run_id}/{BUNDLE_ARTIFACT}", folder)

    def _download(self, uri: str, folder: Path) -> Path:
        with self._speaking():
            try:
                return Path(self._mlflow().artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
            except OSError as error:
                raise RegistryError(f"{uri} cannot be fetched: {error}") from error

    def find(self, digest: str) -> RegisteredVersion | None:
        """The version made of the bundle with this digest, before or after completion. Raises RegistryUnavailable."""
        return next((one for one in self.versions() if digest in (one.digest, one.tags.get("source_digest"))), None)

    def register(self, source: Path, run_id: str | None = None) -> Registration:
        """Register the bundle in folder `source`, completed with its serving graph, as a new version.

        A bundle that is registered already is left as it is. With `run_id`, or when the run in the bundle's evidence is
        on this server, the version is linked to that run.

        Raises:
            BundleError: the bundle is damaged, or its graph disagrees with its weights.
            RegistryError: there is no such run.
            RegistryUnavailable
        """
        given = Bundle.load(source)
        if (existing := self.find(given.digest)) is not None:
            return Registration(existing, created=False)
        run_id = self._run_id(run_id, given.config.evidence.get("run_id"))
        with tempfile.TemporaryDirectory() as temporary:
            bundle = complete(source, Path(temporary) / BUNDLE_ARTIFACT)
            if (existing := self.find(bundle.digest)) is not None:
                return Registration(existing, created=False)
            card = tags(bundle) | {"source_digest": given.digest}
            with self._speaking():
                number = self._log(bundle, run_id, card)
                self.client.update_model_version(MODEL_NAME, number, description=description(bundle))
        registered = self.version(number)
        assert registered is not None, "the version that was just made"
        return Registration(registered, created=True)

    def _run_id(self, wanted: str | None, known: str | None) -> str | None:
        """The run to link a version to: `wanted`, which must be there, else `known`, if it is."""
        if wanted and self.run(wanted) is None:
            raise RegistryError(f"There is no run {wanted} in {self.uri}.")
        return wanted or (known if known and self.run(known) else None)

    def _log(self, bundle: Bundle, run_id: str | None, card: Mapping[str, str]) -> str:
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema

        mlflow = self._mlflow()
        # Named always: what MLFLOW_EXPERIMENT_ID or an earlier set_experiment asks for may be of another server.
        experiment = self.client.get_run(run_id).info.experiment_id if run_id else DEFAULT_EXPERIMENT
        # Beside the run, not inside: re-opening a finished run would move its end and its status.
        model = mlflow.initialize_logged_model(
            name=MODEL_NAME, source_run_id=run_id, experiment_id=experiment, tags=dict(card), model_type="classifier"
        )
        inputs, outputs = signature_types(bundle)
        table = Schema([ColSpec(kind, name, required=name == "image") for name, kind in inputs])
        # A column with a name would make MLflow refuse a plain list of images.
        taken = table if len(inputs) > 1 else Schema([ColSpec("binary")])
        given = Schema([ColSpec(kind, name) for name, kind in outputs])
        with warnings.catch_warnings():
            # An example input would be a picture in each version's files, run at every registration: the golden
            # images are that already.
            warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
            logged = mlflow.pyfunc.log_model(
                name=MODEL_NAME,
                model_id=model.model_id,
                python_model=str(PYFUNC_MODEL),
                artifacts={BUNDLE_ARTIFACT: str(bundle.path)},
                code_paths=[str(Path(handlers.__file__).parent)],
                signature=ModelSignature(inputs=taken, outputs=given),
                pip_requirements=requirements(bundle),
                registered_model_name=MODEL_NAME,
                tags=dict(card),
            )
        return str(logged.registered_model_version)

    @contextmanager
    def _speaking(self, missing_is_none: bool = False) -> Iterator[None]:
        """Turn MLflow's exceptions into ours; with `missing_is_none` leave the block when a thing is not there."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            missing = error.error_code in _MISSING
            if missing and missing_is_none:
                return
            sentence = str(error).splitlines()[0]
            if missing:
                raise RegistryError(f"MLflow at {self.uri}: {sentence}") from error
            if "error responses" in sentence:
                told = f"MLflow at {self.uri} answers with errors; its log says why (is its store away, or full?)."
                raise RegistryUnavailable(told) from error
            if "with exception" in sentence:  # of requests, which names classes and memory addresses
                raise RegistryUnavailable(f"MLflow at {self.uri} does not answer.") from error
            raise RegistryUnavailable(f"MLflow at {self.uri} answers with an error: {sentence}") from error


def _registered(one: "ModelVersion", aliases: tuple[str, ...] | None = None) -> RegisteredVersion:
    return RegisteredVersion(
        version=str(one.version),
        digest=one.tags.get("digest"),
        aliases=tuple(one.aliases) if aliases is None else aliases,
        tags=dict(one.tags),
        run_id=one.run_id or None,
        created_ms=int(one.creation_timestamp or 0),
        source=str(one.source or ""),
    )
