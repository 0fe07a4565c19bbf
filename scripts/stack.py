"""The whole stack on one machine, without containers: `make up`, `make down` and `make status` call this.

`up` stays in the foreground and runs supervisord, which starts the four parts and restarts a dead one. supervisord
leads a session of its own, whose number finds every process of the stack, even one whose parent was killed.
"""

import fcntl
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import typer
from dotenv import load_dotenv
from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from handlers.errors import UserError
from mlflow_tracking.command_line import table
from mlflow_tracking.promotion.locks import check_free
from mlflow_tracking.settings import MODEL_NAME, ROOT
from mlflow_tracking.settings import Settings as ServiceSettings
from scripts.supervision import UNANSWERED, Supervision

PATIENCE = 240  # seconds without any progress; the first start derives the model's graph, perhaps on two busy cores
console = Console(highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", help=__doc__)


class Part(NamedTuple):
    """A program of supervisord.conf, as a person meets it."""

    name: str  # its port is the setting NAME_PORT, its log logs/NAME.log
    title: str
    health: str  # a path that answers 200 when the part can work
    door: str = ""  # the path a person opens


PARTS = (
    Part("streamlit", "Page", "/_stcore/health"),
    Part("mlflow", "MLflow", "/health"),
    Part("torchserve", "TorchServe", "/ping", f"/predictions/{MODEL_NAME}"),
    Part("promoter", "Promoter", "/healthz", "/status"),
)


class StackError(UserError):
    """A sentence: what is wrong and what to do. `log` is the file that says more."""

    def __init__(self, sentence: str, log: Path | None = None) -> None:
        super().__init__(sentence)
        self.log = log


class Settings(ServiceSettings):
    """Ports and folders, from the environment and `.env`; .env.example says what each is for."""

    torchserve_metrics_port: int = Field(8082, ge=1, le=65535)
    streamlit_port: int = Field(8501, ge=1, le=65535)
    mlflow_public_url: str = ""

    @property
    def ports(self) -> dict[str, int]:
        """The ports by the names of their settings, such as MLFLOW_PORT."""
        return {name.upper(): value for name, value in self.model_dump().items() if name.endswith("_port")}

    def log(self, name: str) -> Path:
        """The log of a part, or of another program of supervisord.conf."""
        return self.state / "logs" / f"{name}.log"

    def url(self, part: str) -> str:
        """Where a part answers on this machine."""
        return f"http://127.0.0.1:{self.ports[f'{part.upper()}_PORT']}"

    @property
    def supervision(self) -> Supervision:
        """The supervisord of this state folder, running or not."""
        return Supervision(self.state, self.run_dir)

    def environment(self) -> dict[str, str]:
        """What the parts are started with: their addresses are this stack's, whatever the caller's environment says."""
        direct = ",".join(filter(None, [os.environ.get("NO_PROXY", os.environ.get("no_proxy")), "127.0.0.1,localhost"]))
        return {
            **os.environ,
            **{name: str(port) for name, port in self.ports.items()},
            "STACK_STATE": str(self.state),
            "MODEL_STORE": str(self.store),
            "TORCHSERVE_RUN_DIR": str(self.run_dir),
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_PUBLIC_URL": self.mlflow_public_url or self.url("mlflow"),
            "TORCHSERVE_URL": self.url("torchserve"),
            "PROMOTER_URL": self.url("promoter"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": direct,
            "no_proxy": direct,
        }


def load_settings() -> Settings:
    """The settings in force. Raises SettingsError."""
    load_dotenv(ROOT / ".env")  # for the parts too, which know more names; what is set already wins
    return Settings.load()


def make(folder: Path) -> None:
    """Make a folder, if need be. Raises StackError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StackError(f"The folder {folder} cannot be made: {error.strerror}.") from None


def check_machine(settings: Settings) -> None:
    """Make the folders, and see that model store, ports and disk are free; StackError otherwise."""
    for folder in (settings.log("").parent, settings.run_dir, settings.store):
        make(folder)
    check_free(settings.store)
    if settings.run_dir.is_symlink() or settings.run_dir.stat().st_uid != os.getuid():
        raise StackError(f"{settings.run_dir} belongs to somebody else; name another folder in TORCHSERVE_RUN_DIR.")
    settings.run_dir.chmod(0o700)  # who reaches the sockets in it governs TorchServe
    if (free := shutil.disk_usage(settings.state).free) < 1e9:
        raise StackError(f"Only {free / 1e9:.1f} GB are free in {settings.state}; the stack wants 1 GB: make room.")
    taken: dict[int, str] = {}
    for name, port in settings.ports.items():
        if taken.setdefault(port, name) != name:
            raise StackError(f"{taken[port]} and {name} are both {port}; give each a port of its own.")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection just closed is no hindrance
            try:
                probe.bind(("127.0.0.1", port))
            except PermissionError:
                raise StackError(f"{name}={port} cannot be used; choose a port from 1024 to 65535.") from None
            except OSError:
                other = f"stop it, or choose another: {name}={port + 1000 if port < 60000 else port - 1000} make up"
                raise StackError(f"Port {port} is in use by {who_listens(port)}; {other}") from None


def who_listens(port: int) -> str:
    """The program that listens on a port, as far as this user may know it."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another program"


@contextmanager
def only_one(settings: Settings) -> Iterator[bool]:
    """Whether nobody else runs `up` on this state folder; the lock goes with the process, however that ends."""
    make(settings.state)
    with (settings.state / "up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield True


@cache
def client() -> httpx.Client:
    """For calls to the parts; none takes longer than three seconds."""
    return httpx.Client(timeout=3, trust_env=False)  # no proxy stands between a machine and itself


def champion(settings: Settings) -> str | None:
    """The version that has the alias champion; None without. Raises httpx.HTTPError."""
    query = {"name": MODEL_NAME, "alias": "champion"}
    answer = client().get(f"{settings.url('mlflow')}/api/2.0/mlflow/registered-models/alias", params=query)
    return answer.json()["model_version"]["version"] if answer.is_success else None


def registered(settings: Settings) -> str | None:
    """Has register_model.py give an empty registry the shipped model; the text to show once that is settled.

    Raises StackError when it failed, httpx.HTTPError or one of UNANSWERED while somebody is not there yet.
    """
    info = settings.supervision.states().get("register", {})
    if info.get("statename") == "EXITED":
        if info["exitstatus"]:
            raise StackError("The shipped model could not be registered.", settings.log("register"))
        return f"version {version} is champion" if (version := champion(settings)) else "no version is champion"
    if info.get("statename") == "STOPPED":
        # A champion is enough for --if-empty too, which takes seconds to find one, importing mlflow.
        if version := champion(settings):
            return f"version {version} is champion"
        settings.supervision.interface.startProcess("stack:register", False)
    return None


@cache
def drawn_lesion() -> bytes:
    """A JPEG to ask about."""
    from training.data.synthetic import draw_lesion  # OpenCV takes its time, and only the last step needs it

    draw_lesion(1, "NV").save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def predicted(settings: Settings) -> str | None:
    """The text to show once a prediction is answered, or none can be expected. Raises httpx.HTTPError."""
    url, headers = f"{settings.url('torchserve')}/predictions/{MODEL_NAME}", {"Content-Type": "image/jpeg"}
    answer = client().post(url, content=drawn_lesion(), headers=headers)
    if not answer.is_success:  # not promoted yet, or never
        return None if champion(settings) else "[yellow]none: give a version the alias champion in MLflow[/]"
    return f"answered by version {answer.json()['model']['version']}"


def bring_up(settings: Settings, process: subprocess.Popen[bytes], stopping: threading.Event) -> None:
    """Wait for every step and tell of each; StackError when one fails or nothing moves for PATIENCE seconds."""

    def answers(part: Part) -> Callable[[], str | None]:
        url = settings.url(part.name)
        return lambda: url if client().get(url + part.health).is_success else None

    # title: (the steps before it, what gives a text when it is done, its log)
    steps: dict[str, tuple[set[str], Callable[[], str | None], Path]] = {
        part.title: (set(), answers(part), settings.log(part.name)) for part in PARTS
    }
    steps["Model"] = ({"MLflow"}, lambda: registered(settings), settings.log("register"))
    steps["Prediction"] = ({"Model", "TorchServe"}, lambda: predicted(settings), settings.log("promoter"))
    began = moved = time.monotonic()
    with console.status("") as status:
        while steps and not stopping.is_set():
            status.update(f"Starting {', '.join(steps)} … {time.monotonic() - began:.0f} s")
            for title, (before, done, log) in list(steps.items()):
                with suppress(httpx.HTTPError, *UNANSWERED):  # not there yet
                    if not before & steps.keys() and (text := done()):
                        console.print(f"[green]✓[/] {title:<11}{text}  [dim]{time.monotonic() - began:.0f} s[/]")
                        moved = time.monotonic()
                        del steps[title]
                if time.monotonic() - moved > PATIENCE:
                    raise StackError(f"{title} is not ready after {PATIENCE} s of waiting.", log)
            if process.poll() is not None:
                raise StackError("The supervisor stopped.", settings.log("supervisord"))
            found = settings.supervision.states()
            for part in PARTS:
                if found.get(part.name, {}).get("statename") == "FATAL":
                    raise StackError(f"{part.title} cannot start: it stopped four times.", settings.log(part.name))
            stopping.wait(0.3)


def watch(settings: Settings, process: subprocess.Popen[bytes], stopping: threading.Event) -> subprocess.Popen[bytes]:
    """Until told to stop: tell of restarts, and restart supervisord as it restarts the parts. Returns the last one."""
    pids: dict[str, int] = {}
    while not stopping.wait(1):
        if process.poll() is not None:
            console.print("The supervisor was killed; all parts are started again.")
            settings.supervision.kill()
            process, pids = settings.supervision.start(settings.environment()), {}
        settings.supervision.kill_orphans()
        found = settings.supervision.states()
        for part in PARTS:
            info = found.get(part.name, {"statename": "", "pid": 0})
            if info["statename"] == "FATAL":  # supervisord gave up after some tries; what was up once is tried again
                with suppress(*UNANSWERED):
                    settings.supervision.interface.startProcess(f"stack:{part.name}", False)
            if info["pid"] and pids.setdefault(part.name, info["pid"]) != info["pid"]:
                console.print(f"{part.title} had stopped and was started again; its log: {settings.log(part.name)}")
                pids[part.name] = info["pid"]
    return process


@app.command()
def up() -> None:
    """Start everything, register the shipped model the first time, and stay until Ctrl-C or [bold]make down[/]."""
    settings, stopping, began = load_settings(), threading.Event(), time.monotonic()
    with only_one(settings) as first:
        if not first:
            raise StackError("The stack is running already: `make status` shows where, `make down` stops it.")
        settings.supervision.kill()  # left by an `up` that was killed
        check_machine(settings)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: stopping.set())
        process = settings.supervision.start(settings.environment())
        try:
            bring_up(settings, process, stopping)
            if not stopping.is_set():
                grid = Table.grid(padding=(0, 3))
                for part in PARTS:
                    grid.add_row(f"[bold]{part.title}[/]", settings.url(part.name) + part.door)
                grid.add_row("Logs", escape(str(settings.log("*"))))
                title = f"The stack is ready ({time.monotonic() - began:.0f} s)"
                console.print(Panel(grid, title=title, subtitle="Ctrl-C stops it", expand=False))
                process = watch(settings, process, stopping)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired), console.status("Stopping …"):
                process.wait(20)
            settings.supervision.kill()
            settings.supervision.forget()
        console.print("Stopped. Runs and models stay; `make up` goes on with them.")


@app.command()
def down() -> None:
    """Stop everything, also what an accident left running."""
    settings, stopped, end = load_settings(), False, time.monotonic() + 45
    while True:
        with only_one(settings) as nobody:
            if nobody:
                stopped = bool(settings.supervision.kill()) or stopped
                console.print("Stopped." if stopped else "Nothing was running.")
                return
            with suppress(ProcessLookupError, ValueError):
                pid = int((settings.state / "up.lock").read_text())
                os.kill(pid, signal.SIGTERM if time.monotonic() < end else signal.SIGKILL)
        stopped = True
        time.sleep(0.3)


def duration(seconds: int) -> str:
    """A time in its largest unit, such as 3 h."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


@app.command()
def status() -> None:
    """Show each part: its state, how long it has run, where. The exit code is 1 unless all are running."""
    settings = load_settings()
    if not (found := settings.supervision.states()):
        raise StackError("The stack is not running; `make up` starts it.")
    os.environ |= settings.supervision.environment()  # its ports may not be those of this shell
    settings = load_settings()
    grid = table("", ("Part", "State", "Pid"), folded=["Address"])
    for part in PARTS:
        info = found[part.name]
        colour, word = "green" if info["statename"] == "RUNNING" else "red", info["statename"].lower()
        since = f" {duration(info['now'] - info['start'])}" if info["pid"] else ""
        row = part.title, f"[{colour}]{word}[/]{since}", str(info["pid"] or ""), settings.url(part.name) + part.door
        grid.add_row(*row)
    console.print(grid)
    raise typer.Exit(any(found[part.name]["statename"] != "RUNNING" for part in PARTS))


if __name__ == "__main__":
    try:
        app()
    except StackError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        if error.log and error.log.exists():
            end = "\n".join(error.log.read_text(errors="replace").splitlines()[-15:])
            console.print(f"The end of {escape(str(error.log))}:", Panel(escape(end), border_style="dim"))
        sys.exit(1)
    except UserError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        sys.exit(error.exit_code)
