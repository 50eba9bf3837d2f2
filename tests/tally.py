"""What the tests counted, added up: faults survived, files tried, inputs fuzzed, versions tested, doc blocks run.

A test says so with pytest's own `record_property("faults survived", 40)`, and only of what went as it should. The sums
are the last lines of a run; with the environment variable TINYLORA_TALLY they are added to that JSON file as well, so
that runs in several environments have one sum:

    python tests/tally.py outputs/tally.json
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest


COUNTED = ("faults survived", "files tried", "inputs fuzzed", "versions tested", "doc blocks run")


def counts_of(reports: list[pytest.TestReport]) -> Counter:
    """The sum of what passed tests recorded."""
    counts: Counter = Counter()
    for report in reports:
        counts.update({name: value for name, value in report.user_properties if name in COUNTED})
    return counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = counts_of([r for r in terminalreporter.stats.get("passed", []) if r.when == "call"])
    if not counts or hasattr(terminalreporter.config, "workerinput"):  # pytest-xdist's workers have a summary too
        return
    terminalreporter.section("counted by passed tests")
    for name in COUNTED:
        if counts[name]:
            terminalreporter.write_line(f"{name}: {counts[name]:,}")
    if file := os.environ.get("TINYLORA_TALLY"):
        add_to(Path(file), counts)


def add_to(file: Path, counts: Counter) -> None:
    """Adds counts to those of earlier runs."""
    earlier = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(Counter(earlier) + counts, indent=2) + "\n")


def main() -> None:
    """Prints a tally file, one count a line."""
    counts = json.loads(Path(sys.argv[1]).read_text())
    for name in COUNTED:
        print(f"{name}: {counts.get(name, 0):,}")


if __name__ == "__main__":
    main()
