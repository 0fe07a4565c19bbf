"""Data sets are downloaded whole or not at all.

A local server stands in for the publishers. It sends ranges, cuts connections, changes files between two tries, sends
wrong content, or refuses. After each of these the folder holds the right file, or the error says what to do.
"""

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import requests
import yaml

from handlers.errors import ServiceUnavailable, UsageError
from tests.http_stub import Answer, serve
from training.data import download as downloads
from training.data.download import Download, DownloadError, Publisher, RemoteFile, choose, download, fetch, list_files

ROOT = Path(__file__).parent.parent
CONTENT = bytes(range(256)) * 4000


class Site:
    """A publisher's server: `files` by path; `cut` is after how many bytes of an answer the connection breaks."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/a.bin": CONTENT}
        self.cut: int | None = None
        self.status: dict[str, int] = {}
        self.ranges: list[str | None] = []
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler, _: bytes) -> Answer:
        path, asked = request.path.partition("?")[0], request.headers.get("Range")
        content = self.files.get(path, b"")
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        self.ranges.append(asked)
        if path in self.status or path not in self.files:
            return Answer(self.status.get(path, 404))
        start = 0
        if asked and request.headers.get("If-Range") == etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        body = content[start:]
        return Answer(206 if start else 200, body[: self.cut], {"ETag": etag, "Content-Length": str(len(body))})

    def file(self, path: str = "/a.bin", **known: object) -> RemoteFile:
        return RemoteFile(url=self.url + path, name=path.rpartition("/")[2], **known)


@pytest.fixture
def site(monkeypatch) -> Iterator[Site]:
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(downloads, "CHUNK", 1 << 14)
    site = Site()
    with serve(site.answer) as site.url:
        yield site


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def quiet(title: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def zipped(**files: bytes) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def test_a_broken_connection_is_resumed_where_it_broke(site, session, tmp_path):
    site.cut = len(CONTENT) // 3
    path = download(site.file(size=len(CONTENT), md5=hashlib.md5(CONTENT).hexdigest()), tmp_path, session, quiet)
    assert path.read_bytes() == CONTENT
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0 for asked in site.ranges]
    assert starts == sorted(set(starts))
    assert len(starts) >= 4
    assert [each.name for each in tmp_path.iterdir()] == ["a.bin"]


def test_a_later_call_resumes_and_a_complete_file_is_not_asked_for_again(site, session, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloads, "_receive", lambda *a: (_ for _ in ()).throw(requests.ConnectionError("away")))
        with pytest.raises(ServiceUnavailable, match="Run the command again to resume"):
            download(site.file(), tmp_path, session, quiet)
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:5000])
    (tmp_path / "a.bin.etag").write_text(f'"{hashlib.sha256(CONTENT).hexdigest()[:16]}"')
    assert download(site.file(), tmp_path, session, quiet).read_bytes() == CONTENT
    assert site.ranges == ["bytes=5000-"]
    download(site.file(), tmp_path, session, quiet)
    assert len(site.ranges) == 1


def test_two_versions_of_a_file_are_never_joined(site, session, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"old" * 100)
    (tmp_path / "a.bin.etag").write_text('"the old version"')
    assert download(site.file(), tmp_path, session, quiet).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("known", "message"),
    [({"md5": "0" * 32}, "has the MD5 .* but its publisher gives 0000"), ({"size": 5}, "but its publisher gives 5")],
)
def test_a_wrong_file_is_refused_and_removed(site, session, tmp_path, known, message):
    with pytest.raises(DownloadError, match=message):
        download(site.file(**known), tmp_path, session, quiet)
    assert not (tmp_path / "a.bin").exists()
    assert not (tmp_path / "a.bin.part").exists()


def test_a_full_disk_is_named_before_anything_is_written(site, session, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "RESERVE", 1 << 60)
    with pytest.raises(DownloadError, match=r"MiB left\. Make room"):
        download(site.file(), tmp_path, session, quiet)
    assert not (tmp_path / "a.bin.part").exists()


def test_a_disk_that_fills_up_keeps_what_is_there(site, session, tmp_path, monkeypatch):
    def full(*arguments: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_receive", full)
    (tmp_path / "a.bin.part").write_bytes(b"begun")
    with pytest.raises(DownloadError, match="No space left on device"):
        download(site.file(), tmp_path, session, quiet)
    assert (tmp_path / "a.bin.part").read_bytes() == b"begun"


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(404, DownloadError, "answers 404"), (403, DownloadError, "may have moved"), (503, ServiceUnavailable, "resume")],
)
def test_a_server_that_refuses_is_named(site, session, tmp_path, status, error, message):
    site.status["/a.bin"] = status
    with pytest.raises(error, match=message):
        download(site.file(), tmp_path, session, quiet)


def test_archives_and_archives_inside_them_are_unpacked_once(site, session, tmp_path):
    site.files["/set.zip"] = zipped(**{"images__part.zip": zipped(two=b"2"), "one": b"1"})
    folder = fetch(site.file("/set.zip"), tmp_path, session, quiet)
    assert (folder / "one").read_bytes() == b"1"
    assert (folder / "images" / "part" / "two").read_bytes() == b"2"
    assert [each.name for each in tmp_path.iterdir()] == ["set"]
    fetch(site.file("/set.zip"), tmp_path, session, quiet)
    assert len(site.ranges) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped(**{"..__evil": b"x"}), "leaves its folder"),
        (zipped(**{"__tmp__evil": b"x"}), "leaves its folder"),
        (b"PK no zip at all", "is damaged"),
    ],
)
def test_a_hostile_or_damaged_archive_is_refused(site, session, tmp_path, content, message):
    site.files["/bad.zip"] = content
    with pytest.raises(DownloadError, match=message):
        fetch(site.file("/bad.zip"), tmp_path / "data", session, quiet)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["bad.zip"]


def test_the_lists_of_publishers_are_read(site, session):
    converted = {"id": 2, "filename": "meta.tab", "originalFileName": "meta.csv", "originalFileSize": 7, "filesize": 9}
    plain = {"id": 1, "filename": "part_1.zip", "filesize": 5, "md5": "ab"}
    versions = {"latestVersion": {"files": [{"dataFile": plain}, {"dataFile": converted}]}}
    site.files["/api/datasets/:persistentId/"] = json.dumps({"data": versions}).encode()
    entry = {"name": "b.csv", "size": 3, "computed_md5": "cd", "download_url": f"{site.url}/b"}
    site.files["/v2/articles/7"] = json.dumps({"files": [entry]}).encode()
    about = {"title": "t", "licence": "l", "cite": "c"}
    dataverse = Download(**about, dataverse=Publisher(server=site.url, id="doi:1"))
    assert [(file.name, file.size, file.md5) for file in list_files(dataverse, session)] == [
        ("part_1.zip", 5, "ab"),
        ("meta.csv", 7, ""),
    ]
    figshare = Download(**about, figshare=Publisher(server=site.url, id="7"))
    assert list_files(figshare, session) == [RemoteFile(url=f"{site.url}/b", name="b.csv", size=3, md5="cd")]
    with pytest.raises(DownloadError, match=r"lists no file named \*\.png"):
        list_files(figshare.model_copy(update={"only": ["*.png"]}), session)
    entry["name"] = "../evil"
    site.files["/v2/articles/7"] = json.dumps({"files": [entry]}).encode()
    with pytest.raises(DownloadError, match="not a plain file name"):
        list_files(figshare, session)
    with pytest.raises(ServiceUnavailable, match="does not answer as expected"):
        list_files(Download(**about, figshare=Publisher(server=site.url, id="8")), session)


def test_every_entry_of_the_catalogue_names_where_its_files_are():
    for name, data_set in downloads.read_catalogue().items():
        places = [bool(data_set.files), bool(data_set.dataverse), bool(data_set.figshare)]
        assert sum(places) == 1, name
        assert all(url.startswith("https://") for url in data_set.files), name
    with pytest.raises(UsageError, match="There is no data set 'isic2091': choose from ham10000"):
        choose(downloads.read_catalogue(), ["isic2091"])


def test_the_command_ends_in_a_folder_that_prepare_data_reads(site, tmp_path, drawn_image):
    images = {f"ISIC_000000{n}.jpg": drawn_image("MEL" if n % 2 else "NV", n) for n in range(8)}
    site.files["/Input.zip"] = zipped(**{f"Input__{name}": data for name, data in images.items()})
    rows = [f"{name[:-4]},{'mel' if n % 2 else 'nv'}" for n, name in enumerate(images)]
    site.files["/truth.csv"] = "\n".join(["image_id,dx", *rows]).encode()
    entry = {"title": "t", "licence": "CC0", "cite": "c", "files": [f"{site.url}/Input.zip", f"{site.url}/truth.csv"]}
    (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump({"drawn": entry}))
    program = (
        "import sys, pathlib; import training.data.download as d; import scripts.fetch_data as f;"
        f"f.read_catalogue = lambda: d.read_catalogue(pathlib.Path({str(tmp_path / 'catalogue.yaml')!r}));"
        f"f.main(['drawn'], pathlib.Path({str(tmp_path / 'data')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Licence: CC0" in done.stdout
    command = [sys.executable, "scripts/prepare_data.py", "--data", str(tmp_path / "data" / "drawn"), "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "manifest.csv")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "manifest.csv").read_text().count("ISIC_") >= 8
