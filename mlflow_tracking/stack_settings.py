"""Settings of the services, read from the environment and `.env`; .env.example explains each name."""

import errno
import hashlib
import os
import re
import socket
from functools import cache
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from handlers.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "model_store" / "skin_vit"  # the bundle that comes with the repository
# The registered model in MLflow, the model in TorchServe, and the first part of every archive's name.
MODEL_NAME = "skin_vit"
# The longest path of a socket in bytes. Systems allow 103 or 107, and supervisord briefly appends its process id.
SOCKET_PATH = 95
# A registry is a server, or a database, which training writes to when no server answers.
REGISTRY_URI = re.compile(r"https?://[^/]|(sqlite|postgresql|mysql|mssql)(\+\w+)?://", re.IGNORECASE)


def reach_directly(uri: str) -> None:
    """Bypass proxies between this process and a server on this machine."""
    if (host := urlsplit(uri).hostname) in ("127.0.0.1", "localhost"):
        for name in ("NO_PROXY", "no_proxy"):  # if both are set, the lower case wins
            others = [entry for entry in os.environ.get(name, "").split(",") if entry and entry != host]
            os.environ[name] = ",".join([*others, host])


def quiet_client(uri: str) -> None:
    """Configure MLflow's client before its import: no statistics, short retries, no proxy on this machine."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # The callers retry themselves. MLflow's default would block a command or a training run for two minutes.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # training prints the URL
        # Files go through MLflow, because only the server reaches the object store.
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    }.items():
        os.environ.setdefault(name, value)
    reach_directly(uri)


@cache
def takes_sockets(folder: Path) -> bool:
    """Return whether the file system of a folder has Unix sockets, which some shared folders lack."""
    while not folder.exists():
        folder = folder.parent
    probe = folder / f".{os.getpid()}.sock"
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(probe))
        probe.unlink()
    except OSError as error:  # others, such as a folder that cannot be written, have messages of their own
        return error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
    return True


class SettingsError(UserError):
    """A setting with an unusable value."""


class Settings(BaseSettings):
    """Addresses and folders. Relative folders start at the repository's root; addresses follow from the ports."""

    model_config = SettingsConfigDict(env_file=ROOT / ".env", env_ignore_empty=True, extra="ignore")

    mlflow_port: int = Field(5001, ge=1, le=65535)
    mlflow_tracking_uri: str = ""
    mlflow_public_url: str = ""
    torchserve_port: int = Field(8080, ge=1, le=65535)
    torchserve_metrics_port: int = Field(8082, ge=1, le=65535)
    torchserve_url: str = ""
    torchserve_management: str = ""
    torchserve_run_dir: Path | None = None
    model_store: Path = ROOT / "model_store"
    stack_state: Path = ROOT / ".stack"
    prediction_log: Path | None = None
    promoter_host: str = "127.0.0.1"
    promoter_port: int = Field(8083, ge=1, le=65535)
    promoter_poll_seconds: float = Field(2.0, gt=0)
    promoter_gates: Path = Path("mlflow_tracking/gates.yaml")
    promoter_keep_archives: int = Field(3, ge=0)
    promoter_replica: str = ""
    promoter_key_file: Path | None = None
    streamlit_port: int = Field(8501, ge=1, le=65535)
    monitor_host: str = "127.0.0.1"
    monitor_port: int = Field(8084, ge=1, le=65535)
    monitor_database: str = ""
    monitor_keep_days: int = Field(90, ge=0)
    kept_images: Path | None = None
    keep_images_days: int = Field(0, ge=0)
    review_random_share: float = Field(0.2, ge=0, le=1)
    ray_address: str = ""

    @classmethod
    def load(cls) -> Self:
        """Return the settings in force. Raises SettingsError."""
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
        name, value = str(first["loc"][0]).upper(), first["input"]
        if name.endswith("_PORT"):
            raise SettingsError(f"{name} is '{value}': it must be a port number from 1 to 65535.")
        if name.endswith("_SECONDS"):
            raise SettingsError(f"{name} is '{value}': it must be a number of seconds above 0.")
        if name.endswith("_SHARE"):
            raise SettingsError(f"{name} is '{value}': it must be a number from 0 to 1.")
        raise SettingsError(f"{name} is '{value}': it must be a whole number, 0 or greater.")

    @property
    def registry_uri(self) -> str:
        """MLflow's address. Raises SettingsError for an address that MLflow's client would take for a folder."""
        uri = self.mlflow_tracking_uri or f"http://127.0.0.1:{self.mlflow_port}"
        if not REGISTRY_URI.match(uri):
            raise SettingsError(
                f"MLFLOW_TRACKING_URI is '{uri}': it must be http://HOST:PORT, https://HOST, or a database such as "
                "sqlite:///FILE."
            )
        return uri

    @property
    def inference_url(self) -> str:
        """The address of TorchServe's prediction API. Raises SettingsError if file:PATH cannot be read."""
        if self.torchserve_url.startswith("file:"):  # where TorchServe writes its address (start_torchserve.sh)
            return _text("TORCHSERVE_URL", Path(self.torchserve_url.removeprefix("file:")))
        return self.torchserve_url or f"http://127.0.0.1:{self.torchserve_port}"

    @property
    def management(self) -> str:
        """The address of TorchServe's management API: unix:PATH or http://HOST:PORT. Raises as run_dir."""
        return self.torchserve_management or f"unix:{self.run_dir / 'management.sock'}"

    @property
    def promoter_key(self) -> bytes:
        """The key that several promoters have in common; empty without one. Raises SettingsError."""
        return _text("PROMOTER_KEY_FILE", self.promoter_key_file).encode() if self.promoter_key_file else b""

    @property
    def state(self) -> Path:
        """The state folder, absolute."""
        return ROOT / self.stack_state

    @property
    def completed_bundles(self) -> Path:
        """The folder in which commands without a server keep bundles completed with their serving graphs."""
        return self.state / "completed"

    @property
    def run_dir(self) -> Path:
        """The folder of the sockets: in the state folder, or below /tmp if a socket cannot be there.

        The path may be too long, or the file system may have no sockets. Raises SettingsError for a TORCHSERVE_RUN_DIR
        that is too long.
        """
        folder = ROOT / (self.torchserve_run_dir or self.state / "run")
        if len(os.fsencode(folder / "management.sock")) <= SOCKET_PATH:
            if self.torchserve_run_dir or takes_sockets(folder):
                return folder
        elif self.torchserve_run_dir:
            raise SettingsError(
                f"TORCHSERVE_RUN_DIR is '{folder}': its path is too long for a socket. Set a shorter one."
            )
        return Path("/tmp") / f"skin-lesion-{os.getuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"

    @property
    def gates(self) -> Path:
        """The gates' settings file, absolute."""
        return ROOT / self.promoter_gates

    @property
    def evaluation_cache(self) -> Path:
        """The folder for fetched evaluation sets, absolute."""
        return self.state / "evaluation"

    @property
    def records_predictions(self) -> bool:
        """True if TorchServe writes a prediction log."""
        return str(self.prediction_log) != "off"

    @property
    def monitor_database_url(self) -> str:
        """The address of the monitor's database, by default SQLite in the state folder."""
        return self.monitor_database or f"sqlite:///{self.state / 'monitor.db'}"

    @property
    def kept_images_folder(self) -> Path:
        """The folder of the pictures that are kept for review, absolute; it may not exist."""
        return ROOT / (self.kept_images or self.state / "kept_images")

    @property
    def prediction_logs(self) -> list[Path]:
        """The prediction log and its earlier files, the newest first; absolute.

        Each of several TorchServes has a log in a folder of its own, named by its number.
        """
        log = ROOT / (self.prediction_log or self.state / "logs/predictions.jsonl")
        logs = [log, *(folder / log.name for folder in sorted(log.parent.glob("[0-9]*")))]
        older = [path for log in logs for path in sorted(log.parent.glob(f"{log.name}.[1-9]"))]  # renamed when full
        return [path for path in (*logs, *older) if path.is_file()]

    @property
    def store(self) -> Path:
        """The model store, absolute."""
        return ROOT / self.model_store


def _text(name: str, path: Path) -> str:
    """Return the text of a file that a setting names. Raises SettingsError."""
    try:
        return path.read_text().strip()
    except OSError as error:
        raise SettingsError(f"{name} names {path}, which cannot be read ({error.strerror}).") from error
