"""The command line that all commands share: one console, one progress bar, tables, one way to end.

A command is a function with typer's annotations, or a typer app with subcommands. `run` gives it `--help` with its
examples, prints an error as one sentence, and exits with 0 (done), 1 (failed), 2 (wrong options), 3 (a server is away),
or 128 + N after signal N.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from handlers.errors import UserError

# Paths and messages are printed as they are: markup would swallow their [brackets], and a pipe has 80 columns.
console = Console(soft_wrap=True, highlight=False, markup=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, style="red")
EXIT_INTERRUPTED = 130  # 128 + SIGINT


def run(command: Callable[..., None] | typer.Typer, examples: Sequence[str] = ()) -> NoReturn:
    """Run a command with the arguments of this process, and exit.

    Args:
        command: a function, whose docstring is the help text, or an app with subcommands.
        examples: command lines that `--help` shows.
    """
    if isinstance(command, typer.Typer):
        app = command
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(epilog=_epilog(examples))(command)
    try:
        app()
    except UserError as error:
        errors.print(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def command_group(description: str, examples: Sequence[str]) -> typer.Typer:
    """Return an app for subcommands; without one it prints its help, which ends with the examples."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        help=description,
        epilog=_epilog(examples),
    )


def _epilog(examples: Sequence[str]) -> str | None:
    return "\n\n".join(["Examples:", *(f"  {example}" for example in examples)]) if examples else None


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that takes (done, total). It disappears when complete, and is never drawn into a file."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def table(title: str, whole: Sequence[str], folded: Sequence[str] = ()) -> Table:
    """A table without a frame that fits into 80 columns.

    Args:
        whole: titles of the columns whose texts stay on one line, to be copied or searched.
        folded: titles of the columns after them, whose texts may take several lines.
    """
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title=title)
    grid.title_justify = grid.caption_justify = "left"
    for name in whole:
        grid.add_column(name, no_wrap=True)
    for name in folded:
        grid.add_column(name, overflow="fold")
    return grid


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str | float]]) -> str:
    """Return a Markdown table without a last line break; fractions get three digits."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells))
