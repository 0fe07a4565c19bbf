"""The house rules of CONTRIBUTING.md that a program can check.

Imports have no circles. No two modules or public classes share a name. Modules and classes stay short. Variables are
nouns. Every error message is a whole sentence, written in one place. Texts use plain words.
"""

import ast
import io
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.test_imports import imports

ROOT = Path(__file__).parent.parent
ROOMS = (
    "handlers",
    "mlflow_tracking",
    "monitoring",
    "training",
    "scripts",
    "streamlit_app",
    "torchserve",
    "containers",
)
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", ".env.example", "Makefile", "Dockerfile", "*.yml")
    for path in ROOT.glob(pattern)
) + sorted(path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in (".yaml", ".sh", ".md"))

LONGEST_MODULE = 350
LONGEST_CLASS = 150
# Name: why it is longer.
LONG_MODULES: dict[str, str] = {}
LONG_CLASSES: dict[str, str] = {}

VAGUE_NAMES = {"found", "told", "known", "given", "one", "wanted", "asked", "anew"}
UNCLEAR_WORDS = re.compile(
    r"\b((is|are|was|were|be|been) told|anew|beside|borne|found out|the other ones|nobody|wanted|asked about)\b", re.I
)


# A capital letter, a value, or a name in lower case: an option, a setting ("tta is 'x'"), a program.
BEGINNING = r"[A-Z{]|--[a-z]|[a-z]+=|[a-z]+(_[a-z]+)+ |[a-z]+ is {|(supervisord|timm|torch-model-archiver|uv)\b"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def assert_none(faults: Iterable[str]) -> None:
    lines = list(faults)
    assert not lines, "\n" + "\n".join(lines)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules that import each other, directly or through others."""

    def reachable(start: str) -> set[str]:
        seen, stack = set(), [start]
        while stack:
            for name in graph.get(stack.pop(), set()) - seen:
                seen.add(name)
                stack.append(name)
        return seen

    reach = {name: reachable(name) for name in graph}
    groups = {frozenset(other for other in reach[name] if name in reach.get(other, set())) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def test_imports_have_no_circles_even_inside_functions():
    names = {dotted(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        package = ".".join(path.relative_to(ROOT).parent.parts)
        targets = {name for _, name in imports(path.read_text(encoding="utf-8"), package)}
        graph[dotted(path)] = {name for target in targets for name in (target, target.rpartition(".")[0])} & names
    assert sum(map(len, graph.values())) > 100
    assert circles(graph) == []


def test_the_circle_finder_finds_circles():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "d"}}) == [["a", "b", "c"], ["d"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_module_names_are_unique():
    places = defaultdict(list)
    for path in MODULES:
        if path.stem != "__init__":
            places[path.stem].append(place(path))
    assert_none(f"{name}: {', '.join(paths)}" for name, paths in places.items() if len(paths) > 1)


def test_public_class_names_are_unique():
    places = defaultdict(list)
    for path in MODULES:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(place(path, node.lineno))
    assert len(places) > 50
    assert_none(f"{name}: {', '.join(paths)}" for name, paths in places.items() if len(paths) > 1)


def test_modules_and_classes_are_short():
    modules = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    classes = {
        node.name: node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    }
    long = [item for item in modules.items() if item[1] > LONGEST_MODULE and item[0] not in LONG_MODULES]
    long += [item for item in classes.items() if item[1] > LONGEST_CLASS and item[0] not in LONG_CLASSES]
    assert_none(f"{name}: {lines} lines" for name, lines in long)
    assert all(modules[name] > LONGEST_MODULE for name in LONG_MODULES), "a reason that is no longer needed"
    assert all(classes[name] > LONGEST_CLASS for name in LONG_CLASSES), "a reason that is no longer needed"


def test_variables_are_nouns():
    names = Counter(
        f"{place(path)}: {name}"
        for path in MODULES
        for node in ast.walk(tree(path))
        for name in [node.arg if isinstance(node, ast.arg) else getattr(node, "id", "")]
        if name in VAGUE_NAMES and (isinstance(node, ast.arg) or isinstance(node.ctx, ast.Store))
    )
    assert_none(names)


def name_of(node: ast.expr) -> str:
    """Return the last part of a dotted name, "" for other expressions."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@cache
def error_classes() -> dict[str, int]:
    """Return each exception class of the product, with the position of the message among its arguments."""
    definitions = {
        node.name: node for path in MODULES for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)
    }

    def is_error(name: str) -> bool:
        if name in definitions:
            return any(is_error(name_of(base)) for base in definitions[name].bases)
        return name.endswith(("Error", "Exception"))

    def position(name: str) -> int:
        definition = definitions.get(name)
        if definition is None:
            return 0
        for item in definition.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                arguments = [argument.arg for argument in item.args.args]
                return arguments.index("message") - 1 if "message" in arguments else -1
        return next((position(name_of(base)) for base in definition.bases), 0)

    return {name: position(name) for name in definitions if is_error(name)} | {"BadParameter": 0}


