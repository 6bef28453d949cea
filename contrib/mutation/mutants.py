"""How much of a change of the code the tests notice (mutation testing, by the operators of cosmic-ray).

One change of each of some places, which a seed chooses, is made in a copy of the checkout, and the tests that run that
line are run there, the shortest first, until one fails or a minute and a half is over. A change that none of them
notices survives: it stands for something that nobody tests, or for nothing (another size of a cache, say). Only tests
that need no mount are run, without the longest and those that take memory away.
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
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import places
from coverage import CoverageData
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    *("blockmap", "changelog", "portion", "cowportion", "processor", "reclaim", "reclaimer", "shardstore"),
    *("shardstate", "snapshotindex", "snapshots", "snapshot", "catalog", "contenthash", "objectdigests", "checksums"),
    *("sealing", "sealer", "sealedfile", "unnamed", "traits", "placement", "restoring", "formats", "geometry"),
]
NOT_RUN = (
    # These take too long, ...
    *("test_t3_powercut.py", "test_t3_damage.py", "test_t3_fuzz.py"),
    "test_t3_model.py::test_any_operations_agree_with_the_model_without_threads",
    # ... and here it is what counts the lines that finds no memory.
    "test_t3_nomemory.py",
)
TEST_SECONDS_MAX = 20.0
# For one change: the tests that are run took no longer together when nothing was changed, ...
TESTS_SECONDS_MAX = 90.0
# ... and a change that has them take so much longer is noticed.
HUNG_SECONDS = 240.0
COPIED = ("snapfs", "backends", "tests", "contrib", "docs", "pyproject.toml", "README.md")


@dataclass
class Knowledge:
    """Which tests run which line, and how long each takes."""

    tests_by_line: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def tests_of(self, mutant: places.Mutant, source: str) -> list[str]:
        """Those that can notice a change, the shortest first, as many as take a minute and a half."""
        by_line = self.tests_by_line.get(str(mutant.module), {})
        lines = [mutant.line, *places.users_of_constant(source, mutant.line)]
        # A line that is run once, when its module is imported: whatever runs another one of the module.
        found = {test for line in lines for test in by_line.get(line, ())} or set().union(*by_line.values())
        chosen: list[str] = []
        total = 0.0
        for test in sorted(found, key=lambda test: self.seconds.get(test, 0.0)):
            total += self.seconds.get(test, 0.0)
            if total > TESTS_SECONDS_MAX and chosen:
                break
            chosen.append(test)
        return chosen


def copy_of(folder: Path) -> Path:
    """A checkout to change."""
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Has the tests import what lies in this folder, and leave nothing compiled behind that an older change made."""
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def look_at_tests(folder: Path, processes: int) -> Knowledge:
    """Run all tests once. Ends with their output when one fails."""
    ignored = [f"--deselect=tests/{name}" for name in NOT_RUN]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not mount", "-n", str(processes), "--junitxml=tests.xml"]
    options = ["--cov=snapfs", "--cov-context=test", "--cov-report=", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *options, *ignored, "tests"], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    known = Knowledge()
    for case in ElementTree.parse(folder / "tests.xml").iter("testcase"):
        name = case.get("classname", "").replace(".", "/") + ".py::" + case.get("name", "")
        known.seconds[name] = float(case.get("time", 0))
    data = CoverageData(str(folder / ".coverage"))
    data.read()
    for path in data.measured_files():
        by_line = known.tests_by_line[str(Path(path).relative_to(folder))] = {}
        for line, contexts in data.contexts_by_lineno(path).items():
            tests = sorted({one.rpartition("|")[0] for one in contexts if one})
            by_line[line] = [one for one in tests if known.seconds.get(one, 0) <= TEST_SECONDS_MAX]
    return known


@dataclass
class Verdict:
    """What became of a change."""

    mutant: places.Mutant
    outcome: str
    difference: str

    @property
    def is_noticed(self) -> bool:
        return self.outcome in ("failed", "hung")


