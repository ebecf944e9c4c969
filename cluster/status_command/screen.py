"""The status for people: lines, which a terminal shows with colours."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from rich.text import Text

from cluster.placement_command.tables import count, table
from cluster.placement_command.views import progress_of

# Words that say how something is. Every one of them is told by its word as well as by its colour.
STYLES = {
    "bold green": ("healthy", "serving"),
    "bold red": ("NOT HEALTHY", "problem"),
    "yellow": ("joining", "filling", "draining", "paused", "copying", "retiring"),
}


def screen(told: dict[str, Any]) -> Text:
    """The whole status."""
    text = Text("\n".join(lines(told)), no_wrap=True)
    for style, words in STYLES.items():
        text.highlight_regex(rf"\b({'|'.join(words)})\b", style)
    return text


def lines(told: dict[str, Any]) -> Iterator[str]:
    """The same, line by line."""
    yield f"{told['url']}  {'healthy' if told['healthy'] else 'NOT HEALTHY'}"
    yield from (f"problem     {problem}" for problem in told["problems"])
    migration, autopilot = told["migration"], told["autopilot"]
    if migration is not None:
        target = f"target {migration['target_version']} ({migration['origin']})"
        yield f"epoch       {told['epoch']}; {target if migration['target_version'] else 'no target yet'}"
        moves = progress_of(SimpleNamespace(**migration))  # type: ignore[arg-type]
        yield f"migration   {'paused; ' if migration['paused'] and not migration['moving'] else ''}{moves}"
    if autopilot is not None:
        frozen = f": {autopilot['frozen']}" if autopilot["frozen"] else ""
        yield f"autopilot   {autopilot['mode']}; {autopilot['state']}{frozen}"
    over = f" (prompts included, over {told['over_s']:.1f} s)" if told["over_s"] else ""
    yield f"tokens/s    {_rate(told['tokens_per_s'])}{over}; {count(told['requests'], 'request')} in the engines"
    if told["routers"]:
        yield ""
        yield table(
            ("router", "epoch", "shards", "requests", "tokens/s", "fan-out", "failovers", "refused", "pid"),
            [
                (
                    router["router_id"] + (f" ({router['pool']})" if router["pool"] else ""),
                    router["epoch"],
                    len(router["connected"]),
                    router["requests"],
                    _rate(router["tokens_per_s"]),
                    "-" if router["fan_out"] is None else f"{router['fan_out']:.2f}",
                    router["failovers"],
                    router["refused_requests"],
                    router["pid"] or "-",
                )
                for router in told["routers"]
            ],
        )
    if told["shards"]:
        yield ""
        yield table(
            ("rank", "state", "slots", "held", "missing", "rows/s", "silent s", "node", "pid"),
            [
                (
                    shard["rank"],
                    shard["state"],
                    shard["num_slots"] or "-",
                    shard["experts_held"],
                    shard["experts_missing"],
                    _rate(shard["rows_per_s"]),
                    f"{shard['silent_s']:.1f}",
                    shard["node_id"][:8],
                    shard["pid"] or "-",
                )
                for shard in told["shards"]
            ],
        )


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
