"""Numbers and tables in Markdown that reads well as plain text."""

import math
from collections.abc import Iterable, Sequence

from experiments.common.statistics import Estimate

_WIDEST = 48  # characters of a column; longer cells stick out


def table(rows: Iterable[Iterable[tuple[str, str]]], *, names: int = 1) -> str:
    """A table of rows of cells, each with the heading of its column; see `grid`."""
    lines = [list(row) for row in rows]
    header = [heading for heading, _ in lines[0]]
    return grid(header, ([cell for _, cell in line] for line in lines), names=names)


def grid(header: Sequence[str], rows: Iterable[Sequence[str]], *, names: int = 1) -> str:
    """A table whose first columns are names, aligned left; the others are numbers."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [min(max(map(len, column)), _WIDEST) for column in zip(*lines, strict=True)]
    lines.insert(
        1, ["-" * width if i < names else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    )
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def percent(value: float | Estimate, digits: int = 2, *, unit: str = " %") -> str:
    """Format a fraction in percent, "1.64 %", or with its interval, "1.64 [1.50, 1.78] %"."""
    if isinstance(value, Estimate):
        return number(Estimate(*(100 * end for end in value)), digits) + unit
    return f"{100 * value:.{digits}f}{unit}"


def number(value: float | Estimate, digits: int = 4) -> str:
    """Format a number, with its interval if it has one."""
    if not isinstance(value, Estimate):
        return f"{value:.{digits}f}"
    if math.isnan(value.low):
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
