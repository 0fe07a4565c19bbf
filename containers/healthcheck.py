"""Exit code 0 if a service can do its work: `healthcheck.py URL`, or `healthcheck.py --torchserve SOCKET`.

For the images that hold no curl. A URL must answer with a 2xx; TorchServe must have a model with a ready worker, which
its /ping does not tell.
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
        self.sock = socket.socket(socket.AF_UNIX)  # closed with the connection, also when nobody listens
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self.host)


def torchserve_ready(path: str) -> bool:
    """Whether each model that answers has a worker that is ready, and there is one."""

    def ask(what: str) -> Any:
        with closing(UnixConnection(path)) as connection:
            connection.request("GET", what, headers={"Host": "localhost"})
            return json.load(connection.getresponse())

    models = ask("/models")["models"]
    workers = [[worker["status"] for worker in ask(f"/models/{one['modelName']}")[0]["workers"]] for one in models]
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
