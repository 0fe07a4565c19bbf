"""Imports run one way: handlers < mlflow_tracking < training < scripts; streamlit_app imports none of them.

monitoring imports handlers and mlflow_tracking, and only scripts imports it.

Rooms avoid the libraries of other rooms. Imports are package-qualified, so that any file also runs from its own folder.
Importing a module starts, writes and prints nothing.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Room: the rooms it may import.
MAY_IMPORT = {
    "handlers": (),
    "mlflow_tracking": ("handlers",),
    "monitoring": ("handlers", "mlflow_tracking"),
    "training": ("handlers", "mlflow_tracking"),
    "streamlit_app": (),
    "scripts": ("handlers", "mlflow_tracking", "monitoring", "training"),
}
ROOMS = tuple(MAY_IMPORT)
MUST_NOT_IMPORT = {
    "handlers": {"mlflow", "streamlit", "ts"},
    "training": {"streamlit", "ts"},
    "mlflow_tracking": {"streamlit", "ts"},
    "monitoring": {"mlflow", "streamlit", "torch", "ts"},
    "streamlit_app": {"torch", "torchvision", "timm", "openvino", "mlflow", "ts"},
    "scripts": set(),
}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import, also inside functions; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    wrong, count = [], 0
    for path in modules(room):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for line, name in imports(path.read_text(), package):
            count += 1
            top = name.split(".")[0]
            backwards = top in ROOMS and top not in (room, *MAY_IMPORT[room])
            unqualified = top in {other.stem for other in path.parent.glob("*.py")} and top not in ROOMS
            if backwards or unqualified or top in MUST_NOT_IMPORT[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []
    assert count, f"{room} has no imports: is the folder empty?"


def test_the_import_reader_recognises_every_form():
    source = "import torch\ndef f():\n    from training import losses\nfrom . import plan\nfrom ..registry import x\n"
    assert {name for _, name in imports(source, "mlflow_tracking.promotion")} == {
        "torch",
        "training.losses",
        "mlflow_tracking.promotion.plan",
        "mlflow_tracking.registry.x",
    }


@pytest.mark.parametrize("room", ["scripts", "training", "streamlit_app"])
def test_no_file_hides_a_library(room):
    """`python training/train.py` puts training/ first on the path, where a `random.py` would replace Python's."""
    libraries = set(sys.stdlib_module_names) | set(packages_distributions())
    assert not {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"} & libraries


def test_torchserve_folder_is_no_package():
    assert not (ROOT / "torchserve" / "__init__.py").exists()


def importable_modules() -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ROOMS
        if room not in ("scripts", "streamlit_app")  # these are run, not imported
        for path in modules(room)
        if path.stem not in ("__init__", "__main__")
    ]


def test_importing_has_no_side_effects(tmp_path):
    """A fresh interpreter imports every module: no output, file or thread. The promoter starts without torch."""
    code = f"""
import importlib, os, sys, threading
os.chdir({str(tmp_path)!r})
import mlflow_tracking.classification_metrics, handlers.receipt
assert "torch" not in sys.modules, "metrics or receipt imports torch"
for name in {importable_modules()!r}:
    importlib.import_module(name)
threads = [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
assert not threads, threads
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
