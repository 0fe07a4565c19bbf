"""Download public data sets from their publishers: list the files, resume, verify, unpack.

The data sets stand in downloads.yaml. A file is complete when it has its own name. Until then it is `NAME.part`, which
a later call resumes; `NAME.etag` next to it names the version on the server, so that two versions are never joined.
"""

import fnmatch
import hashlib
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import requests
import yaml
from pydantic import BaseModel, ConfigDict, Field

from handlers.errors import ServiceUnavailable, UsageError, UserError

CATALOGUE = Path(__file__).with_name("downloads.yaml")
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces of an answer
ATTEMPTS = 5  # without a single new byte
CHUNK = 1 << 20
# Room left on the disk after a download; unpacked images take about as much as their archive.
RESERVE = 1 << 30

Progress = Callable[[str, int, int], None]  # name, bytes done, bytes in all (0: not known)


class DownloadError(UserError):
    """A file that cannot be downloaded, verified or unpacked."""


class RemoteFile(BaseModel):
    """A file of a publisher. `size` in bytes and `md5` as hex are empty where the publisher gives none."""

    model_config = ConfigDict(frozen=True)

    url: str
    name: str
    size: int = 0
    md5: str = ""


class Publisher(BaseModel):
    """A data set's address at a publisher that lists its files."""

    model_config = ConfigDict(extra="forbid")

    server: str
    id: str


class Download(BaseModel):
    """One entry of downloads.yaml."""

    model_config = ConfigDict(extra="forbid")

    title: str
    licence: str
    cite: str
    files: list[str] = []
    dataverse: Publisher | None = None
    figshare: Publisher | None = None
    only: Annotated[list[str], Field(min_length=1)] = ["*"]


def read_catalogue(path: Path = CATALOGUE) -> dict[str, Download]:
    """Return the data sets by name."""
    return {name: Download(**entry) for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items()}


def choose(catalogue: Mapping[str, Download], names: Sequence[str]) -> dict[str, Download]:
    """Return the data sets of these names. Raises UsageError for a name that is not in the catalogue."""
    for name in names:
        if name not in catalogue:
            raise UsageError(f"There is no data set {name!r}: choose from {', '.join(catalogue)}.")
    return {name: catalogue[name] for name in names}


def list_files(data_set: Download, session: requests.Session) -> list[RemoteFile]:
    """Return the files of a data set, as its publisher lists them.

    Raises ServiceUnavailable if the publisher does not answer, DownloadError if its list holds none of the files.
    """
    if place := data_set.dataverse:
        url = f"{place.server}/api/datasets/:persistentId/?persistentId={place.id}"
        entries = _json(session, url)["data"]["latestVersion"]["files"]
        files = [
            RemoteFile(
                url=f"{place.server}/api/access/datafile/{entry['dataFile']['id']}?format=original",
                # Dataverse lists a converted table as .tab; `originalFileName` is the uploaded file's name.
                name=entry["dataFile"].get("originalFileName") or entry["dataFile"]["filename"],
                size=entry["dataFile"].get("originalFileSize") or entry["dataFile"]["filesize"],
                # The hash of a converted table is that of the conversion.
                md5="" if "originalFileName" in entry["dataFile"] else entry["dataFile"].get("md5", ""),
            )
            for entry in entries
        ]
    elif place := data_set.figshare:
        entries = _json(session, f"{place.server}/v2/articles/{place.id}")["files"]
        files = [
            RemoteFile(
                url=entry["download_url"], name=entry["name"], size=entry["size"], md5=entry.get("computed_md5") or ""
            )
            for entry in entries
        ]
    else:
        files = [RemoteFile(url=url, name=unquote(PurePosixPath(urlsplit(url).path).name)) for url in data_set.files]
    chosen = [file for file in files if any(fnmatch.fnmatch(file.name, pattern) for pattern in data_set.only)]
    if not chosen:
        raise DownloadError(
            f"The publisher lists no file named {', '.join(data_set.only)}. The data set may have moved."
        )
    for file in chosen:
        if file.name != PurePosixPath(file.name).name or file.name in ("", ".", ".."):
            raise DownloadError(f"The publisher lists a file named {file.name!r}, which is not a plain file name.")
    return chosen


def _json(session: requests.Session, url: str) -> Any:
    try:
        response = session.get(url, timeout=TIMEOUT)
        response.raise_for_status()
        return response.json()
    except requests.RequestException as error:
        raise ServiceUnavailable(f"{url} does not answer as expected ({error}). Try again later.") from error


