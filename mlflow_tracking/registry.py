"""The model registry: versions of skin_vit with their aliases, tags and files.

Versions are downloaded as files and never loaded with `mlflow.pyfunc.load_model`, which runs the code of the version.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from handlers.errors import ServiceUnavailable, UsageError, UserError
from mlflow_tracking.stack_settings import MODEL_NAME, quiet_client
from mlflow_tracking.version_card import Signature

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.exceptions import MlflowException

ALIASES = ("champion", "challenger")  # the aliases that the promoter reads
BUNDLE_ARTIFACT = "bundle"
# Frozen evaluation sets are versions of a registered model of their own, which gives them numbers, tags and an alias.
EVALUATION_SET = "skin_vit_evaluation"
CURRENT = "current"
MAX_VERSIONS = 100_000  # in one answer; MLflow allows 200,000
HEAD_TAG = "audit.head"  # tag of the registered model: the newest line of the promoter's audit log (see head_tag)
_MISSING = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"}


def head_tag(replica: str) -> str:
    """Return HEAD_TAG for a promoter; each of several promoters on one registry has an audit log, and so a tag."""
    return f"{HEAD_TAG}.{replica}" if replica else HEAD_TAG


class RegistryError(UserError):
    """The registry lacks something or refuses a request."""


class RegistryUnavailable(ServiceUnavailable):
    """MLflow does not answer, or answers with a server error."""


def check_alias(alias: str) -> str:
    """Return the value of an option --alias, which may be empty. Raises UsageError for an unknown alias."""
    if alias and alias not in ALIASES:
        raise UsageError(f"--alias is {alias!r}: choose one of {', '.join(ALIASES)}.")
    return alias


@dataclass(frozen=True)
class RegisteredVersion:
    """One version. `digest` is the digest of its bundle, None if the version was not registered by this project."""

    version: str
    digest: str | None
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None
    created_ms: int = 0
    source: str = ""


@dataclass(frozen=True)
class Registration:
    """The result of registering: the version, and whether it is new."""

    version: RegisteredVersion
    created: bool


class Registry:
    """A client for MLflow's model registry at `uri`. Every method may raise RegistryUnavailable."""

    def __init__(self, uri: str) -> None:
        quiet_client(uri)  # before mlflow is imported
        self.uri = uri

    @property
    def mlflow(self) -> ModuleType:
        """The module mlflow, whose global state points at this registry."""
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        return mlflow

    @cached_property
    def client(self) -> "MlflowClient":
        """MLflow's client, made at first use because importing mlflow takes seconds."""
        return self.mlflow.MlflowClient(self.uri)

    def resolve(self, alias: str) -> RegisteredVersion | None:
        """Return the version that an alias points at; None if there is no such alias or model."""
        with self.translated_errors(missing_is_none=True):
            return registered(self.client.get_model_version_by_alias(MODEL_NAME, alias))
        return None

    def version(self, number: str) -> RegisteredVersion | None:
        """Return one version, or None."""
        with self.translated_errors(missing_is_none=True):
            return registered(self.client.get_model_version(MODEL_NAME, number))
        return None

    def versions(self) -> list[RegisteredVersion]:
        """Return all versions with their aliases and tags, newest first."""
        aliases: dict[str, list[str]] = {}
        with self.translated_errors():
            rows = self.client.search_model_versions(f"name='{MODEL_NAME}'", max_results=MAX_VERSIONS)
            if not rows:
                return []
            # A search returns versions without their aliases.
            for alias, number in self.client.get_registered_model(MODEL_NAME).aliases.items():
                aliases.setdefault(str(number), []).append(alias)
        versions = [registered(row, tuple(sorted(aliases.get(str(row.version), [])))) for row in rows]
        return sorted(versions, key=lambda version: int(version.version), reverse=True)

    def find(self, digest: str) -> RegisteredVersion | None:
        """Return the version of the bundle with this digest, which the bundle may have had before its completion."""
        for version in self.versions():
            if digest in (version.digest, version.tags.get("source_digest")):
                return version
        return None

    def signature(self, number: str) -> Signature | None:
        """Return the (name, type) of a version's inputs and of its outputs; None if it has no signature."""
        with self.translated_errors(missing_is_none=True):
            signature = self.mlflow.models.get_model_info(f"models:/{MODEL_NAME}/{number}").signature
            if signature is None or signature.inputs is None or signature.outputs is None:
                return None
            inputs, outputs = (
                tuple((str(column.get("name", "")), str(column["type"])) for column in schema.to_dict())
                for schema in (signature.inputs, signature.outputs)
            )
            return inputs, outputs
        return None

    def run(self, run_id: str) -> "Run | None":
        """Return a training run, or None."""
        with self.translated_errors(missing_is_none=True):
            return self.client.get_run(run_id)
        return None

    def set_alias(self, alias: str, number: str) -> None:
        """Point an alias at a version. Raises RegistryError if there is no such version."""
        if self.version(number) is None:
            existing = ", ".join(version.version for version in self.versions()) or "none"
            raise RegistryError(f"{MODEL_NAME} has no version {number} in {self.uri}. Its versions are: {existing}.")
        with self.translated_errors():
            self.client.set_registered_model_alias(MODEL_NAME, alias, number)
        self.set_model_tag(f"alias.{alias}", number)

    def had_champion(self) -> bool:
        """Return whether a version is or was champion, even if it was deleted."""
        return any(name == "alias.champion" or name.startswith(HEAD_TAG) for name in self.model_tags())

    def tag(self, number: str, tags: Mapping[str, str]) -> None:
        """Write tags on a version; does nothing if the version was deleted."""
        for name, value in tags.items():
            with self.translated_errors(missing_is_none=True):
                self.client.set_model_version_tag(MODEL_NAME, number, name, value)

    def model_tags(self) -> Mapping[str, str]:
        """Return the tags of the registered model; none without the model."""
        with self.translated_errors(missing_is_none=True):
            return self.client.get_registered_model(MODEL_NAME).tags
        return {}

    def set_model_tag(self, name: str, value: str) -> None:
        """Write a tag of the registered model, if the model exists."""
        with self.translated_errors(missing_is_none=True):
            self.client.set_registered_model_tag(MODEL_NAME, name, value)

    def log_report(self, number: str, folder: Path, name: str) -> None:
        """Store the files of a folder with a version, under `name`. Raises RegistryError."""
        version = self.version(number)
        model = version.source.removeprefix("models:/") if version else ""
        if not model.startswith("m-"):
            raise RegistryError(f"Version {number} cannot store a report. Register its bundle with register_model.py.")
        with self.translated_errors():
            self.client.log_model_artifacts(model, str(folder), name)

    def download(self, uri: str, folder: Path) -> Path:
        """Download the artifact at an MLflow URI into `folder` and return its path. Raises RegistryError."""
        with self.translated_errors():
            try:
                return Path(self.mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
            except OSError as error:
                raise RegistryError(f"{uri} cannot be downloaded: {error}.") from error

    def download_version(self, number: str, path: str, folder: Path) -> Path:
        """Download one file or folder of a version. Raises RegistryError."""
        return self.download(f"models:/{MODEL_NAME}/{number}/{path}", folder)

    def download_bundle(self, number: str, folder: Path) -> Path:
        """Download the bundle of a version, unverified. Raises RegistryError if it has none."""
        return self.download_version(number, f"artifacts/{BUNDLE_ARTIFACT}", folder)

    def evaluation_set(self) -> RegisteredVersion | None:
        """Return the evaluation set in force; None if none was frozen."""
        with self.translated_errors(missing_is_none=True):
            return registered(self.client.get_model_version_by_alias(EVALUATION_SET, CURRENT))
        return None

    @contextmanager
    def translated_errors(self, missing_is_none: bool = False) -> Iterator[None]:
        """Turn MLflow's exceptions into RegistryError and RegistryUnavailable.

        With `missing_is_none` the block just ends if MLflow does not have the requested object.
        """
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if missing_is_none and error.error_code in _MISSING:
                return
            raise _translated(error, self.uri) from error


def _translated(error: "MlflowException", uri: str) -> RegistryError | RegistryUnavailable:
    sentence = str(error).splitlines()[0]
    if error.error_code in _MISSING:
        return RegistryError(f"MLflow at {uri} refuses the request ({sentence}).")
    if "error responses" in sentence:
        return RegistryUnavailable(
            f"MLflow at {uri} answers with errors. Read its log; its database or disk may be full or away."
        )
    if "with exception" in sentence:  # the rest of the sentence is the repr of a connection
        return RegistryUnavailable(f"MLflow at {uri} does not answer. Start it with `make up`.")
    return RegistryUnavailable(f"MLflow at {uri} answers with an error ({sentence}).")


def registered(version: "ModelVersion", aliases: tuple[str, ...] | None = None) -> RegisteredVersion:
    """Convert MLflow's entity; `aliases` replace those that the entity holds."""
    return RegisteredVersion(
        version=str(version.version),
        digest=version.tags.get("digest"),
        aliases=tuple(version.aliases) if aliases is None else aliases,
        tags=dict(version.tags),
        run_id=version.run_id or None,
        created_ms=int(version.creation_timestamp or 0),
        source=str(version.source or ""),
    )
