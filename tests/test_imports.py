"""The arrows between the rooms.

handlers -> nothing of the repository (it is copied whole into every archive), and no server's library; training ->
handlers and the settings; mlflow_tracking -> handlers, mlflow_tracking.metrics and handlers.receipt; streamlit_app -> no
sibling and no torch; scripts -> everything. Imports are package-qualified, so that any file can also be run from its
own folder. Importing anything starts nothing, writes nothing and prints nothing.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("handlers", "training", "mlflow_tracking", "streamlit_app", "scripts")
MAY_IMPORT = {
    "handlers": (),
    "mlflow_tracking": ("handlers",),
    "training": ("handlers", "mlflow_tracking"),
    "streamlit_app": (),
    "scripts": ("handlers", "mlflow_tracking", "training"),
}
MUST_NOT_IMPORT = {
    "handlers": {"mlflow", "streamlit", "ts"},
    "training": {"streamlit", "ts"},
    "mlflow_tracking": {"streamlit", "ts"},
    "streamlit_app": {"torch", "torchvision", "timm", "openvino", "mlflow", "ts"},
    "scripts": set(),
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in the source; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("room", ROOMS)
def test_arrows(room):
    wrong, seen = [], 0
    for path in modules(room):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for line, name in imports(path.read_text(), package):
            seen += 1
            top = name.split(".")[0]
            sibling = top in ROOMS and not within(name, (room, *MAY_IMPORT[room]))
            bare = top in {other.stem for other in path.parent.glob("*.py")} and top not in ROOMS
            if sibling or bare or top in MUST_NOT_IMPORT[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong
    assert seen, f"no import found in {room}: is the folder empty?"


def test_the_checker_sees_what_it_must():
    source = "import torch\ndef f():\n    from training import metrics\nfrom . import plan\nfrom ..registry import x\n"
    assert {name for _, name in imports(source, "mlflow_tracking.promotion")} == {
        "torch",
        "training.metrics",
        "mlflow_tracking.promotion.plan",
        "mlflow_tracking.registry.x",
    }


@pytest.mark.parametrize("room", ["scripts", "training", "streamlit_app"])
def test_no_file_hides_a_library_from_a_neighbour_that_is_run_directly(room):
    """`python training/train.py` puts training/ first on the path, so its `random.py` would win over Python's."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert not {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"} & taken


def test_torchserve_folder_is_no_package():
    assert not (ROOT / "torchserve" / "__init__.py").exists()


def names() -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ROOMS
        if room not in ("scripts", "streamlit_app")  # a page is a script: it is run, not imported
        for path in modules(room)
        if path.stem not in ("__init__", "__main__")
    ]


def test_importing_has_no_side_effects(tmp_path):
    """One fresh interpreter imports every module: nothing printed, nothing written, no thread left running."""
    code = f"""
import importlib, os, sys, threading
os.chdir({str(tmp_path)!r})
import mlflow_tracking.metrics, handlers.receipt
assert "torch" not in sys.modules, "what promotion may import imports torch"
for name in {names()!r}:
    importlib.import_module(name)
threads = [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
assert not threads, threads
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
