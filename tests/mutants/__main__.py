"""`python -m tests.mutants`: are there changes of the sources that no test notices?

Samples mutants of the modules in `judges.py`, runs each module's tests on each of its mutants in a copy of the tree,
and tells which ones survived. The same seed and sources give the same mutants. Exit status 1 if fewer than 90 % are
killed or a survivor is not explained in explained.toml.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from tests.mutants.judges import JUDGES
from tests.mutants.operators import Mutant, Site, mutant_at, sites_of

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
ENOUGH = 0.9


class Worker:
    """One process of worker.py in a copy of the tree."""

    def __init__(self, tree: Path, compiled: bool) -> None:
        jit = {} if compiled else {"NUMBA_DISABLE_JIT": "1"}
        settings = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **jit}
        command = [sys.executable, "-m", "tests.mutants.worker"]
        self._process = subprocess.Popen(
            command, cwd=tree, env={**os.environ, **settings}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, tests: list[str], limit_s: float) -> dict[str, Any]:
        """What became of one run of `tests`, cut off after `limit_s`."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        print(json.dumps({"tests": tests, "limit_s": limit_s}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def copy_tree(into: Path) -> None:
    """The files of the working tree that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)


def sample_mutants(
    sources: dict[str, str], count: int, seed: int, all_sites: dict[str, list[Site]]
) -> dict[str, list[Mutant]]:
    """`count` mutants over the modules in proportion to their sites, by a chance of its own for each module."""
    total = sum(map(len, all_sites.values()))
    sampled = {}
    for module, sites in all_sites.items():
        chance = random.Random(f"{seed} {module}")
        share = max(1, round(count * len(sites) / total)) if count else len(sites)
        mutants = []
        for site in chance.sample(sites, len(sites)):
            if len(mutants) < share and (mutant := mutant_at(site, sources[module], chance)) is not None:
                mutants.append(mutant)
        sampled[module] = sorted(mutants, key=lambda m: (m.line, m.operator))
    return sampled


def by_hand(module: str, source: str, entries: list[dict[str, str]]) -> list[Mutant]:
    """The mutants of by_hand.toml for a module; ValueError names a text that is not in the source once."""
    mutants = []
    for entry in (entry for entry in entries if entry["module"] == module):
        old, new = entry["old"], entry["new"]
        if (found := source.count(old)) != 1:
            raise ValueError(f"by_hand.toml: {old!r} is found {found} times in {module}, expected once")
        line = source[: source.index(old)].count("\n") + 1
        mutants.append(Mutant("ByHand", line, old.strip(), new.strip(), source.replace(old, new)))
    return mutants


def explanation(module: str, mutant: Mutant, entries: list[dict[str, str]]) -> str | None:
    """The reason in explained.toml for a survivor: by module, the text of the line and, where given, of the change."""
    for entry in entries:
        same_place = entry["module"] == module and entry["line"] == mutant.before
        if same_place and entry.get("mutant", mutant.after) == mutant.after:
            return entry["reason"]
    return None


def judge_module(
    tree: Path, worker: Worker, module: str, mutants: list[Mutant], explained: list[dict[str, str]]
) -> dict[str, Any]:
    """Run a module's tests on its mutants. RuntimeError if they fail on the module itself."""
    original, tests = (tree / module).read_text(), JUDGES[module].arguments(tree)
    results: list[dict[str, Any]] = []
    try:
        baseline = worker.run(tests, 600)
        if baseline["outcome"] != "survived":
            raise RuntimeError(f"the tests of {module} fail without a mutant:\n{baseline['tail']}")
        limit_s = 15 + 8 * baseline["seconds"]
        for mutant in mutants:
            (tree / module).write_text(mutant.source)
            found = worker.run(tests, limit_s)
            result: dict[str, Any] = {name: getattr(mutant, name) for name in ("operator", "line", "before", "after")}
            result |= found
            if found["outcome"] == "survived":
                result["reason"] = explanation(module, mutant, explained)
                lines = original.splitlines(), mutant.source.splitlines()
                result["diff"] = "\n".join(difflib.unified_diff(*lines, module, module, lineterm="", n=1))
            if found["outcome"] != "hung":
                del result["tail"]
            results.append(result)
            tell_one(module, result)
    finally:
        (tree / module).write_text(original)
    return {"baseline_s": baseline["seconds"], "mutants": results}


