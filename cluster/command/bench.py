"""`expertmesh bench`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from placement.command.arguments import Json
from placement.command.ending import CommandError, Ending, tell

ROOT = Path(__file__).parents[2]
STOP_TIMEOUT_S = 30.0  # for a benchmark to end its processes after Ctrl-C


def bench(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="One of --list, such as serving.upgrade; by default all that need no GPU, one by one."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few runs: does it work, not how fast.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the benchmarks instead.")] = False,
    as_json: Json = False,
) -> None:
    """Run benchmarks of a checkout; results are in bench-results/.

    Further options are handed on to the benchmark: `expertmesh bench data_plane.soak --help`.
    """
    known = benchmarks(ROOT)
    if listed:
        tell(as_json, known, known)
        return
    if name is not None and name not in known:
        raise CommandError(f"no benchmark is named {name!r}, expected one of {', '.join(known)}", ending=Ending.USAGE)
    module = "benchmarks" if name is None else f"benchmarks.{name}"
    command = [sys.executable, "-m", module, *(["--quick"] if quick else []), *context.args]
    since = time.time()
    status = run(command, as_json)
    if as_json:
        tell(True, {"command": command, "exit_status": status, "results": written_since(ROOT, since)}, [])
    if status:
        raise CommandError(f"{module} ended with status {status}")


def benchmarks(root: Path) -> list[str]:
    """The benchmarks of a checkout by name. CommandError if `root` has none."""
    folder = root / "benchmarks"
    if not (folder / "__main__.py").is_file():
        raise CommandError(
            f"there are no benchmarks in {root}: they are no part of the installed package; run this in a checkout "
            "(git clone, then `make` or `pip install -e .`)"
        )
    found = set()
    for path in folder.rglob("*.py"):
        if '__name__ == "__main__"' in path.read_text():
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            found.add(name.removesuffix(".__main__"))
    return sorted(found - {"__main__"})


def run(command: list[str], as_json: bool) -> int:
    """The status of a benchmark, which may end its processes after Ctrl-C."""
    out: Any = sys.stderr if as_json else None
    with subprocess.Popen(command, cwd=ROOT, stdout=out) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def written_since(root: Path, since: float) -> dict[str, Any]:
    """What benchmarks have written since a time (seconds since 1970), by name."""
    paths = sorted((root / "bench-results").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths if path.stat().st_mtime >= since - 1}
