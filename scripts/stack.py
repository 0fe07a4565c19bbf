"""The whole stack on one machine, without containers: `make up`, `make down` and `make status` call this.

`up` stays in the foreground and runs supervisord (scripts/stack_parts.py). Each process ends with its parent, so
nothing is left when `up` or supervisord is killed.
"""

import fcntl
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import typer
from dotenv import load_dotenv
from rich.panel import Panel
from rich.table import Table

from handlers.errors import UserError
from mlflow_tracking.command_line import command_group, console, errors, run, table
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.locks import check_free
from mlflow_tracking.stack_settings import MODEL_NAME, ROOT, SHIPPED, Settings
from scripts import child_processes
from scripts.registry_news import RegistryNews, RegistryRefused
from scripts.stack_parts import PARTS, Supervisord

PATIENCE = 240  # seconds for a step; the first start derives the model's graph
NEEDED_GB = 1  # of disk
REGISTER = ("scripts/register_model.py", "--bundle", "model_store/skin_vit", "--alias", "champion", "--if-empty")
HELP = "Run the whole stack on one machine, without containers."
app = command_group(HELP, ["python scripts/stack.py up", "STREAMLIT_PORT=8600 python scripts/stack.py up"])
client = httpx.Client(timeout=3, trust_env=False)  # for calls to the parts, past any proxy


class StackError(UserError):
    """The stack cannot start, or a part of it failed."""


class StackSettings(Settings):
    """What the parts of the stack take from the settings: their addresses, logs and environment."""

    @property
    def ports(self) -> dict[str, int]:
        """The ports by the names of their settings, such as MLFLOW_PORT."""
        return {name.upper(): value for name, value in self.model_dump().items() if name.endswith("_port")}

    def log(self, name: str) -> Path:
        """Return the log of a program."""
        return self.state / "logs" / f"{name}.log"

    def url(self, part: str) -> str:
        """Return the address of a part."""
        return f"http://127.0.0.1:{self.ports[f'{part.upper()}_PORT']}"

    def environment(self) -> dict[str, str]:
        """Return the environment of the parts. It names this stack's addresses, whatever the caller's names."""
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
            "MONITOR_URL": self.url("monitor"),
            "STREAMLIT_SERVER_PORT": str(self.streamlit_port),
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",  # whatever the locale
            "NO_PROXY": direct,
            "no_proxy": direct,
        }


def load_settings() -> StackSettings:
    """Return the settings in force. Raises SettingsError."""
    load_dotenv(ROOT / ".env")  # for the parts, which know more names; a variable of the shell wins
    return StackSettings.load()


def make_folder(folder: Path) -> None:
    """Make a folder unless it exists. Raises StackError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StackError(f"The folder {folder} cannot be made: {error.strerror}.") from None


def check_machine(settings: StackSettings) -> None:
    """Make the folders; raise StackError or StoreBusy unless model store, disk and ports are free."""
    for folder in (settings.log("").parent, settings.run_dir, settings.store):
        make_folder(folder)
    check_free(settings.store)
    if settings.run_dir.is_symlink() or settings.run_dir.stat().st_uid != os.getuid():
        raise StackError(f"{settings.run_dir} belongs to another user. Name another folder in TORCHSERVE_RUN_DIR.")
    settings.run_dir.chmod(0o700)  # whoever reaches its sockets controls TorchServe
    if (free := shutil.disk_usage(settings.state).free / 1e9) < NEEDED_GB:
        raise StackError(f"{settings.state} has {free:.1f} GB free, the stack needs {NEEDED_GB} GB. Free some space.")
    for name, port in settings.ports.items():
        check_port(name, port)


def check_port(name: str, port: int) -> None:
    """Raise StackError unless the port can be used."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection just closed does not count
        try:
            probe.bind(("127.0.0.1", port))
        except PermissionError:
            raise StackError(f"{name} is {port}, which needs root. Choose a port from 1024 to 65535.") from None
        except OSError:
            other = port + 1000 if port < 60000 else port - 1000
            raise StackError(
                f"Port {port} is in use by {listening_program(port)}. Stop it, or choose another port: "
                f"`{name}={other} make up`."
            ) from None


