"""supervisord, and all processes of the session that it leads: started, asked, and ended whole."""

import ctypes
import os
import signal
import subprocess
import sys
import xmlrpc.client
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
from supervisor.xmlrpc import SupervisorTransport

from mlflow_tracking.settings import ROOT

UNANSWERED = (OSError, HTTPException, xmlrpc.client.Error)  # by supervisord, which starts, stops or is busy


class Supervision:
    """The supervisord of one stack.

    Args:
        state: the stack's state folder.
        run_dir: its run folder, where the control socket and the session's number lie.
    """

    def __init__(self, state: Path, run_dir: Path) -> None:
        self.state, self.run_dir = state, run_dir
        self._number = run_dir / "session"

    def start(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start supervisord in a session of its own, with the environment that its programs get."""
        (self.run_dir / "control.sock").unlink(missing_ok=True)  # of a supervisord that was killed
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def end_with_parent() -> None:
            if libc:
                libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: after a kill -9 of `up` nothing would watch it

        command = [sys.executable, "-m", "supervisor.supervisord", "-c", "scripts/supervisord.conf"]
        options: dict[str, Any] = {"start_new_session": True, "preexec_fn": end_with_parent}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, **options)
        self._number.write_text(str(process.pid))
        return process

    @property
    def interface(self) -> Any:
        """supervisord's XML-RPC interface, on its socket; its calls raise one of UNANSWERED."""
        transport = SupervisorTransport(None, None, f"unix://{self.run_dir}/control.sock")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport).supervisor

    def states(self) -> dict[str, dict[str, Any]]:
        """supervisord's view of each program by name; empty while it does not answer."""
        with suppress(*UNANSWERED):
            return {info["name"]: info for info in self.interface.getAllProcessInfo()}
        return {}

    def environment(self) -> dict[str, str]:
        """What the running supervisord was started with; empty if none runs."""
        with suppress(OSError, ValueError, psutil.Error):
            return psutil.Process(int(self._number.read_text())).environ()
        return {}

    def kill(self) -> int:
        """Kill the whole session, also what is left of one whose supervisord is dead; how many there were."""
        return _kill([*self._session()])

    def kill_orphans(self) -> None:
        """Kill the children of a dead part, which led their process group: they hold its port, and its successor could
        not start."""
        members = self._session()
        alive = {process.pid for process in members}
        _kill([process for process, group in members.items() if group not in alive])

    def forget(self) -> None:
        """The session is over."""
        self._number.unlink(missing_ok=True)

    def _session(self) -> dict[psutil.Process, int]:
        """The processes of the session, with their groups.

        Its number may have come to a stranger since, so a process must also name one of the stack's folders.
        """
        found = {}
        with suppress(OSError, ValueError):
            leader = int(self._number.read_text())
            for pid in psutil.pids():
                with suppress(OSError, psutil.Error):
                    if os.getsid(pid) == leader:
                        process, group = psutil.Process(pid), os.getpgid(pid)
                        words = " ".join([*process.cmdline(), *process.environ().values()])
                        if str(self.state) in words or str(self.run_dir) in words:
                            found[process] = group
        return found


def _kill(processes: list[psutil.Process]) -> int:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    return len(processes)
