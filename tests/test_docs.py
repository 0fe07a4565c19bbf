"""Documents match the code.

Commands, options, make targets, links and paths in documents and presets exist. `.env.example` lists the variables
that the code reads, with their defaults. README and DECISIONS.md keep to their length.
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
GENERATED = ("data/", "runs/", "model_store/skin_vit-", ".stack", ".venv")  # folders that a fresh clone does not have
# Variables that the system, a tool or one of our own scripts sets.
NOT_OURS = {"BASH_SOURCE", "BUNDLE_NOTE", "CI", "HOME", "NAMED_SECRETS", "NO_PROXY", "no_proxy", "PATH", "PYTHONPATH"}
NOT_OURS |= {"LOCAL_RANK", "WORLD_SIZE"}  # torchrun
NOT_OURS |= {"PAGE_SECRETS", "STREAMLIT_SERVER_PORT"}
NOT_OURS |= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MINIO_ENDPOINT", "TRAINING_LAUNCHER"}  # of the Helm chart
NOT_OURS |= {"TMPDIR", "VIRTUAL_ENV", "PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"}
READS_ENVIRONMENT = {"BaseSettings", "ServiceSettings", "Settings"}  # bases of pydantic's settings classes


def by_name(paths: list[Path]) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def commands(text: str) -> list[str]:
    """Return each `python FILE.py …` and `FILE.sh …` of a text, with continued lines joined."""
    text = re.sub(r"\s*\\\n#?\s*", " ", text)
    matches = re.findall(r"(?:python3? (?:-m )?|(?<![\w./-]))([\w-]+(?:/[\w-]+)+\.(?:py|sh)\b[^`\n|;&>]*)", text)
    return [command.split(" #")[0].strip() for command in matches]


def program(command: str) -> str:
    """Return the program of a command, with its subcommand if it has one: "scripts/stack.py up"."""
    return re.match(r"\S+(?: [a-z]+(?=\s|$))?", command)[0]


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


# One process for all programs, because each would import torch again. Like the programs themselves, it runs without the
# repository on its path (-P).
PRINT_HELP = """
import contextlib, io, json, runpy, sys
answers = {}
for program in sys.argv[1:]:
    sys.argv = [*program.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
    answers[program] = code, text.getvalue()
print(json.dumps(answers))
"""


@cache
def helps() -> dict[str, tuple[int | str, str]]:
    """Return exit code and text of `--help` for each Python program of the documents, too wide to cut any option."""
    programs = {program(command) for path in TEXTS for command in commands(path.read_text()) if has_help(command)}
    environment = os.environ | {"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run([sys.executable, "-P", "-c", PRINT_HELP, *sorted(programs)],
                          cwd=ROOT, env=environment, capture_output=True, text=True, check=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def has_help(command: str) -> bool:
    return bool(re.match(r"(scripts|training)/\S+\.py(\s|$)", command)) and (ROOT / command.split()[0]).is_file()


def test_the_command_reader_recognises_commands_and_options():
    text = (
        "```\npython scripts/a.py IMAGE --json \\\n  --url URL # why\n```\n`python training/t.py x=1`, `b/c.sh up --d`"
    )
    assert commands(text) == ["scripts/a.py IMAGE --json --url URL", "training/t.py x=1", "b/c.sh up --d"]
    assert [program(command) for command in commands(text)] == ["scripts/a.py", "training/t.py", "b/c.sh up"]
    assert options("a [--alias champion] --n=3 x--y") == {"--alias", "--n"}


@pytest.mark.timeout(300)  # the first case prints the help of all programs, which import torch
@pytest.mark.parametrize("path", by_name(TEXTS))
def test_commands_and_their_options_exist(path):
    for command in commands(path.read_text()):
        file = command.split()[0]
        assert (ROOT / file).is_file(), f"{path.name}: {command}: there is no {file}"
        if has_help(command):
            code, text = helps()[program(command)]
            assert code == 0, f"{path.name}: {command}: {text}"
            assert options(command) <= options(text), f"{path.name}: {command}: {text}"
        if file == "training/train.py" and "--resume" not in command:  # a resumed run has settings of its own
            preset = re.search(r"--config (\w+)", command)
            settings = [quoted or plain for quoted, plain in re.findall(r'"(\w+=[^"]*)"|\s(\w+=[^\s"]+)', command)]
            load_config(preset[1] if preset else DEFAULT_PRESET, settings)
    for module in re.findall(r"python3? -m ([\w.]+)", path.read_text()):
        if (ROOT / module.split(".")[0]).is_dir():
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{path.name}: there is no module {module}"


@pytest.mark.parametrize("path", by_name(DOCUMENTS))
def test_make_targets_exist(path):
    mentioned = set(re.findall(r"(?:`|^|\$ )(?:\w+=\S+ )*make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert mentioned <= TARGETS


def anchors(text: str) -> set[str]:
    """Return the anchors that a forge gives to the headings of a text."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", by_name(DOCUMENTS))
