"""score.py gives each picture of an archive one row: REST's own numbers, or the reason of its refusal.

A killed run goes on where it was, with no row twice and none missing. Ray's own tests are slow: `make test-all`.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

from handlers.bundle import Bundle
from handlers.metadata import Metadata
from handlers.skin_lesion_handler import SkinLesionHandler
from handlers.taxonomy import CODES
from scripts import archive_pictures, archive_scoring
from scripts.archive_pictures import PictureEntry, SourceFault, list_pictures, read_picture
from scripts.archive_scoring import ArchiveScoringError, PieceScorer, locked, prepare
from scripts.archive_summary import summarise
from tests.conftest import ROOT
from tests.http_stub import Answer, serve
from tests.models import tiny_bundle
from tests.waiting import eventually

PATIENCE = 300.0  # seconds; Ray starts in ten on an idle core


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def archive(tmp_path, sample_images) -> Path:
    """Ten files in two folders: eight pictures, a text that is called a picture, and an empty file."""
    folder = tmp_path / "archive"
    (folder / "b").mkdir(parents=True)
    for number, data in enumerate(sample_images):
        (folder / ("b" if number % 2 else "") / f"{number}.jpg").write_bytes(data)
    (folder / "b" / "notes.jpg").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "labels.csv").write_text("image,label\n")
    (folder / "0_segmentation.png").write_bytes(sample_images[0])
    (folder / ".hidden.jpg").write_bytes(sample_images[0])
    return folder


def rest(bundle: Bundle, files: list[Path], precision: str, **fields: bytes) -> list[dict]:
    """Return the handler's JSON for each file, in batches of three."""
    handler = SkinLesionHandler()
    context = SimpleNamespace(
        model_yaml_config={"handler": {"precision": precision, "threads": 2}},
        system_properties={"model_dir": str(bundle.path.parent), "gpu_id": None},
        manifest={"model": {"modelVersion": "1"}},
        get_request_header=lambda index, name: None,
        set_response_content_type=lambda index, value: None,
        set_response_status=lambda code, phrase, index: None,
    )
    handler.initialize(context)
    rows = [{"data": bytearray(file.read_bytes()), **fields} for file in files]
    starts = range(0, len(rows), 3)
    return [json.loads(answer) for start in starts for answer in handler.handle(rows[start : start + 3], context)]


def score(out: Path, source: Path | str, bundle: Bundle, precision: str = "f32") -> list[dict]:
    """Score what is missing in this process, without Ray, and return all rows."""
    with locked(out):
        run = prepare(out, str(source), bundle.path, precision, out.parent / "cache")
        scorer = PieceScorer(out)
        for piece in run.missing():
            scorer({"item": [piece]})
    return rows_of(out)


def rows_of(out: Path) -> list[dict]:
    return [row for path in sorted((out / "scores").glob("*")) for row in parquet.read_table(path).to_pylist()]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_the_numbers_are_those_of_rest_to_the_last_digit(bundle, archive, tmp_path, precision):
    rows = score(tmp_path / "out", archive, bundle, precision)
    files = sorted(path for path in archive.rglob("[!.]*.[jp][pn]g") if "_" not in path.name)
    assert [row["path"] for row in rows] == [str(path) for path in files]
    assert [row["row"] for row in rows] == list(range(10))
    for row, answer in zip(rows, rest(bundle, files, precision), strict=True):
        assert row["model"] == bundle.digest
        if "error" in answer:
            assert (row["error_code"], row["error"]) == (answer["error"]["code"], answer["error"]["message"])
            assert row["MEL"] is row["prediction"] is row["malignant_flagged"] is None
            continue
        assert {code: row[code] for code in CODES} == answer["probabilities"]
        assert row["prediction"] == answer["prediction"]["code"]
        assert row["malignant"] == answer["suspicion"]["malignant"]
        assert row["malignant_flagged"] == answer["suspicion"]["flagged"]
        assert row["likely_set"] == answer["uncertainty"]["conformal_set"]
        assert row["entropy"] == answer["uncertainty"]["entropy"]
        assert (row["sha256"], row["width"]) == (answer["image"]["sha256"], answer["image"]["width"])
    assert [row["error_code"] for row in rows if row["error"]] == ["unsupported_media_type", "empty_image"]