def listening_program(port: int) -> str:
    """Return the name and pid of the program that listens on a port, as far as this user may see it."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "another program"


@contextmanager
def only_one(settings: StackSettings) -> Iterator[bool]:
    """Hold the lock of `up` on this state folder; yields False if another process holds it."""
    make_folder(settings.state)
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


def champion(settings: StackSettings) -> str | None:
    """Return the version with the alias champion, if any. Raises httpx.HTTPError."""
    query = {"name": MODEL_NAME, "alias": "champion"}
    response = client.get(f"{settings.url('mlflow')}/api/2.0/mlflow/registered-models/alias", params=query)
    return response.json()["model_version"]["version"] if response.is_success else None


def prediction_text(settings: StackSettings, registry_up: bool) -> str | None:
    """Return a text once TorchServe answers, or cannot since it has no version. Raises httpx.HTTPError."""
    picture = next((SHIPPED / "golden").iterdir()).read_bytes()
    response = client.post(f"{settings.url('torchserve')}/predictions/{MODEL_NAME}", files={"data": picture})
    if response.is_success:
        return f"answered by version {response.json()['model']['version']}"
    if not registry_up:
        return None if ledgers.read(settings.store).default else "none: no version has served yet"
    return None if champion(settings) else "none: give a version the alias champion in MLflow"


def show_log(log: Path) -> None:
    """Print the end of a log."""
    if log.exists():
        console.print(f"The end of {log}:", *log.read_text(errors="replace").splitlines()[-15:], sep="\n")


class Start:
    """The wait until every part answers, the registry has a model, and a prediction is answered."""

    def __init__(self, settings: StackSettings, supervision: Supervisord, stopping: threading.Event) -> None:
        self.settings, self.supervision, self.stopping = settings, supervision, stopping
        self.began = time.monotonic()
        self.news: RegistryNews | None = RegistryNews(settings.log("mlflow"))  # None once the database is refused

    def run(self) -> None:
        """Wait, and print each step. If MLflow refuses its database, the others start without it. Raises StackError."""
        for part in PARTS:  # all start at once; MLflow comes first here, as the model waits for it alone
            url = self.settings.url(part.name)
            health = url + part.health
            try:
                self._wait(part.title, part.name, lambda: url if client.get(health).is_success else None)  # noqa: B023
            except RegistryRefused as error:
                errors.print(str(error))
                self.supervision.stop_part("mlflow")
                self.news = None
            if part.name == "mlflow" and self.news:
                self._register_model()
        self._wait("Prediction", "promoter", lambda: prediction_text(self.settings, self.news is not None))

    def _register_model(self) -> None:
        """Give the shipped model to an empty registry."""
        environment, log = self.settings.environment(), self.settings.log("register")
        empty = champion(self.settings) is None
        process = child_processes.start([sys.executable, *REGISTER], environment, log, cwd=ROOT) if empty else None

        def check() -> str | None:
            code = process.poll() if process else 0
            if code is None:
                return None
            if code:
                show_log(log)
                raise StackError("The shipped model could not be registered. The end of the log is above.")
            version = champion(self.settings)
            return f"version {version} is champion" if version else "none: the alias champion points nowhere"

        self._wait("Model", "register", check)

    def _wait(self, title: str, log: str, check: Callable[[], str | None]) -> None:
        end = time.monotonic() + PATIENCE
        with console.status(f"Starting {title} …"):
            while not self.stopping.wait(0.3):
                if self.news:
                    self.news.show()
                with suppress(httpx.HTTPError):  # not ready yet
                    if text := check():
                        console.print(f"✓ {title:<11}{text}  {time.monotonic() - self.began:.0f} s")
                        return
                self._check_parts()
                if time.monotonic() > end:
                    show_log(self.settings.log(log))
                    raise StackError(f"{title} is not ready after {PATIENCE} s. The end of its log is above.")

    def _check_parts(self) -> None:
        """Raise StackError if supervisord has stopped, or has given up on a part."""
        if self.supervision.process.poll() is not None:
            show_log(self.settings.log("supervisord"))
            raise StackError("supervisord stopped. The end of its log is above.")
        states = self.supervision.states()
        for part in PARTS:
            if states.get(part.name, {}).get("statename") == "FATAL":
                show_log(self.settings.log(part.name))
                raise StackError(f"{part.title} cannot start: it stopped four times. The end of its log is above.")


def watch(settings: StackSettings, supervision: Supervisord, stopping: threading.Event) -> None:
    """Until `stopping` is set, report restarts, and restart supervisord as it restarts the parts."""
    pids: dict[str, int] = {}
    while not stopping.wait(1):
        if supervision.process.poll() is not None:
            console.print("supervisord was killed. All parts are started again.")
            supervision.start(settings.environment())
            pids = {}
        states = supervision.states()
        for part in PARTS:
            info = states.get(part.name, {"statename": "", "pid": 0})
            if info["statename"] == "FATAL":  # supervisord gave up after some tries
                supervision.start_part(part.name)
            if info["pid"] and pids.setdefault(part.name, info["pid"]) != info["pid"]:
                console.print(f"{part.title} had stopped and was started again. Its log: {settings.log(part.name)}")
                with suppress(ProcessLookupError):  # a part whose leader was killed may hold the port
                    os.killpg(pids[part.name], signal.SIGKILL)
                pids[part.name] = info["pid"]


@app.command()
def up() -> None:
    """Start everything, register the shipped model the first time, and stay until Ctrl-C or `make down`."""
    settings, stopping, began = load_settings(), threading.Event(), time.monotonic()
    with only_one(settings) as first:
        if not first:
            raise StackError("The stack is running already. `make status` shows where, `make down` stops it.")
        check_machine(settings)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: stopping.set())
        supervision = Supervisord(settings.run_dir)
        supervision.start(settings.environment())
        try:
            Start(settings, supervision, stopping).run()
            if not stopping.is_set():
                grid = Table.grid(padding=(0, 3))
                for part in PARTS:
                    grid.add_row(part.title, settings.url(part.name) + part.door)
                grid.add_row("Logs", str(settings.log("*")))
                title = f"The stack is ready ({time.monotonic() - began:.0f} s)"
                console.print(Panel(grid, title=title, subtitle="Ctrl-C stops it", expand=False))
                watch(settings, supervision, stopping)
        finally:
            with console.status("Stopping …"):
                child_processes.end(supervision.process)
        console.print("Stopped. Runs and models stay; `make up` continues with them.")


@app.command()
def down() -> None:
    """Stop everything that `make up` started."""
    settings, was_running, end = load_settings(), False, time.monotonic() + 45
    while True:
        with only_one(settings) as free:
            if free:
                console.print("Stopped." if was_running else "Nothing was running.")
                return
            with suppress(ProcessLookupError, ValueError):
                pid = int((settings.state / "up.lock").read_text())
                os.kill(pid, signal.SIGTERM if time.monotonic() < end else signal.SIGKILL)
        was_running = True
        time.sleep(0.3)


@app.command()
def status() -> None:
    """Show the state, the uptime and the address of each part. The exit code is 1 unless all are running."""
    supervision = Supervisord(load_settings().run_dir)
    if not (states := supervision.states()):
        raise StackError("The stack is not running. `make up` starts it.")
    os.environ |= supervision.environment()  # its ports may not be those of this shell
    settings = load_settings()
    grid = table("", ("Part", "State", "Uptime"), folded=["Address"])
    for part in PARTS:
        info = states[part.name]
        uptime = info["description"].rpartition("uptime ")[2] if info["statename"] == "RUNNING" else ""
        grid.add_row(part.title, info["statename"].lower(), uptime, settings.url(part.name) + part.door)
    console.print(grid)
    with suppress(httpx.HTTPError, ledgers.LedgerError):
        ledger = ledgers.read(settings.store)
        if (serving := ledger.release(ledger.default)) and champion(settings) is None:
            console.print(
                f"The alias champion points nowhere; version {serving.version} still serves. "
                "Deploy a version with `promote.py to VERSION`."
            )
    raise typer.Exit(any(states[part.name]["statename"] != "RUNNING" for part in PARTS))


if __name__ == "__main__":
    run(app)