def test_links_and_paths_exist(path):
    text = path.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        file, _, anchor = target.partition("#")
        assert (path.parent / file).exists(), f"{path.name} links to {file}"
        if anchor and (not file or file.endswith(".md")):
            assert anchor in anchors((path.parent / file).read_text() if file else text), f"{path.name}: #{anchor}"
    for word in re.findall(r"`([\w.-]+(?:/[\w.*-]+)+/?)`", prose):
        if (ROOT / word.split("/")[0]).is_dir() and not word.startswith(GENERATED):
            assert list(ROOT.glob(word.rstrip("/"))), f"{path.name} mentions {word}"


def test_readme_has_at_most_900_words():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_each_decision_has_at_most_60_words():
    decisions = re.findall(r"^- (.+(?:\n  .+)*)", (ROOT / "DECISIONS.md").read_text(), re.MULTILINE)
    assert len(decisions) > 50
    assert not [decision for decision in decisions if len(decision.split()) > 60]


def change_table() -> list[tuple[str, str]]:
    """Return the rows of CONTRIBUTING.md's table "to change X, open Y"."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| to change | open |")[2].partition("\n\n")[0]
    return re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, re.MULTILINE)[1:]


def test_contributing_says_where_to_make_at_least_20_changes():
    assert len(change_table()) >= 20
    for change, files in change_table():
        paths = re.findall(r"`([^`]+)`", files)
        assert paths, change
        assert not [path for path in paths if not (ROOT / path).exists()], change


def sources(*endings: str) -> list[Path]:
    """Return the files of the product, and conftest.py, which has settings for users too."""
    folders = ("handlers", "training", "mlflow_tracking", "torchserve", "streamlit_app", "scripts", "containers")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return [path for path in [*files, *ROOT.glob("*"), ROOT / "tests/conftest.py"] if path.name.endswith(endings)]


def settings_fields() -> dict[str, str]:
    """Return NAME: default as written, for each field of a pydantic settings class."""
    fields = {}
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & READS_ENVIRONMENT:
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        fields[field.target.id.upper()] = ast.unparse(field.value) if field.value else ""
    return fields


def variables_of(call: ast.Call) -> set[str]:
    """Return the variables that `environ.get("X")`, `getenv("X")`, `setting("X")`, `f(env, "X")`, `envvar="X"` read."""
    words = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    words += [keyword.value.value for keyword in call.keywords if keyword.arg == "envvar"]
    of_environment = re.search(r"(\benv(iron)?\.get|getenv|\bsetting)$", ast.unparse(call.func))
    if of_environment or "envvar" in {keyword.arg for keyword in call.keywords} or "env" in map(ast.unparse, call.args):
        return {word for word in words if isinstance(word, str) and re.fullmatch("[A-Z][A-Z0-9_]+", word)}
    return set()


def variables_read() -> set[str]:
    """Return the environment variables that the code reads."""
    variables = set(settings_fields())
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                variables |= variables_of(node)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
                variables |= set(re.findall(r"^(?:os\.)?env(?:iron)?\['([A-Z0-9_]+)'\]$", ast.unparse(node)))
    for path in sources(".sh", ".yml"):
        variables |= set(re.findall(r"\$\{([A-Z][A-Z0-9_]+):?[-?+=]", path.read_text()))
    return variables - NOT_OURS


def variables_documented() -> dict[str, str]:
    lines = r"^#? ?([A-Z][A-Z0-9_]+)=(.*?)(?:[ \t]+#.*)?$"
    return dict(re.findall(lines, (ROOT / ".env.example").read_text(), re.MULTILINE))


def test_env_example_lists_exactly_the_variables_that_the_code_reads():
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
