"""The frozen evaluation set: the pictures about which every gate and every replay asks, wherever it runs.

Two files, kept as one artifact in the registry:

    rows.csv     file, image_id, label (class code), lesion_id, source, sha256, phash of each picture, and age, sex and
                 site, blank where unknown; sorted by sha256
    images.zip   the pictures, byte for byte, each named after its hash

Its digest is the hash of rows.csv, which holds the hashes of the pictures, so one value vouches for all of it. The
order by hash is a random one: any first part of it is a fair sample.
"""

import hashlib
import io
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
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
from mlflow_tracking.registry import Registry

ROWS = "rows.csv"
IMAGES = "images.zip"
BEFORE_METADATA = ("file", "image_id", "label", "lesion_id", "source", "sha256", "phash")
COLUMNS = (*BEFORE_METADATA, *FIELDS)
# A class keeps at least this many pictures in a smaller set, if it has them: a recall out of two says nothing.
FEWEST_OF_A_CLASS = 20


class EvaluationSetError(UserError):
    """An evaluation set that cannot be made, or is not what it says it is; a sentence."""


@dataclass(frozen=True)
class EvaluationSet:
    """A verified set in a folder. `frame` has COLUMNS; `digest` is "sha256:" and the hash of rows.csv."""

    folder: Path
    frame: pd.DataFrame
    digest: str

    @classmethod
    def load(cls, folder: Path) -> "EvaluationSet":
        """Read a set; its pictures are checked by `verify`, and when they are read. Raises EvaluationSetError."""
        try:
            text = (folder / ROWS).read_bytes()
            frame = pd.read_csv(io.BytesIO(text), dtype=str, keep_default_na=False)
            with zipfile.ZipFile(folder / IMAGES) as archive:
                missing = set(frame["file"]) - set(archive.namelist())
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise EvaluationSetError(f"The evaluation set in {folder} cannot be read: {error}.") from error
        # A set from before it kept metadata is still the one that was frozen; nothing is known of its patients.
        known = tuple(frame.columns) in (COLUMNS, BEFORE_METADATA)
        if not known or frame.empty or missing or set(frame["label"]) - set(CODES):
            raise EvaluationSetError(f"The evaluation set in {folder} is incomplete, or of another kind.")
        return cls(folder, frame.reindex(columns=list(COLUMNS), fill_value=""), digest_of(text))

    def __len__(self) -> int:
        return len(self.frame)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The true classes, as indices into CODES (N,)."""
        return np.array([CODES.index(label) for label in self.frame["label"]], np.int64)

    @cached_property
    def lesions(self) -> NDArray[np.int64]:
        """A number for each picture's lesion (N,), from 0."""
        return np.asarray(pd.factorize(self.frame["lesion_id"])[0], np.int64)

    def images(self, positions: Sequence[int]) -> list[bytes]:
        """The bytes of some pictures. Raises EvaluationSetError for one that was changed or cannot be read."""
        return list(self._read(positions))

    def verify(self) -> None:
        """Read every picture. Raises EvaluationSetError for one that was changed or cannot be read."""
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
    """The frozen set that counts now, fetched from the registry into the folder `cache` and verified."""

    def __init__(self, registry: Registry, cache: Path) -> None:
        self._registry = registry
        self._cache = cache
        self._verified: EvaluationSet | None = None

    def get(self) -> EvaluationSet | None:
        """The set; None if none is frozen. It is fetched and verified once, until there is another, or doubt.

        Raises:
            EvaluationSetError: it is not what was frozen.
            RegistryError, RegistryUnavailable
        """
        registered = self._registry.evaluation_set()
        if registered is None:
            return None
        digest = registered.digest or ""
        if not DIGEST.fullmatch(digest):
            raise EvaluationSetError(f"Version {registered.version} of the evaluation set has no valid digest tag.")
        if self._verified is None or self._verified.digest != digest:
            self._verified = self._kept(digest) or self._fetched(registered.version, digest)
        return self._verified

    def doubt(self) -> None:
        """The copy turned out to be damaged: have it verified before it is used again, and fetched if need be."""
        self._verified = None

    def _kept(self, digest: str) -> EvaluationSet | None:
        with suppress(EvaluationSetError):
            if (found := EvaluationSet.load(self._cache / short(digest))).digest == digest:
                found.verify()
                return found
        return None

    def _fetched(self, version: str, digest: str) -> EvaluationSet:
        # Other people's pictures: none of an older set stays behind.
        shutil.rmtree(self._cache, ignore_errors=True)
        self._cache.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=self._cache) as temporary:
            place = Path(temporary) / "set"
            place.mkdir()
            fetched = self._registry.download_evaluation_set(version, place)
            found = EvaluationSet.load(fetched)
            if found.digest != digest:
                raise EvaluationSetError(
                    f"Version {version} of the evaluation set is not what was frozen: its digest is {found.digest}."
                )
            found.verify()
            fetched.rename(self._cache / short(digest))
        return EvaluationSet.load(self._cache / short(digest))


def freeze(rows: pd.DataFrame, folder: Path, images: int | None = None) -> EvaluationSet:
    """Write the pictures of a manifest's rows (training.data.manifest.read_manifest) as an evaluation set into `folder`.

    Args:
        images: about how many to take: whole lesions, each class in its share but at least FEWEST_OF_A_CLASS pictures
            where there are any; None for all.

    Raises:
        EvaluationSetError: there is no picture, or one cannot be read or is not the one in the manifest.
    """
    if rows.empty:
        raise EvaluationSetError("There is no picture to freeze.")
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
                raise EvaluationSetError(f"{path} is not the file in the manifest any more; make the manifest anew.")
            archive.writestr(zipfile.ZipInfo(name), image)  # dated 1980, not today
    with atomic_file(folder / ROWS) as file:
        file.write(frame.to_csv(index=False, float_format="%g", lineterminator="\n").encode())
    return EvaluationSet.load(folder)


def digest_of(rows: bytes) -> str:
    """The digest of a set with this rows.csv."""
    return "sha256:" + hashlib.sha256(rows).hexdigest()


def _sample(rows: pd.DataFrame, images: int) -> pd.DataFrame:
    """Whole lesions in the order of their ids' hashes, until each class has its share."""
    share = min(1.0, images / len(rows))
    order = rows["lesion_id"].map(lambda lesion: hashlib.sha256(str(lesion).encode()).hexdigest())
    taken = []
    for _, of_class in rows.groupby("label"):
        wanted = max(math.ceil(share * len(of_class)), min(FEWEST_OF_A_CLASS, len(of_class)))
        lesions = of_class.assign(order=order).sort_values(["order", "sha256"])
        ends = lesions.groupby("order", sort=False).size().cumsum()
        last = ends.index[min(int(ends.searchsorted(wanted)), len(ends) - 1)]
        taken.append(lesions[lesions["order"] <= last])
    return pd.concat(taken).drop(columns="order")
