"""Render TorchServe's configuration into its run folder and print its path.

A `model_snapshot` line lets TorchServe start with the version that served last, without MLflow and the promoter. The
version comes from the model store's ledger. If its archive is missing or does not match the ledger's SHA-256, the last
good version is used instead.

Settings, from the environment alone: MODEL_STORE, STACK_STATE, TORCHSERVE_RUN_DIR, TORCHSERVE_MANAGEMENT,
TORCHSERVE_HOST, TORCHSERVE_PORT, TORCHSERVE_METRICS_PORT (.env.example explains each).

Standard library only: TorchServe's image does not install the project.
"""

import argparse
import hashlib
import json
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LEDGER_SCHEMA = 1


class StartError(Exception):
    """A reason why TorchServe cannot be started."""


def main() -> int:
    """Render the configuration. Returns exit code 1, with the reason on stderr, if that fails."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        path, remarks = render(os.environ)
    except StartError as error:
        print(error, file=sys.stderr)
        return 1
    for remark in remarks:
        print(remark, file=sys.stderr)
    print(path)
    return 0


def render(env: Mapping[str, str]) -> tuple[Path, list[str]]:
    """Write <run folder>/config.properties. Returns its path and remarks for the log. Raises StartError."""
    store = _folder(env, "MODEL_STORE", "model_store")
    state = _folder(env, "STACK_STATE", ".stack")
    run = _folder(env, "TORCHSERVE_RUN_DIR", str(state / "run"))
    management = env.get("TORCHSERVE_MANAGEMENT") or f"unix:{run / 'management.sock'}"
    _check_socket(management)
    for folder in (store, run):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"The folder {folder} cannot be created: {error.strerror}.") from error
    run.chmod(0o700)  # whoever reaches its sockets controls TorchServe
    text = Template((HERE / "config.properties").read_text()).substitute(
        host=env.get("TORCHSERVE_HOST", "127.0.0.1"),
        port=env.get("TORCHSERVE_PORT", "8080"),
        metrics_port=env.get("TORCHSERVE_METRICS_PORT", "8082"),
        management=_escaped(management),
        model_store=_escaped(store),
        metrics_config=_escaped(HERE / "metrics.yaml"),
    )
    models, remarks = snapshot(store)
    if models:
        text += f"\n# From the store's ledger.\nmodel_snapshot={json.dumps(models, separators=(',', ':'))}\n"
    path = run / "config.properties"
    _write(path, text)
    return path, remarks


def snapshot(store: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return TorchServe's snapshot of the ledger's serving version, or None, and remarks for the log.

    It names one version only, as each further one would delay the first answer. The promoter loads the others.
    """
    try:
        ledger = json.loads((store / "ledger.json").read_text())
        if ledger["schema"] != LEDGER_SCHEMA:
            raise ValueError(f"schema {ledger['schema']}")
        model, archives = ledger["model"], ledger["archives"]
        candidates = [(name, archives[name]) for name in (ledger["default"], ledger["last_good"]) if name in archives]
    except FileNotFoundError:
        return None, []
    except (ValueError, KeyError, TypeError) as error:
        return None, [f"The ledger in {store} cannot be read ({error!r}). Starting without a model."]
    remarks = []
    for name, entry in candidates:
        problem = _problem(store / name, entry["sha256"], entry["version"])
        if problem is None:
            version = {"marName": name, "defaultVersion": True, **entry["settings"]}
            remarks.append(f"Starting with version {entry['version']}.")
            return {"name": "ledger", "modelCount": 1, "models": {model: {entry["version"]: version}}}, remarks
        remarks.append(problem)
    return None, remarks


def _problem(path: Path, sha256: str, version: str) -> str | None:
    try:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"Version {version} is left out: its archive {path.name} cannot be read ({error.strerror})."
    if actual != sha256:
        return f"Version {version} is left out: the SHA-256 of its archive {path.name} is not the one in the ledger."
    return None


def _check_socket(management: str) -> None:
    """Raise StartError for a path that the system cannot use as a socket, or on which a server listens already."""
    if not management.startswith("unix:"):
        return
    path = management.removeprefix("unix:")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            listening = probe.connect_ex(path) == 0
        except OSError as error:
            raise StartError(
                f"The socket {path} cannot be used ({error}). Set TORCHSERVE_RUN_DIR to a folder with a shorter path."
            ) from error
    if listening:
        raise StartError(f"TorchServe is running already in {Path(path).parent}. Stop it first.")


def _folder(env: Mapping[str, str], name: str, default: str) -> Path:
    """Return a folder from the environment; relative paths start at the repository's root."""
    return ROOT / (env.get(name) or default)


def _escaped(value: Path | str) -> str:
    """Escape a value for a properties file, which Java reads as Latin-1: non-ASCII characters become UTF-16 escapes."""
    units = struct.iter_unpack(">H", str(value).replace("\\", "\\\\").encode("utf-16-be"))
    return "".join(chr(unit) if unit < 128 else f"\\u{unit:04x}" for (unit,) in units)


def _write(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)


if __name__ == "__main__":
    sys.exit(main())
