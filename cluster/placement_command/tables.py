"""Plain text for a terminal: tables, sizes, times."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as they need; those of numbers are set to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    right = [bool(texts) and all(_is_number(row[index]) for row in texts) for index in range(len(header))]
    lines = []
    for row in [list(header), *texts]:
        cells = [
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """Bytes with three digits: 9.44 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB" if num_bytes < 999.5 else f"{num_bytes:.0f} TB"


def seconds(duration_s: float) -> str:
    """A duration: 0.4 s, 12 s, 3 min 5 s, 2 h 3 min."""
    if duration_s < 9.95:
        return f"{duration_s:.1f} s"
    whole = round(duration_s)
    if whole < 60:
        return f"{whole} s"
    minutes, rest_s = divmod(whole, 60)
    return f"{minutes} min {rest_s} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 copy`, `2 copies`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def local_time(since_1970_s: float) -> str:
    """A local date and time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since_1970_s))


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(".", "", 1).isdigit()
