"""The frozen evaluation set: the pictures that every gate and every replay uses.

Two files, stored as one artifact in the registry:

    rows.csv     file, image_id, label (class code), lesion_id, source, sha256, phash of each picture, and age, sex,
                 site and patient_id, blank where unknown; sorted by sha256
    images.zip   the pictures, byte for byte, each named after its hash

The digest of a set is the hash of rows.csv. It vouches for the pictures too, because rows.csv holds their hashes.
Sorting by hash is a random order, so the first N pictures are a fair sample.
"""

import hashlib
import io
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from handlers.errors import UserError
from handlers.files import atomic_file
from handlers.metadata import FIELDS
from handlers.taxonomy import CODES
from mlflow_tracking.digests import DIGEST, short
from mlflow_tracking.registry import CURRENT, EVALUATION_SET, Registration, Registry, registered

ROWS = "rows.csv"
IMAGES = "images.zip"
COLUMNS = ("file", "image_id", "label", "lesion_id", "source", "sha256", "phash", *FIELDS, "patient_id")
# A smaller set keeps at least this many pictures of a class if there are as many: recall over fewer is too coarse.
MIN_CLASS_IMAGES = 20


class EvaluationSetError(UserError):
    """An evaluation set that cannot be made, or whose files are damaged."""


@dataclass(frozen=True)
class EvaluationSet:
    """A set in a folder. `frame` has COLUMNS; `digest` is "sha256:" and the hash of rows.csv."""

    folder: Path
    frame: pd.DataFrame
    digest: str

    @classmethod
    def load(cls, folder: Path) -> "EvaluationSet":
        """Read a set without checking its pictures, which `verify` and `images` do. Raises EvaluationSetError."""
        try:
            text = (folder / ROWS).read_bytes()
            frame = pd.read_csv(io.BytesIO(text), dtype=str, keep_default_na=False)
            with zipfile.ZipFile(folder / IMAGES) as archive:
                names = set(archive.namelist())
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise EvaluationSetError(f"The evaluation set in {folder} cannot be read: {error}.") from error
        if tuple(frame.columns) != COLUMNS or frame.empty or set(frame["label"]) - set(CODES):
            raise EvaluationSetError(
                f"{folder / ROWS} is not the table of an evaluation set. Freeze the set again with prepare_data.py."
            )
        if missing := set(frame["file"]) - names:
            raise EvaluationSetError(
                f"{folder / IMAGES} lacks {min(missing)}. Freeze the set again with prepare_data.py."
            )
        return cls(folder, frame, f"sha256:{hashlib.sha256(text).hexdigest()}")

    def __len__(self) -> int:
        return len(self.frame)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The true classes (N,), indices into CODES."""
        return np.array([CODES.index(label) for label in self.frame["label"]], np.int64)

    @cached_property
    def lesions(self) -> NDArray[np.int64]:
        """The lesion's number of each picture (N,), from 0."""
        return np.asarray(pd.factorize(self.frame["lesion_id"])[0], np.int64)

    def images(self, positions: Sequence[int]) -> list[bytes]:
        """Return the bytes of some pictures. Raises EvaluationSetError if one is damaged."""
        return list(self._read(positions))

    def verify(self) -> None:
        """Check every picture. Raises EvaluationSetError if one is damaged."""
        for _ in self._read(range(len(self))):
            pass

    def _read(self, positions: Sequence[int]) -> Iterator[bytes]:
        try:
            with zipfile.ZipFile(self.folder / IMAGES) as archive:
                for row in self.frame.iloc[list(positions)].itertuples():
                    image = archive.read(str(row.file))
                    if hashlib.sha256(image).hexdigest() != row.sha256:
                        raise EvaluationSetError(f"The picture {row.image_id} of the evaluation set was changed.")
                    yield image
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise EvaluationSetError(f"A picture of the evaluation set cannot be read: {error}.") from error


class CurrentSet:
    """The evaluation set in force, downloaded from the registry into the folder `cache` and verified once."""

    def __init__(self, registry: Registry, cache: Path) -> None:
        self._registry = registry
        self._cache = cache
        self._verified: EvaluationSet | None = None

    def get(self) -> EvaluationSet | None:
        """Return the set, or None if none was frozen. Raises EvaluationSetError, RegistryError, RegistryUnavailable."""
        version = self._registry.evaluation_set()
        if version is None:
            return None
        digest = version.digest or ""
        if not DIGEST.fullmatch(digest):
            raise EvaluationSetError(
                f"Version {version.version} of the evaluation set has no valid digest tag. "
                "Freeze the set again with prepare_data.py."
            )
        if self._verified is None or self._verified.digest != digest:
            self._verified = self._cached(digest) or self._downloaded(version.version, digest)
        return self._verified

    def doubt(self) -> None:
        """Verify the cached files again before their next use, and download them again if they are damaged."""
        self._verified = None

    def _cached(self, digest: str) -> EvaluationSet | None:
        with suppress(EvaluationSetError):
            evaluation = EvaluationSet.load(self._cache / short(digest))
            if evaluation.digest == digest:
                evaluation.verify()
                return evaluation
        return None

    def _downloaded(self, version: str, digest: str) -> EvaluationSet:
        # Patients' pictures: the files of an older set are deleted.
        shutil.rmtree(self._cache, ignore_errors=True)
        self._cache.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=self._cache) as temporary:
            folder = self._registry.download(f"models:/{EVALUATION_SET}/{version}", Path(temporary) / "set")
            evaluation = EvaluationSet.load(folder)
            if evaluation.digest != digest:
                raise EvaluationSetError(
                    f"Version {version} of the evaluation set was changed after it was frozen: "
                    f"its digest is {evaluation.digest}."
                )
            evaluation.verify()
            folder.rename(self._cache / short(digest))
        return EvaluationSet.load(self._cache / short(digest))


