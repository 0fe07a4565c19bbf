"""Write the stack's secrets into the volumes of the services that use them, before those start.

Each secret is random and made once, unless `.env` sets it (.env.example lists the names). A value from `.env` stays in
force without `.env`. Every start gives the current secrets to database and store, so a change locks no service out.
`--rotate` makes new ones.

    docker compose run --rm secrets --rotate && docker compose down && docker compose up -d
"""

import argparse
import json
import os
import re
import secrets
import sys
from pathlib import Path

from dotenv import dotenv_values

from handlers.files import atomic_file

ENV_FILE = Path("/project/.env")
SECRETS = Path("/secrets")
KEPT = "kept/secrets.json"
# name: bytes of randomness, written as two hex digits each; an access key of the store has 20 letters at most.
NAMES = {
    "POSTGRES_PASSWORD": 20,
    "MLFLOW_DATABASE_PASSWORD": 20,
    "MONITOR_DATABASE_PASSWORD": 20,
    "MINIO_ROOT_USER": 10,
    "MINIO_ROOT_PASSWORD": 20,
    "MINIO_ACCESS_KEY": 10,
    "MINIO_SECRET_KEY": 20,
    "GRAFANA_ADMIN_PASSWORD": 16,
    "PAGE_COOKIE_SECRET": 20,
    "JUDGEMENT_KEY": 20,
}
ISSUED = {"OIDC_CLIENT_SECRET": "page/oidc_client_secret"}  # by the identity provider; name: file below SECRETS
# No quotes, colons or blanks, because the values go into shell, INI and pgpass files.
ALLOWED = re.compile(r"[A-Za-z0-9_.,~^*+=/@%!-]{8,40}")


class SecretsError(Exception):
    """A secret that cannot be used, or a file that cannot be read."""


def read_named(names: list[str], file: Path) -> dict[str, str]:
    """Return the values in `.env` of the secrets that are set. Raises SecretsError.

    Compose passes names and not values, because `docker inspect` would show the values.
    """
    try:
        values = dotenv_values(file) if names else {}
    except OSError:  # a strict umask: the container's user is not the owner
        values = {}
    for name in names:
        if not values.get(name):
            raise SecretsError(
                f"{name} is set, but the container cannot read it from the .env next to docker-compose.yml. "
                "Write it there and run `chmod a+rx . && chmod a+r .env`, or unset it."
            )
    return {name: str(values[name]) for name in names}


def read_kept(file: Path, rotate: bool) -> dict[str, str]:
    """Return current secrets, none before the first start. Raises SecretsError for a damaged file unless `rotate`."""
    try:
        kept = json.loads(file.read_text())
        if isinstance(kept, dict) and all(isinstance(value, str) for value in kept.values()):
            return kept
    except FileNotFoundError:
        return {}
    except ValueError:
        pass
    if rotate:
        return {}
    raise SecretsError("The stored secrets are damaged. Make new ones with --rotate.")


def choose(named: dict[str, str], kept: dict[str, str]) -> dict[str, str]:
    """Return each secret: from `.env`, else the current one, else a random one. Raises SecretsError."""
    chosen = {}
    for name, size in NAMES.items():
        if value := named.get(name):
            if not ALLOWED.fullmatch(value):
                raise SecretsError(
                    f"{name} in .env is not valid. Use 8 to 40 letters, digits or characters of `_.,~^*+=/@%!-`."
                )
            chosen[name] = value
        else:
            chosen[name] = kept.get(name) or secrets.token_hex(size)
    return chosen


def files(value: dict[str, str]) -> dict[str, tuple[str, int]]:
    """Return path below SECRETS: (content, mode). Postgres, MinIO and Grafana have users other than the writer."""
    return {
        KEPT: (json.dumps(value), 0o600),
        "mlflow/pgpass": (f"*:*:*:mlflow:{value['MLFLOW_DATABASE_PASSWORD']}\n", 0o600),
        "monitor/pgpass": (f"*:*:*:monitor:{value['MONITOR_DATABASE_PASSWORD']}\n", 0o600),
        "mlflow/aws": (
            "[default]\n"
            f"aws_access_key_id = {value['MINIO_ACCESS_KEY']}\n"
            f"aws_secret_access_key = {value['MINIO_SECRET_KEY']}\n",
            0o600,
        ),
        "postgres/postgres": (value["POSTGRES_PASSWORD"], 0o444),
        "postgres/mlflow": (value["MLFLOW_DATABASE_PASSWORD"], 0o444),
        "postgres/monitor": (value["MONITOR_DATABASE_PASSWORD"], 0o444),
        "minio/config.env": (
            f'export MINIO_ROOT_USER="{value["MINIO_ROOT_USER"]}"\n'
            f'export MINIO_ROOT_PASSWORD="{value["MINIO_ROOT_PASSWORD"]}"\n',
            0o444,
        ),
        "grafana/admin_password": (value["GRAFANA_ADMIN_PASSWORD"], 0o444),
        "promoter/key": (value["JUDGEMENT_KEY"], 0o600),
        "page/cookie_secret": (value["PAGE_COOKIE_SECRET"], 0o600),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rotate", action="store_true", help="replace the current secrets with new ones")
    rotate = parser.parse_args().rotate
    try:
        words = os.environ.get("NAMED_SECRETS", "").split()  # docker-compose.yml has a sentence for old versions in it
        named = read_named([word for word in words if word in {*NAMES, *ISSUED}], ENV_FILE)
        kept = read_kept(SECRETS / KEPT, rotate)
        chosen = choose(named, {} if rotate else kept)
    except SecretsError as error:
        print(error, file=sys.stderr)
        return 1
    issued = {ISSUED[name]: (named[name], 0o600) for name in ISSUED.keys() & named}
    for name, (content, mode) in (files(chosen) | issued).items():
        with atomic_file(SECRETS / name) as file:
            os.fchmod(file.fileno(), mode)
            file.write(content.encode())
    changed = [name for name in NAMES if chosen[name] != kept.get(name)]
    print(f"Secrets are ready. New or changed: {', '.join(changed) or 'none'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
