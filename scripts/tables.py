"""Tables that are whole in 80 columns."""

from collections.abc import Sequence

from rich import box
from rich.table import Table


def narrow(title: str, whole: Sequence[str], folded: Sequence[str] = ()) -> Table:
    """A table without a frame.

    Args:
        whole: titles of the columns whose texts stay on one line, to be copied or searched for.
        folded: titles of the columns after them, whose texts may take several.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title=title)
    table.title_justify = table.caption_justify = "left"
    for name in whole:
        table.add_column(name, no_wrap=True)
    for name in folded:
        table.add_column(name, overflow="fold")
    return table
