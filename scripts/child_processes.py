"""Servers that a command or a test starts on this machine, and their end.

Each runs in a process group of its own, and Linux ends it when its parent dies. `python -m scripts.child_processes
COMMAND` runs one part of the stack (scripts/stack_parts.py) in the group that supervisord gave it.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1


def free_ports(number: int) -> list[int]:
    """Return different ports that are free now: all are held open until the last is chosen."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def end_with_parent(number: signal.Signals) -> Callable[[], None]:
    """Return a function for a new process: from its call on, the kernel sends `number` when the parent dies."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before the fork
    return lambda: libc.prctl(PR_SET_PDEATHSIG, number) if libc else None


def start(
    command: Sequence[str | Path], env: Mapping[str, str], log: Path | None = None, cwd: Path | str | None = None
) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own. It is killed when this process dies.

    Args:
        log: a file that gets the output, appended; without it the output goes where this process's goes.
    """
    stream = log.open("ab") if log else None
    try:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGKILL),
        )
    finally:
        if stream:
            stream.close()


def end(process: "subprocess.Popen[bytes]", seconds: float = 20) -> None:
    """Ask the process to end, kill what is left of its group after `seconds`, and wait until the group is gone."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    with suppress(ProcessLookupError):
        while True:
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.02)


def run_part(command: Sequence[str]) -> int:
    """Run a command as the leader of a process group, and leave no process of the group behind.

    The group is killed when the parent (supervisord) dies, and when the command has ended. The kernel kills the command
    when this process dies. A signal to stop reaches the command without help, since supervisord sends it to the group.
    """
    group = os.getpid()
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(group, signal.SIGKILL))
    end_with_parent(signal.SIGUSR1)()
    signal.signal(signal.SIGTERM, lambda *_: None)
    code = subprocess.Popen(command, preexec_fn=end_with_parent(signal.SIGKILL)).wait()
    os.setpgid(0, os.getpgid(os.getppid()))  # out of the group, so that the exit code reaches supervisord
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(run_part(sys.argv[1:]))
