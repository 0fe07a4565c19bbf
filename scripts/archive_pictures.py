"""The pictures of an archive: list them in a fixed order, and read their bytes.

The order is that of the table, or sorted by name for a folder or a bucket. Lists are streamed, because an archive may
hold a hundred million pictures.
"""

import csv
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from handlers.errors import ImageError, UserError
from handlers.file_limits import MAX_UNCOMPRESSED_BYTES
from handlers.metadata import FIELDS
from training.data.image_files import IMAGE_ENDINGS, files, is_picture

TABLES = (".csv", ".parquet")
PATH_COLUMNS = ("path", "image", "file")  # `image` is the manifest's
S3 = "s3://"
# A bucket's objects are pictures by their names alone, because opening each would take longer than scoring it.
S3_ENDINGS = (*IMAGE_ENDINGS, ".heic", ".heif", ".avif", ".dcm")
BATCH = 8192  # rows of a table in memory
# Refusals of one file. Any other failure to read is one of the disk or the network, and ends the run.
OWN_FAULTS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class SourceFault(UserError):
    """The source of a run cannot be listed or read."""


class PictureEntry(NamedTuple):
    """A picture of the archive: its path or s3:// address, and the metadata that a table gives, "" for missing ones."""

    path: str
    age: str = ""
    sex: str = ""
    site: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """The fields that are not missing."""
        return {name: value for name in FIELDS if (value := getattr(self, name))}


def list_pictures(source: str) -> Iterator[PictureEntry]:
    """Yield the pictures of a folder, a table or manifest (CSV, Parquet), or an s3:// address. Raises SourceFault."""
    if source.startswith(S3):
        return _bucket(source)
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        return (PictureEntry(_text(file)) for file in files(path) if is_picture(file))
    if not path.exists():
        raise SourceFault(f"There is no {path}. Give a folder, a table of paths, or an s3:// address.")
    if path.suffix.casefold() not in TABLES:
        raise SourceFault(f"{path} is not a table. Give a folder, a .csv or .parquet file, or an s3:// address.")
    return _table(path)


def read_picture(path: str) -> bytes:
    """Read a file or an object.

    Raises:
        ImageError: there is no such file, it cannot be opened, or it is larger than any picture may be.
        SourceFault: the disk, the network or the bucket fails, which says nothing about the picture.
    """
    try:
        return _read_object(path) if path.startswith(S3) else _read_file(Path(path))
    except OWN_FAULTS as error:
        raise ImageError(400, "unreadable_file", f"The file cannot be read: {error.strerror}.") from error
    except OSError as error:
        raise SourceFault(f"{path} cannot be read: {error}. Run the same command again to go on.") from error


def _text(path: Path) -> str:
    """Return the path as text that Parquet can hold; a name that is not UTF-8 becomes a file that is not found."""
    return str(path).encode(errors="replace").decode()


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_UNCOMPRESSED_BYTES + 1)
    return _checked(data)


def _checked(data: bytes) -> bytes:
    if len(data) > MAX_UNCOMPRESSED_BYTES:
        raise ImageError(
            413, "image_too_large", f"The file has more than the limit of {MAX_UNCOMPRESSED_BYTES:,} bytes."
        )
    return data


def _table(path: Path) -> Iterator[PictureEntry]:
    """Yield the rows of a table. Relative paths start at the table's folder."""
    rows = _csv_rows(path) if path.suffix.casefold() == ".csv" else _parquet_rows(path)
    for number, row in enumerate(rows, start=1):
        name = next((row[column] for column in PATH_COLUMNS if row.get(column)), None)
        if not name:
            raise SourceFault(f"Row {number} of {path} has no path. Fill one of the columns {', '.join(PATH_COLUMNS)}.")
        metadata = {field: _value(row.get(field)) for field in FIELDS}
        yield PictureEntry(str(name) if str(name).startswith(S3) else str(path.parent / str(name)), **metadata)


def _value(value: Any) -> str:
    """Return a table's value as text, "" for NULL and NaN."""
    return "" if value is None or value != value else f"{value:g}" if isinstance(value, float) else str(value)


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
    except (OSError, UnicodeError, csv.Error) as error:
        raise SourceFault(f"{path} cannot be read as a table: {error}. Save it as CSV in UTF-8.") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            columns = [name for name in table.schema_arrow.names if name in (*PATH_COLUMNS, *FIELDS)]
            for batch in table.iter_batches(BATCH, columns=columns):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise SourceFault(f"{path} cannot be read as a Parquet table: {error}.") from error


def _address(url: str) -> tuple[str, str]:
    """Return the bucket and the key of an address. Raises SourceFault."""
    match = re.fullmatch(r"s3://([^/]+)/?(.*)", url, re.DOTALL)
    if not match:
        raise SourceFault(f"{url} is no S3 address. Use s3://BUCKET/PREFIX.")
    return match[1], match[2]


@functools.cache
def _client() -> Any:
    """Return the process's client, with keys, region and AWS_ENDPOINT_URL from the environment as usual."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"mode": "standard", "max_attempts": 5}, max_pool_connections=16))


def _bucket(url: str) -> Iterator[PictureEntry]:
    """Yield the pictures below a prefix, in the order of their keys, as S3 lists them."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = _address(url)
    try:
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            keys = [entry["Key"] for entry in page.get("Contents", [])]
            yield from (PictureEntry(f"{S3}{bucket}/{key}") for key in keys if key.casefold().endswith(S3_ENDINGS))
    except (BotoCoreError, ClientError) as error:
        raise SourceFault(f"{url} cannot be listed: {error}. Check the address, AWS_ENDPOINT_URL and keys.") from error


def _read_object(url: str) -> bytes:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = _address(url)
    try:
        return _checked(_client().get_object(Bucket=bucket, Key=key)["Body"].read(MAX_UNCOMPRESSED_BYTES + 1))
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
            raise FileNotFoundError(2, "No such object") from error
        raise SourceFault(f"{url} cannot be read: {error}. Run the same command again to go on.") from error
    except BotoCoreError as error:
        raise SourceFault(f"{url} cannot be read: {error}. Run the same command again to go on.") from error