def literals(function: ast.AST, name: str) -> list[ast.expr]:
    """Return what is assigned to a name within a function."""
    return [
        node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and any(name_of(target) == name for target in node.targets)
    ]


def messages(module: ast.Module) -> Iterator[tuple[int, ast.expr]]:
    """Yield line and expression of each message that a module gives to an error."""
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    # Functions inside functions come later, so each call is assigned to its innermost function.
    owner = {id(node): function for function in functions for node in ast.walk(function)}
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and name_of(node.func) in error_classes():
            position = error_classes()[name_of(node.func)]
            if 0 <= position < len(node.args):
                message = node.args[position]
                values = literals(owner.get(id(node), module), message.id) if isinstance(message, ast.Name) else []
                for value in values or [message]:
                    yield node.lineno, value


def is_word(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(re.search(r"[^\W\d_]", node.value))


def call_arguments(call: ast.Call) -> list[ast.expr]:
    """Return the arguments that choose a value, such as keys and encodings; those of `join` hold the text itself."""
    return [] if name_of(call.func) == "join" else [*call.args, *(keyword.value for keyword in call.keywords)]


def has_words(placeholder: ast.FormattedValue) -> bool:
    """Return whether a placeholder chooses, joins or holds words of the sentence, not a value."""
    keys = {
        id(child)
        for node in ast.walk(placeholder.value)
        for child in [*([node.slice] if isinstance(node, ast.Subscript) else []),
                      *(call_arguments(node) if isinstance(node, ast.Call) else [])]
    }  # fmt: skip
    return any(
        (is_word(node) and id(node) not in keys) or isinstance(node, ast.JoinedStr)
        for node in ast.walk(placeholder.value)
    )


def fault(message: ast.expr) -> str:
    """Return what is wrong with a message, "" if it is a whole sentence in one literal."""
    if isinstance(message, ast.Call) and name_of(message.func) == "str":
        return ""  # another error's message
    if isinstance(message, ast.BoolOp) and all(isinstance(value, ast.Name) for value in message.values[:-1]):
        return fault(message.values[-1])  # a server's message, or a sentence in its place
    if isinstance(message, ast.Constant) and isinstance(message.value, str):
        text = message.value
    elif isinstance(message, ast.JoinedStr):
        if any(isinstance(part, ast.FormattedValue) and has_words(part) for part in message.values):
            return "a placeholder holds words"
        text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in message.values)
    else:
        return "composed elsewhere"
    if not re.match(BEGINNING, text):
        return "does not begin with a capital letter or a value"
    # A sentence may be followed by another error's sentence, or by a log on its own lines.
    return "" if text.endswith((".", ". {}", ":\n{}")) else "does not end with a period"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("'The port is taken.'", ""),
        ("f'{path} is empty: remove it.'", ""),
        ('f\'Use {", ".join(names)} or {values["x"]:.2f}.\'', ""),
        ("str(error)", ""),
        ("message or 'All workers are busy.'", ""),
        ("f'The step failed. {error}'", ""),
        ("f'tta is {value}: it must be true or false.'", ""),
        ("'the port is taken.'", "does not begin with a capital letter or a value"),
        ("f'The port is {port}'", "does not end with a period"),
        ("'The ' + what + '.'", "composed elsewhere"),
        ("describe(port)", "composed elsewhere"),
        ('f\'The port is {"taken" if busy else "free"}.\'', "a placeholder holds words"),
        ("f'It is {\" and \".join(names)}.'", "a placeholder holds words"),
    ],
)
def test_the_message_checker_tells_sentences_from_fragments(code, expected):
    assert fault(ast.parse(code, mode="eval").body) == expected


def test_error_messages_are_whole_sentences():
    everything = [(place(path, line), message) for path in MODULES for line, message in messages(tree(path))]
    assert len(everything) > 150
    assert_none(f"{where} {fault(message)}: {ast.unparse(message)}" for where, message in everything if fault(message))


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of each comment and string of a Python file, in tests only docstrings; else of each line."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        is_data = "tests" in path.parts and not token.string.startswith('"""')
        if kind == "COMMENT" or (kind in ("STRING", "FSTRING_MIDDLE") and not is_data):
            yield token.start[0], token.string


def test_texts_use_plain_words():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    assert_none(
        f"{place(path, line)} {word[0]}"
        for path in [*MODULES, *TEXTS, *tests]
        if path != Path(__file__)
        for line, text in texts(path)
        for word in UNCLEAR_WORDS.finditer(re.sub(r"\s+", " ", text))
    )
