"""Promotion with the artifacts in an object store: MLflow over a real MinIO, where its binary is on the PATH.

- versions and reports go through the bucket and come back;
- with the store away what serves goes on serving; a promotion fails with a sentence, and finishes when it is back;
- an object that somebody exchanged in the bucket is refused by its digest.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from mlflow_tracking.registry import Registry
from scripts.child_processes import free_ports
from tests.live import Promotion, mlflow_server

pytest_plugins = ["tests.fixtures_registry"]
pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("minio") is None, reason="no minio on the PATH"),
]


@dataclass
class MinIO:
    """A MinIO server with one bucket, on loopback."""

    folder: Path
    port: int
    keys: tuple[str, str] = field(default_factory=lambda: (secrets.token_hex(8), secrets.token_hex(16)))
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self):
        config = Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 1}, proxies={})
        names = ("aws_access_key_id", "aws_secret_access_key")
        own = dict(zip(names, self.keys, strict=True))
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", config=config, **own)

    def start(self) -> None:
        with (self.folder / "minio.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["minio", "server", str(self.folder / "data"), "--address", f"127.0.0.1:{self.port}",
                 "--console-address", "127.0.0.1:0"],
                env=os.environ | dict(zip(("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"), self.keys, strict=True)),
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, (self.folder / "minio.log").read_text()
            assert time.monotonic() < end, "minio does not answer"
            with suppress(BotoCoreError, ClientError):
                if "mlflow" not in [one["Name"] for one in self.client.list_buckets()["Buckets"]]:
                    self.client.create_bucket(Bucket="mlflow")
                return
            time.sleep(0.2)

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def over_minio(quiet_mlflow, full_bundle, short_folder) -> Iterator[tuple[Promotion, MinIO]]:
    folder = short_folder / "o"
    (folder / "mlflow").mkdir(parents=True)
    minio = MinIO(folder, free_ports(1)[0])
    minio.start()
    mlflow = mlflow_server(folder / "mlflow")
    mlflow.env |= {
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow/",
        "MLFLOW_S3_ENDPOINT_URL": minio.url,
        "AWS_ACCESS_KEY_ID": minio.keys[0],
        "AWS_SECRET_ACCESS_KEY": minio.keys[1],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    mlflow.start()
    try:
        with Promotion.started(folder, Registry(mlflow.health.removesuffix("/health")), full_bundle) as promotion:
            yield promotion, minio
    finally:
        mlflow.stop()
        minio.kill()


def test_promotion_over_an_object_store(over_minio, tmp_path):
    promotion, minio = over_minio
    first, second, third = (promotion.register(tmp_path) for _ in range(3))
    _, result = promotion.champion(first)
    assert result.settled, result.errors
    assert promotion.served() == first
    kept = minio.client.list_objects_v2(Bucket="mlflow")["Contents"]
    assert any(one["Key"].endswith("gates/report.html") for one in kept)

    minio.kill()
    promotion.registry.set_alias("champion", second)
    began = time.monotonic()
    _, result = promotion.settle()
    print(f"without its store MLflow gave up after {time.monotonic() - began:.1f} s: {result.errors[0]}")
    assert "answers with errors. Read its log" in result.errors[0]
    assert promotion.served() == first
    assert not [path for path in promotion.store.iterdir() if path.name.endswith(".tmp")]
    minio.start()
    _, result = promotion.settle()
    assert promotion.settle()[1].settled, result.errors
    assert promotion.served() == second

    model = promotion.registry.version(third).source.removeprefix("models:/")
    kept = minio.client.list_objects_v2(Bucket="mlflow")["Contents"]
    [weights] = [one["Key"] for one in kept if model in one["Key"] and one["Key"].endswith("model.safetensors")]
    minio.client.put_object(Bucket="mlflow", Key=weights, Body=b"forged")
    _, result = promotion.champion(third)
    assert "its bundle in the registry is damaged" in result.errors[0]
    assert promotion.tag(third, "status") == "refused"
    assert promotion.served() == second