def download(file: RemoteFile, folder: Path, session: requests.Session, progress: Progress) -> Path:
    """Download a file into `folder`, resuming an earlier try, and verify its size and hash; return its path.

    Raises:
        ServiceUnavailable: the server does not answer, or the connection broke ATTEMPTS times without progress.
        DownloadError: the server refuses, the disk is full, or size or hash are wrong.
    """
    path, part = folder / file.name, folder / f"{file.name}.part"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = _size(part)
        try:
            if _receive(file, part, session, progress):
                break
            reason = "the connection was cut"
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            reason = type(error).__name__
        except requests.RequestException as error:
            raise DownloadError(f"{file.url} cannot be downloaded ({error}).") from error
        except OSError as error:
            raise DownloadError(f"{part} cannot be written ({error.strerror}). What is there is kept.") from error
        failures = 0 if _size(part) > before else failures + 1
        if failures == ATTEMPTS:
            raise ServiceUnavailable(f"{file.url} could not be downloaded ({reason}). Run the command again to resume.")
        time.sleep(min(2**failures, 30))
    _verify(file, part)
    part.rename(path)
    _etag_file(part).unlink(missing_ok=True)
    return path


def _receive(file: RemoteFile, part: Path, session: requests.Session, progress: Progress) -> bool:
    """Append to `part` what the server sends. Return whether the file is complete."""
    start, etag = _size(part), _etag_file(part)
    headers = {"Accept-Encoding": "identity"}
    if start and etag.is_file():
        headers |= {"Range": f"bytes={start}-", "If-Range": etag.read_text()}
    with session.get(file.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416 and start == file.size > 0:
            return True
        if response.status_code >= 500 or response.status_code in (408, 416, 429):
            if response.status_code == 416:  # what lies here is longer than the file
                part.unlink()
            return False
        if not response.ok:
            raise DownloadError(
                f"{file.url} answers {response.status_code} {response.reason}. The file may have moved."
            )
        if response.status_code != 206:  # the server sends all of it again
            start = 0
        if version := response.headers.get("ETag"):
            etag.write_text(version)
        else:
            etag.unlink(missing_ok=True)
        total = start + int(response.headers.get("Content-Length") or 0)
        free = shutil.disk_usage(part.parent).free
        if total - start + RESERVE > free:
            raise DownloadError(
                f"{file.name} has {total >> 20:,} MiB, but {part.parent} has only {free >> 20:,} MiB left. Make room."
            )
        done = start
        with part.open("r+b" if start else "wb") as out:
            out.seek(start)
            for piece in response.iter_content(CHUNK):
                out.write(piece)
                done += len(piece)
                progress(file.name, done, max(total, file.size))
    return done >= total


def _verify(file: RemoteFile, part: Path) -> None:
    if file.size and part.stat().st_size != file.size:
        size = part.stat().st_size
        part.unlink()
        raise DownloadError(
            f"{file.name} has {size:,} bytes, but its publisher gives {file.size:,}. Download it again."
        )
    if file.md5:
        with part.open("rb") as content:
            digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if digest != file.md5:
            part.unlink()
            raise DownloadError(
                f"{file.name} has the MD5 {digest}, but its publisher gives {file.md5}. Download it again."
            )


def fetch(file: RemoteFile, folder: Path, session: requests.Session, progress: Progress) -> Path:
    """Download a file and unpack it if it is a zip file; return the file or the folder. Skip what is there already.

    Raises as `download` and `unpack`.
    """
    if not file.name.lower().endswith(".zip"):
        return download(file, folder, session, progress)
    unpacked = (folder / file.name).with_suffix("")
    return unpacked if unpacked.is_dir() else unpack(download(file, folder, session, progress), progress)


def unpack(archive: Path, progress: Progress) -> Path:
    """Unpack a zip file, and archives inside it, into a folder of its name; delete the archive; return the folder.

    The folder appears under its name only when it is complete.

    Raises DownloadError for a damaged archive, one with paths outside its folder, or a full disk.
    """
    folder, temporary = archive.with_suffix(""), archive.with_suffix(".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _extract(archive, temporary, progress)
        for inner in sorted(temporary.rglob("*.zip")):
            _extract(inner, inner.with_suffix(""), progress)
            inner.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{archive} is damaged ({error}). Delete it and download it again.") from error
    except OSError as error:
        raise DownloadError(f"{archive} cannot be unpacked ({error.strerror}). The archive is kept.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    archive.unlink()
    return folder


def _extract(archive: Path, folder: Path, progress: Progress) -> None:
    with zipfile.ZipFile(archive) as content:
        members = [member for member in content.infolist() if not member.is_dir()]
        for number, member in enumerate(members, start=1):
            parts = PurePosixPath(member.filename.replace("\\", "/")).parts
            if ".." in parts or member.filename.startswith(("/", "\\")) or (parts and parts[0].endswith(":")):
                raise DownloadError(f"{archive} holds the path {member.filename!r}, which leaves its folder.")
            content.extract(member, folder)
            progress(f"unpacking {archive.name}", number, len(members))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _etag_file(part: Path) -> Path:
    return part.with_suffix(".etag")