def freeze(rows: pd.DataFrame, folder: Path, images: int | None = None) -> EvaluationSet:
    """Write the pictures of a manifest's rows as an evaluation set into `folder`.

    Args:
        rows: from training.data.manifest.read_manifest.
        images: roughly how many pictures to take, as whole lesions, in proportion to the classes. None takes all.

    Raises:
        EvaluationSetError: there are no rows, or a file is unreadable or differs from the manifest.
    """
    if rows.empty:
        raise EvaluationSetError("There is no picture to freeze. Choose a split of the manifest that has some.")
    chosen = (rows if images is None else _sample(rows, images)).drop_duplicates("sha256").sort_values("sha256")
    files = [f"{row.sha256}{Path(str(row.path)).suffix.lower()}" for row in chosen.itertuples()]
    frame = chosen.assign(file=files)[list(COLUMNS)]
    with atomic_file(folder / IMAGES) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, path, digest in zip(files, chosen["path"], chosen["sha256"], strict=True):
            try:
                image = Path(path).read_bytes()
            except OSError as error:
                raise EvaluationSetError(f"{path} cannot be read: {error.strerror}.") from error
            if hashlib.sha256(image).hexdigest() != digest:
                raise EvaluationSetError(
                    f"{path} has changed since the manifest was made. Make the manifest again with prepare_data.py."
                )
            archive.writestr(zipfile.ZipInfo(name), image)  # ZipInfo has a fixed date, so that the bytes repeat
    with atomic_file(folder / ROWS) as file:
        file.write(frame.to_csv(index=False, float_format="%g", lineterminator="\n").encode())
    return EvaluationSet.load(folder)


def extended(current: EvaluationSet | None, rows: pd.DataFrame, folder: Path) -> EvaluationSet:
    """Write a set with the pictures of `current` and those of a manifest's rows into `folder`.

    Raises EvaluationSetError as `freeze` does.
    """
    if current is None:
        return freeze(rows, folder)
    with tempfile.TemporaryDirectory() as temporary:
        with zipfile.ZipFile(current.folder / IMAGES) as archive:
            archive.extractall(temporary, current.frame["file"])
        paths = [str(Path(temporary) / name) for name in current.frame["file"]]
        earlier = current.frame.assign(path=paths, age=pd.to_numeric(current.frame["age"], errors="coerce"))
        return freeze(pd.concat([earlier, rows], ignore_index=True), folder)


def publish(registry: Registry, evaluation: EvaluationSet, tags: Mapping[str, str]) -> Registration:
    """Store a set with some tags in the registry, unless it is there, and put it in force.

    Raises RegistryError, RegistryUnavailable.
    """
    from mlflow.exceptions import MlflowException

    with registry.translated_errors():
        client = registry.client
        versions = client.search_model_versions(f"name='{EVALUATION_SET}'")
        existing = next((version for version in versions if version.tags.get("digest") == evaluation.digest), None)
        version = existing
        if version is None:
            experiment = client.get_experiment_by_name(EVALUATION_SET)
            experiment_id = experiment.experiment_id if experiment else client.create_experiment(EVALUATION_SET)
            run_id = client.create_run(experiment_id, run_name=short(evaluation.digest)).info.run_id
            client.log_artifacts(run_id, str(evaluation.folder), EVALUATION_SET)
            client.set_terminated(run_id)
            try:
                client.create_registered_model(EVALUATION_SET)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"runs:/{run_id}/{EVALUATION_SET}"
            all_tags = {**tags, "digest": evaluation.digest}
            version = client.create_model_version(EVALUATION_SET, source, run_id=run_id, tags=all_tags)
        client.set_registered_model_alias(EVALUATION_SET, CURRENT, str(version.version))
    return Registration(registered(version), created=existing is None)


def _sample(rows: pd.DataFrame, images: int) -> pd.DataFrame:
    """Take whole lesions in the order of their ids' hashes until each class has its share."""
    share = min(1.0, images / len(rows))
    order = rows["lesion_id"].map(lambda lesion: hashlib.sha256(str(lesion).encode()).hexdigest())
    taken = []
    for _, of_class in rows.groupby("label"):
        target = max(math.ceil(share * len(of_class)), min(MIN_CLASS_IMAGES, len(of_class)))
        lesions = of_class.assign(order=order).sort_values(["order", "sha256"])
        ends = lesions.groupby("order", sort=False).size().cumsum()
        last = ends.index[min(int(ends.searchsorted(target)), len(ends) - 1)]
        taken.append(lesions[lesions["order"] <= last])
    return pd.concat(taken).drop(columns="order")