def test_a_table_gives_paths_and_metadata(archive, tmp_path, sample_images):
    model = tiny_bundle(tmp_path / "m" / "bundle", metadata=Metadata.of(["age", "sex", "site"]))
    table = archive / "manifest.csv"
    table.write_text(
        "image_id,image,age,sex,site\na,0.jpg,71,female,head/neck\nb,b/1.jpg,,,\nc,gone.jpg,,,\nd,0.jpg,x,,\n"
    )
    rows = score(tmp_path / "csv", table, model)
    fields = {"age": b"71", "sex": b"female", "site": b"head/neck"}
    [answer] = rest(model, [archive / "0.jpg"], "f32", **fields)
    assert {code: rows[0][code] for code in CODES} == answer["probabilities"]
    assert rows[1]["error"] is None
    assert rows[2]["error"] == "The file cannot be read: No such file or directory."
    assert rows[2]["sha256"] is None
    assert "age is 'x'" in rows[3]["error"]

    columns = {"image": ["0.jpg", "b/1.jpg", "gone.jpg", "0.jpg"], "age": [71.0, None, float("nan"), 500.0]}
    columns |= {"sex": ["female", None, "", ""], "site": ["head/neck", None, "", ""], "label": ["MEL"] * 4}
    parquet.write_table(pa.table(columns), archive / "table.parquet")
    typed = score(tmp_path / "parquet", archive / "table.parquet", model)
    assert [typed[0][code] for code in CODES] == [rows[0][code] for code in CODES]
    assert [row["error_code"] for row in typed] == [None, None, "unreadable_file", "invalid_request"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent", None, "There is no .*absent. Give a folder"),
        ("list.txt", "a.jpg", "list.txt is not a table"),
        ("list.csv", "name\na.jpg\n", "Row 1 of .* has no path. Fill one of the columns path, image, file"),
        ("list.csv", b"path\n\xff\n", "cannot be read as a table"),
        ("list.parquet", "no parquet", "cannot be read as a Parquet table"),
        ("list.csv", "path\n", "has no pictures"),
    ],
)
def test_a_source_that_cannot_be_listed_is_refused(bundle, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((SourceFault, ArchiveScoringError), match=message):
        score(tmp_path / "out", tmp_path / name, bundle)
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.fixture
def bucket(archive, monkeypatch):
    """An S3 server that serves `archive` as the bucket "b"; the keys in `broken` get a 500."""
    broken: set[str] = set()

    def answer(request: BaseHTTPRequestHandler, _: bytes) -> Answer:
        address = urlsplit(request.path)
        query, key = parse_qs(address.query), address.path.removeprefix("/b").strip("/")
        if "list-type" in query:
            keys = sorted(path.relative_to(archive).as_posix() for path in archive.rglob("*") if path.is_file())
            keys = [name for name in keys if name.startswith(query.get("prefix", [""])[0])]
            start = int(query.get("continuation-token", ["0"])[0])  # pages of four
            more = f"<NextContinuationToken>{start + 4}</NextContinuationToken>" if len(keys) > start + 4 else ""
            entries = "".join(f"<Contents><Key>{name}</Key></Contents>" for name in keys[start : start + 4])
            text = f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>{more}{entries}"
            return Answer(body=f"<ListBucketResult>{text}</ListBucketResult>".encode())
        if key in broken:
            return Answer(500)
        if not (archive / key).is_file():
            return Answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return Answer(body=(archive / key).read_bytes())

    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
                        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    archive_pictures._client.cache_clear()
    with serve(answer) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield broken
    archive_pictures._client.cache_clear()


def test_a_bucket_is_scored_like_a_folder(bundle, archive, bucket, tmp_path):
    (archive / "0_segmentation.png").unlink()  # in a bucket, every object with a picture's ending counts
    (archive / ".hidden.jpg").unlink()
    local = score(tmp_path / "local", archive, bundle)
    remote = score(tmp_path / "remote", "s3://b", bundle)
    names = [row["path"].removeprefix("s3://b/") for row in remote]
    assert names == sorted(names)
    assert set(names) == {row["path"].removeprefix(f"{archive}/") for row in local}
    assert {row["sha256"]: row["MEL"] for row in remote} == {row["sha256"]: row["MEL"] for row in local}
    assert [entry.path for entry in list_pictures("s3://b/b/1")] == ["s3://b/b/1.jpg"]
    with pytest.raises(archive_scoring.ImageError, match="No such object"):
        read_picture("s3://b/gone.jpg")


def test_a_store_that_fails_ends_the_run_and_is_no_refusal(bundle, archive, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    bucket.add("4.jpg")
    with pytest.raises(SourceFault, match="s3://b/4.jpg cannot be read: .* Run the same command again"):
        score(tmp_path / "out", "s3://b", bundle)
    assert rows_of(tmp_path / "out") == []
    bucket.clear()
    assert len(score(tmp_path / "out", "s3://b", bundle)) == 12


def test_a_run_goes_on_with_the_missing_pieces(bundle, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(archive_scoring, "SMALL_PIECE", 3)
    out = tmp_path / "out"
    whole = score(out, archive, bundle)
    pieces = sorted((out / "scores").glob("*"))
    assert [parquet.read_metadata(path).num_rows for path in pieces] == [3, 3, 3, 1]
    times = {path: path.stat().st_mtime_ns for path in pieces}
    pieces[2].unlink()
    (out / "scores" / ".part-00000002.parquet.abc.tmp").write_bytes(b"half")
    (out / ".model.x").mkdir()
    (archive / "later.jpg").write_bytes(b"")  # not in the list of the run
    assert score(out, archive, bundle) == whole
    assert {path for path in pieces if path.stat().st_mtime_ns != times[path]} == {pieces[2]}
    assert not [path for path in [*out.iterdir(), *(out / "scores").iterdir()] if path.name.startswith(".")]


def test_another_run_does_not_mix_into_a_folder(bundle, archive, tmp_path):
    out = tmp_path / "out"
    score(out, archive, bundle)
    other = tiny_bundle(tmp_path / "other" / "bundle", seed=1)
    with pytest.raises(ArchiveScoringError, match="holds a run with the bundle 'sha256:.*Choose another --out"):
        score(out, archive, other)
    with pytest.raises(ArchiveScoringError, match="the precision 'f32', and this one has 'bf16'"):
        score(out, archive, bundle, "bf16")
    with pytest.raises(ArchiveScoringError, match="the source '.*archive', and"):
        score(out, archive / "b", bundle)
    with locked(out), pytest.raises(ArchiveScoringError, match="Another process scores into"):
        score(out, archive, bundle)
    (out / "run.json").unlink()
    with pytest.raises(ArchiveScoringError, match="has scores, but no run.json"):
        score(out, archive, bundle)
    (tmp_path / "file").touch()
    with pytest.raises(ArchiveScoringError, match="cannot be written: .*Choose another --out"):
        score(tmp_path / "file", archive, bundle)


def test_a_piece_that_ends_its_worker_again_and_again_ends_the_run(bundle, archive, tmp_path):
    out = tmp_path / "out"
    score(out, archive, bundle)
    (out / "scores" / "part-00000000.parquet").unlink()
    (out / "attempts" / "0").write_bytes(b"." * archive_scoring.ATTEMPTS)  # a killed worker leaves its byte
    with pytest.raises(ArchiveScoringError, match="rows from 0 of .*out ended their worker 5 times"):
        score(out, archive, bundle)


def test_a_batch_that_fails_costs_only_the_faulty_picture(bundle, archive, tmp_path, monkeypatch, caplog):
    faulty, predict = (archive / "4.jpg").read_bytes(), archive_scoring.Predictor.predict

    def fail(self, requests):
        if faulty in [request.image for request in requests]:
            raise RuntimeError("the model failed")
        return predict(self, requests)

    monkeypatch.setattr(archive_scoring.Predictor, "predict", fail)
    rows = score(tmp_path / "out", archive, bundle)
    assert [Path(row["path"]).name for row in rows if row["error_code"] == "internal_error"] == ["4.jpg"]
    assert sum(row["error"] is None for row in rows) == 7


def test_workers_are_not_bound_to_a_core(bundle, archive, tmp_path):
    score(tmp_path / "out", archive, bundle)
    assert archive_scoring.core().get_property("CPU", "ENABLE_CPU_PINNING") is False


def test_the_summary_counts_all_rows(bundle, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(archive_scoring, "SMALL_PIECE", 3)
    out = tmp_path / "out"
    rows = score(out, archive, bundle)
    flagged = sum(row["malignant_flagged"] or False for row in rows)
    text = summarise(archive_scoring.ScoringRun.read(out))
    assert f"8 pictures scored, 2 refused, {flagged} flagged" in text
    report = (out / "summary.md").read_text()
    for code in {row["prediction"] for row in rows} - {None}:
        count = sum(row["prediction"] == code for row in rows)
        assert any(line.startswith(f"| {code} ") and f"| {count} |" in line for line in report.splitlines())
    assert "| empty_image | 1 |" in report
    for name in ("classes.png", "confidence.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in report


def test_the_list_of_a_long_table_holds_every_row_in_order(tmp_path):
    entries = (PictureEntry(f"{number}.jpg", age="7") for number in range(10_000))
    assert archive_scoring.write_input(entries, tmp_path / "input.parquet") == 10_000
    file = parquet.ParquetFile(tmp_path / "input.parquet")
    assert file.metadata.row_group(0).num_rows == archive_scoring.GROUP
    assert file.read(["path"])["path"].to_pylist() == [f"{number}.jpg" for number in range(10_000)]


@pytest.fixture
def long_table(archive, tmp_path) -> Path:
    """A table of 6,000 rows, which repeat the archive's pictures."""
    names = ["0.jpg", "b/1.jpg", "b/notes.jpg", "2.jpg", "b/3.jpg", "4.jpg"]
    table = archive / "long.csv"
    table.write_text("path\n" + "".join(f"{names[row % 6]}\n" for row in range(6000)))
    return table


@contextmanager
def started(table: Path, out: Path, bundle: Bundle, **environment: str) -> Iterator[subprocess.Popen]:
    """Run score.py, whose workers do not give way to other programs, and kill it if it is still running."""
    command = [sys.executable, "scripts/score.py", str(table), "--out", str(out), "--bundle", str(bundle.path)]
    with subprocess.Popen(
        [*command, "--precision", "f32"], cwd=ROOT, env=os.environ | {"RAY_worker_niceness": "0"} | environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def finished(out: Path) -> list[Path]:
    return sorted((out / "scores").glob("part-*")) if (out / "scores").is_dir() else []


def assert_whole(out: Path, archive: Path, bundle: Bundle) -> None:
    """Every row of the long table is there once, with REST's numbers."""
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(6000))
    answers = rest(bundle, [archive / name for name in ("0.jpg", "b/1.jpg")], "f32")
    for position, answer in enumerate(answers):
        assert {tuple(row[code] for code in CODES) for row in rows[position::6]} == {
            tuple(answer["probabilities"].values())
        }
    assert {row["error_code"] for row in rows[2::6]} == {"unsupported_media_type"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_and_leaves_no_process(bundle, archive, long_table, tmp_path):
    out = tmp_path / "out"
    with started(long_table, out, bundle) as process:
        eventually(lambda: len(finished(out)) >= 3, PATIENCE, lambda: "no piece was scored")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # The workers end within seconds, Ray's agents of a node after a minute.
    alive = psutil.wait_procs(children, 120)[1]
    assert children and not alive
    before = {path: path.stat().st_mtime_ns for path in finished(out)}
    assert 3 <= len(before) < 24
    with started(long_table, out, bundle) as process:
        output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    assert f"24 pieces, of which {24 - len(before)} are left" in output
    assert "5,000 pictures scored, 1,000 refused" in output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_whole(out, archive, bundle)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_share_the_work_and_survive_the_death_of_one(bundle, archive, long_table, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster

    out = tmp_path / "out"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        first, second = (cluster.add_node(num_cpus=1, include_dashboard=False) for _ in range(2))
        with started(long_table, out, bundle, RAY_ADDRESS=cluster.address) as process:
            # Each node has one core, so two pieces in work at once are on two nodes.
            attempts = out / "attempts"
            eventually(lambda: len(list(attempts.glob("*"))) == 2, PATIENCE, lambda: "the nodes do not share the work")
            eventually(lambda: len(finished(out)) >= 6, PATIENCE, lambda: "six pieces were not scored")
            cluster.remove_node(second, allow_graceful=False)
            assert len(finished(out)) < 24
            output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, output
        assert first in cluster.worker_nodes
    finally:
        cluster.shutdown()
    assert_whole(out, archive, bundle)
