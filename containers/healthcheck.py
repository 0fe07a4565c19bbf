"""Exit code 0 if a service can do its work: `healthcheck.py URL`, or `healthcheck.py --torchserve SOCKET`.

For images without curl. A URL must answer with 2xx. TorchServe must have a model with a ready worker, which its /ping
does not check.
"""

import http.client
import json
import socket
import sys
import urllib.request
from contextlib import closing
from typing import Any

TIMEOUT = 5.0


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)  # closed with the connection, even if it fails
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self.host)


def torchserve_ready(path: str) -> bool:
    """Return True if there is a model, and each has a ready worker."""

    def get(target: str) -> Any:
        with closing(UnixConnection(path)) as connection:
            connection.request("GET", target, headers={"Host": "localhost"})
            return json.load(connection.getresponse())

    models = get("/models")["models"]
    workers = [[worker["status"] for worker in get(f"/models/{model['modelName']}")[0]["workers"]] for model in models]
    return bool(workers) and all("READY" in states for states in workers)


def main(arguments: list[str]) -> int:
    try:
        if arguments[0] == "--torchserve":
            return 0 if torchserve_ready(arguments[1]) else 1
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(arguments[0], timeout=TIMEOUT):
            return 0
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