def tell_one(module: str, result: dict[str, Any]) -> None:
    """A line for a mutant, two for one that needs a look."""
    word = "explained" if result.get("reason") else result["outcome"]
    place = f"{module}:{result['line']}  {result['operator']}"
    print(f"  {word:9} {result['seconds']:6.1f} s  {place}: {result['before'][:70]}", flush=True)
    if word in ("survived", "hung"):
        print(f"{'':>22}-> {result['after'][:90]}", flush=True)


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "--sample", type=int, default=400, help="mutants in all modules together, 0 for one at every site"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="modules with one of these in their path")
    parser.add_argument("--by-hand", action="store_true", help="the mutants of by_hand.toml alone")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-results" / "mutants.json", help="result file")
    args = parser.parse_args()
    explained = tomllib.loads((HERE / "explained.toml").read_text()).get("survivor", [])
    hand = tomllib.loads((HERE / "by_hand.toml").read_text()).get("mutant", [])
    sources = {module: (ROOT / module).read_text() for module in JUDGES}
    sampled: dict[str, list[Mutant]] = {module: [] for module in JUDGES}
    if not args.by_hand:  # sampled over all modules even where only some are run, so that the mutants stay the same
        sites = {module: sites_of(source) for module, source in sources.items()}
        sampled = sample_mutants(sources, args.sample, args.seed, sites)
    for module, source in sources.items():
        sampled[module] += by_hand(module, source, hand)
    start_s = time.monotonic()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy_tree(Path(folder))
        for compiled in (False, True):
            names = [
                m for m, judge in JUDGES.items() if judge.compiled == compiled and sampled[m] and chosen(m, args.only)
            ]
            if not names:
                continue
            worker = Worker(Path(folder), compiled)
            for module in names:
                report[module] = judge_module(Path(folder), worker, module, sampled[module], explained)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({"seed": args.seed, "modules": report}, indent=1))
            worker.close()
    return tell(report, time.monotonic() - start_s)


def chosen(module: str, only: list[str]) -> bool:
    """Whether --only names this module, or no module at all."""
    return not only or any(text in module for text in only)


def tell(report: dict[str, Any], seconds: float) -> int:
    """Print a line a module, and the survivors that nobody explained; 0 if it is enough, else 1."""
    print(f"\n{'module':44}{'mutants':>8}{'killed':>8}{'hung':>6}{'survived':>9}{'explained':>10}{'open':>6}")
    whole: Counter[str] = Counter()
    for module, found in report.items():
        counts = Counter(result["outcome"] for result in found["mutants"])
        counts["explained"] = sum(bool(result.get("reason")) for result in found["mutants"])
        counts["all"] = len(found["mutants"])
        whole += counts
        print(_row(module, counts))
    print(_row("all", whole) + f"   {seconds / 60:.0f} min")
    for module, found in report.items():
        for result in found["mutants"]:
            if result["outcome"] == "survived" and not result["reason"]:
                print(f"\n{module}:{result['line']} {result['operator']}\n{result['diff']}")
    killed = (whole["killed"] + whole["hung"]) / max(whole["all"], 1)
    open_ = whole["survived"] - whole["explained"]
    print(f"\n{killed:.1%} killed, {open_} survivors without an explanation")
    return 0 if killed >= ENOUGH and not open_ else 1


def _row(name: str, counts: Counter[str]) -> str:
    open_ = counts["survived"] - counts["explained"]
    return (
        f"{name:44}{counts['all']:8}{counts['killed']:8}{counts['hung']:6}{counts['survived']:9}"
        f"{counts['explained']:10}{open_:6}"
    )


if __name__ == "__main__":
    sys.exit(main())
