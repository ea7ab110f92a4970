"""Text table: cells in aligned columns that fit a terminal of 80, drawn by rich where it is installed."""

from __future__ import annotations

from typing import TextIO

Cells = list[tuple[str, ...]]
TERMINAL_COLUMNS = 80
SHORT_CELL = 24  # characters: what is no longer stays on one line


def format_number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def print_cells(title: str, cells: Cells, file: TextIO) -> None:
    """A table that fits 80 columns as long as its numbers do: what stands first in a row is broken, and numbers never are."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return print_plain_cells(title, cells, file)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(cells[0][0], overflow="fold")
    for column in list(zip(*cells, strict=True))[1:]:
        number = any(cell[:1].isdigit() for cell in column[1:])
        is_short = max(map(len, column)) <= SHORT_CELL
        table.add_column(column[0], justify="right" if number else "left", no_wrap=number or is_short, overflow="fold")
    for row in cells[1:]:
        table.add_row(*row)
    if file.isatty():
        Console(file=file, highlight=False).print(table)
    else:  # whatever FORCE_COLOR says: control codes in a file are noise
        Console(file=file, width=TERMINAL_COLUMNS, highlight=False, force_terminal=False).print(table)
    return None


def print_plain_cells(title: str, cells: Cells, file: TextIO) -> None:
    """The same without rich. A row that is too wide begins with its first cell on a line of its own."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_wide = 2 + sum(widths) + 2 * (len(widths) - 1) > TERMINAL_COLUMNS
    print(title, file=file)
    for first, *others in cells:
        if is_wide and first:
            print(f"  {first}", file=file)
        lead = [" " * 4] if is_wide else [first.ljust(widths[0])]
        print(
            "  " + "  ".join(lead + [c.ljust(w) for c, w in zip(others, widths[1:], strict=True)]).rstrip(), file=file
        )