def run_tests(folder: Path, tests: list[str]) -> str:
    """What comes of tests: survived (the change, for all passed), failed, hung or not found (nothing was run)."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "--timeout=60",
    ]
    try:
        done = subprocess.run(
            [*command, *tests], cwd=folder, env=environment(folder), capture_output=True, timeout=HUNG_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "hung"
    if b"ERROR: not found: " in done.stderr + done.stdout:
        return "not found"
    return "failed" if done.returncode else "survived"


def judge(mutant: places.Mutant, known: Knowledge, folder: Path) -> Verdict:
    """Make a change, run what may notice it, and take it back."""
    path = folder / mutant.module
    source = path.read_text()
    changed = mutant.code(source)
    difference = "".join(
        difflib.unified_diff(source.splitlines(True), changed.splitlines(True), str(mutant.module), "changed", n=1)
    )
    tests = known.tests_of(mutant, source)
    if not tests:
        return Verdict(mutant, "not run", difference)
    path.write_text(changed)
    try:
        outcome = run_tests(folder, tests)
        if outcome == "not found":
            # A changed constant has tests called otherwise that have it as a parameter.
            outcome = run_tests(folder, sorted({one.partition("[")[0] for one in tests}))
        if outcome == "not found":
            outcome = "not run"
    finally:
        path.write_text(source)
    return Verdict(mutant, outcome, difference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=MODULES, help="names in snapfs; by default those that keep data")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200, help="so many places; 0 for all")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="also write all verdicts to this file")
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"there is no folder {str(arguments.json.parent)!r}")
    console = Console(stderr=True)
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="snapfs-mutants-") as temporary:
        folders = [copy_of(Path(temporary) / str(number)) for number in range(arguments.processes)]
        console.print("running the tests, to see which lines each of them runs")
        known = look_at_tests(folders[0], arguments.processes)
        found = []
        # With bounds made small, as it names them, the model holds: any value is right.
        bounds = places.strings_in((ROOT / "tests" / "cramped.py").read_text())
        for name in arguments.modules:
            module = Path("snapfs") / f"{name}.py"
            found += places.one_for_each_place(module, (folders[0] / module).read_text(), chance, bounds)
        chosen = chance.sample(found, min(arguments.count or len(found), len(found)))
        free: SimpleQueue[Path] = SimpleQueue()
        for folder in folders:
            free.put(folder)

        def run(mutant: places.Mutant) -> Verdict:
            folder = free.get()
            try:
                return judge(mutant, known, folder)
            finally:
                free.put(folder)

        verdicts: list[Verdict] = []
        with ThreadPoolExecutor(arguments.processes) as pool:
            running = [pool.submit(run, mutant) for mutant in chosen]
            try:
                for one in track(running, "changes", console=console):
                    verdicts.append(one.result())
                    if not verdicts[-1].is_noticed:
                        print(f"{verdicts[-1].outcome}:\n{verdicts[-1].difference}", flush=True)
                    if not console.is_terminal and len(verdicts) % 10 == 0:
                        console.print(f"{len(verdicts)} tried, {sum(one.is_noticed for one in verdicts)} noticed")
            except KeyboardInterrupt:
                # What was found so far is told.
                pool.shutdown(wait=False, cancel_futures=True)
    report(verdicts, len(found), arguments.seed)
    if arguments.json:
        shown = [
            {"module": str(one.mutant.module), "line": one.mutant.line, "outcome": one.outcome, "diff": one.difference}
            for one in verdicts
        ]
        arguments.json.write_text(json.dumps(shown, indent=1) + "\n")


def report(verdicts: list[Verdict], place_count: int, seed: int) -> None:
    """Print the score."""
    noticed = sum(one.is_noticed for one in verdicts)
    print(f"{noticed} of {len(verdicts)} changes were noticed ({noticed / max(1, len(verdicts)):.1%}); ", end="")
    print(f"{place_count} places, seed {seed}")


if __name__ == "__main__":
    main()
