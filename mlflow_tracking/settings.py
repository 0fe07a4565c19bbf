"""Where the services are: one settings object, read from the environment and `.env` (.env.example lists all names)."""

import hashlib
import os
import re
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
# Bytes of a socket's path; systems allow 103 or 107, and supervisord adds its process id for a moment.
SOCKET_PATH = 95
# What holds a registry: a server, or a database without one, as training leaves where none answers.
STORE = re.compile(r"https?://[^/]|(sqlite|postgresql|mysql|mssql)(\+\w+)?://", re.IGNORECASE)


def reach_directly(uri: str) -> None:
    """Let no proxy stand between this process and a server on this machine; other addresses are left alone."""
    if (host := urlsplit(uri).hostname) in ("127.0.0.1", "localhost"):
        for name in ("NO_PROXY", "no_proxy"):  # where both are there, the lower case wins
            others = [one for one in os.environ.get(name, "").split(",") if one and one != host]
            os.environ[name] = ",".join([*others, host])


def quiet_client(uri: str) -> None:
    """Set MLflow's client up before its import: no statistics, no minutes of retries, no proxy to loopback."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Our callers try again themselves; nobody should wait two minutes for "is it running?", nor a training run.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # training prints it itself
        # Files go through MLflow: by itself the client would turn to the object store, which only the server can reach.
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    }.items():
        os.environ.setdefault(name, value)
    reach_directly(uri)


class SettingsError(UserError):
    """A setting that cannot be used; a sentence."""


class Settings(BaseSettings):
    """Addresses and folders of the registry's side. A relative folder is meant from the repository's root.

    Addresses that are not given follow from the ports, as in `make up`.
    """

    model_config = SettingsConfigDict(env_file=ROOT / ".env", env_ignore_empty=True, extra="ignore")

    mlflow_port: int = Field(5001, ge=1, le=65535)
    mlflow_tracking_uri: str = ""
    torchserve_port: int = Field(8080, ge=1, le=65535)
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

    @classmethod
    def load(cls) -> Self:
        """The settings in force. Raises SettingsError for a value that cannot be."""
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            raise SettingsError(f"{str(first['loc'][0]).upper()}={first['input']} cannot be: {first['msg']}.") from None

    @property
    def registry_uri(self) -> str:
        """MLflow's address. Raises SettingsError for one that its client would take for a folder of files."""
        uri = self.mlflow_tracking_uri or f"http://127.0.0.1:{self.mlflow_port}"
        if not STORE.match(uri):
            raise SettingsError(
                f"MLFLOW_TRACKING_URI={uri} cannot be: it is http://HOST:PORT (or https), or a database such as "
                "sqlite:///FILE."
            )
        return uri

    @property
    def inference_url(self) -> str:
        """The address of TorchServe's prediction API."""
        return self.torchserve_url or f"http://127.0.0.1:{self.torchserve_port}"

    @property
    def management(self) -> str:
        """The address of TorchServe's management API: unix:PATH or http://HOST:PORT. Raises as run_dir."""
        return self.torchserve_management or f"unix:{self.run_dir / 'management.sock'}"

    @property
    def state(self) -> Path:
        """The state folder, absolute."""
        return ROOT / self.stack_state

    @property
    def run_dir(self) -> Path:
        """The folder of the sockets: in the state folder, or short under /tmp where that lies too deep for a socket.

        Raises SettingsError for a TORCHSERVE_RUN_DIR that is too long.
        """
        wanted = ROOT / (self.torchserve_run_dir or self.state / "run")
        if len(os.fsencode(wanted / "management.sock")) <= SOCKET_PATH:
            return wanted
        if self.torchserve_run_dir:
            raise SettingsError(
                f"TORCHSERVE_RUN_DIR={wanted} is too long for the path of a socket: name a shorter folder."
            )
        return Path("/tmp") / f"skin-lesion-{os.getuid()}-{hashlib.sha256(os.fsencode(wanted)).hexdigest()[:8]}"

    @property
    def gates(self) -> Path:
        """The gates' settings, absolute."""
        return ROOT / self.promoter_gates

    @property
    def evaluation_cache(self) -> Path:
        """Where the frozen evaluation set is kept once it was fetched, absolute."""
        return self.state / "evaluation"

    @property
    def prediction_logs(self) -> list[Path]:
        """TorchServe's prediction log and those before it that are kept, the newest first; absolute."""
        newest = ROOT / (self.prediction_log or self.state / "logs/predictions.jsonl")
        older = sorted(newest.parent.glob(f"{newest.name}.*"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [path for path in (newest, *older) if path.is_file()]

    @property
    def store(self) -> Path:
        """The model store, absolute."""
        return ROOT / self.model_store
