"""What the documents say, the code does.

Every command in a document or at the head of a configuration exists and takes the options shown; every `make` target
exists; every relative link and every path of the repository leads somewhere; .env.example names exactly the variables
that the code reads, with their defaults.
"""

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from training.config import DEFAULT_PRESET, load_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXTS = [*DOCUMENTS, *sorted((ROOT / "training" / "configs").glob("*.yaml"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# Where programs write: not in a fresh clone.
MADE = ("data/", "runs/", "model_store/skin_vit-", ".stack", ".venv")
# Read here, but set by the system, by a tool for its children, or by the tests for themselves.
NOT_OURS = {"CI", "HOME", "NO_PROXY", "no_proxy", "PATH", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV"}
NOT_OURS |= {"BASH_SOURCE", "NAMED_SECRETS"}
NOT_OURS |= {"PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"}
NOT_OURS |= {"BUNDLE_NOTE"}  # by train.sh for the training


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def commands(text: str) -> list[str]:
    """Each `python FILE.py …` and `FILE.sh …` of a text, with continued lines joined."""
    text = re.sub(r"\s*\\\n#?\s*", " ", text)
    found = re.findall(r"(?:python3? (?:-m )?|(?<![\w./-]))([\w-]+(?:/[\w-]+)+\.(?:py|sh)\b[^`\n|;&>]*)", text)
    return [command.split(" #")[0].strip() for command in found]


# In one process for all, as each by itself would import torch again; without the repository on its path (-P), which the
# programs do not have either.
ASK_FOR_HELP = """
import contextlib, io, json, runpy, sys
answers = {}
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            runpy.run_path(program, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
    answers[program] = code, text.getvalue()
print(json.dumps(answers))
"""


def programs(text: str) -> set[str]:
    """The programs of a text's commands that are asked for their help."""
    return {command.split()[0] for command in commands(text) if command.startswith(("scripts/", "training/"))}


@cache
def helps() -> dict[str, tuple[int | str, str]]:
    """Exit code and text of `python PROGRAM --help` for each that there is, so wide that no option is cut; for a shell
    script 0 and its source."""
    there = [
        program
        for program in sorted(set().union(*(programs(path.read_text()) for path in TEXTS)))
        if (ROOT / program).is_file()
    ]
    python = [program for program in there if program.endswith(".py")]
    environment = os.environ | {"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run([sys.executable, "-P", "-c", ASK_FOR_HELP, *python],
                          cwd=ROOT, env=environment, capture_output=True, text=True, check=True)  # fmt: skip
    answers = json.loads(done.stdout.splitlines()[-1])
    return {program: (0, (ROOT / program).read_text()) for program in there} | answers


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def test_there_is_a_readme():
    assert ROOT / "README.md" in DOCUMENTS


def test_the_reader_of_commands_sees_what_it_must():
    text = "```\npython scripts/a.py IMAGE --json \\\n  --url URL # why\n```\n`python training/t.py x=1`, `b/c.sh --d`"
    assert commands(text) == ["scripts/a.py IMAGE --json --url URL", "training/t.py x=1", "b/c.sh --d"]
    assert options("a [--alias champion] --n=3 x--y") == {"--alias", "--n"}


@pytest.mark.timeout(300)  # the first asks all programs for their help, and training's imports take a while
@pytest.mark.parametrize("path", named(TEXTS))
def test_commands_and_their_options_exist(path):
    for command in commands(path.read_text()):
        program = command.split()[0]
        assert (ROOT / program).is_file(), f"{path.name}: {command}: there is no {program}"
        if program.startswith(("scripts/", "training/")):
            code, text = helps()[program]
            assert code == 0, text
            assert options(command) <= options(text), f"{path.name}: {command}: {text}"
        if program == "training/train.py" and "--resume" not in command:  # a resumed run has settings of its own
            preset = re.search(r"--config (\w+)", command)
            given = [quoted or plain for quoted, plain in re.findall(r'"(\w+=[^"]*)"|\s(\w+=[^\s"]+)', command)]
            load_config(preset[1] if preset else DEFAULT_PRESET, given)
    for module in re.findall(r"python3? -m ([\w.]+)", path.read_text()):
        if (ROOT / module.split(".")[0]).is_dir():
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{path.name}: there is no module {module}"


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_make_targets_exist(path):
    mentioned = set(re.findall(r"(?:`|^|\$ )(?:\w+=\S+ )*make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert mentioned <= TARGETS


def slug(heading: str) -> str:
    """The anchor that a forge gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_links_and_paths_lead_somewhere(path):
    text = path.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        file, _, anchor = target.partition("#")
        assert (path.parent / file).exists(), f"{path.name} links to {file}"
        if anchor and (not file or file.endswith(".md")):
            headings = re.findall(r"^#+ (.+)$", (path.parent / file).read_text() if file else text, re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{path.name} links to #{anchor}"
    for word in re.findall(r"`([\w.-]+(?:/[\w.*-]+)+/?)`", prose):
        if (ROOT / word.split("/")[0]).is_dir() and not word.startswith(MADE):
            assert list(ROOT.glob(word.rstrip("/"))), f"{path.name} speaks of {word}"


def sources(*endings: str) -> list[Path]:
    """All files of the product, and conftest.py, whose settings are for people too."""
    folders = ("handlers", "training", "mlflow_tracking", "torchserve", "streamlit_app", "scripts", "containers")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return [path for path in [*files, *ROOT.glob("*"), ROOT / "tests/conftest.py"] if path.name.endswith(endings)]


def settings_fields() -> dict[str, str]:
    """NAME: its default as written, for each field of a pydantic settings class."""
    fields = {}
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any("Settings" in ast.unparse(base) for base in node.bases):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        fields[field.target.id.upper()] = ast.unparse(field.value) if field.value else ""
    return fields


def names_in(call: ast.Call) -> set[str]:
    """What `environ.get("NAME")`, `getenv("NAME")`, `setting("NAME")`, `f(env, "NAME")` and `envvar="NAME"` ask for."""
    words = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    words += [keyword.value.value for keyword in call.keywords if keyword.arg == "envvar"]
    of_environment = re.search(r"(\benv(iron)?\.get|getenv|\bsetting)$", ast.unparse(call.func))
    if of_environment or "envvar" in {keyword.arg for keyword in call.keywords} or "env" in map(ast.unparse, call.args):
        return {word for word in words if isinstance(word, str) and re.fullmatch("[A-Za-z][A-Za-z0-9_]+", word)}
    return set()


def variables_read() -> set[str]:
    """The environment variables that the code reads."""
    found = set(settings_fields())
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found |= {name for name in names_in(node) if name.isupper()}
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                found |= set(re.findall(r"^(?:os\.)?env(?:iron)?\['([A-Z0-9_]+)'\]$", ast.unparse(node)))
    for path in sources(".sh", ".yml"):
        found |= set(re.findall(r"\$\{([A-Z][A-Z0-9_]+):?[-?+=]", path.read_text()))
    return found - NOT_OURS


def variables_documented() -> dict[str, str]:
    return dict(
        re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=(.*?)(?:[ \t]+#.*)?$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    )


def test_env_example_names_what_the_code_reads_and_nothing_else():
    assert set(variables_documented()) == variables_read()


def test_env_example_shows_the_defaults_of_the_code():
    documented, checked = variables_documented(), 0
    for name, default in settings_fields().items():
        constant = re.match(r"(?:Field\()?('[^']+'|[\d.]+)", default)  # Field(8083, …), 'http://…'
        if constant:
            value = ast.literal_eval(constant[1])
            assert type(value)(documented[name]) == value, name
            checked += 1
    assert checked >= 5
