"""Pytest plugin for a run of PEFT's own tests: what PEFT's unpublished conftest.py would do, minus the network.

Enters: PEFT_SUITE_OUTCOMES, a path. Leaves: there, one JSON object from test id to "passed", "failed", "skipped: why"
and so on. The models come from the Hub cache that tiny_models.py fills.
"""

import contextlib
import json
import os
from pathlib import Path

import pytest


_RANK = {"passed": 0, "xfailed": 1, "skipped": 2, "failed": 3}
_outcomes: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: declared by PEFT")


def pytest_collection() -> None:
    """Keep PEFT's helper from going online for a model's first use; it is bound by name when a test module loads."""
    from tests import testing_utils

    testing_utils.hub_online_once = contextlib.nullcontext


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst outcome of a test's set-up, call and tear-down."""
    if report.when != "call" and report.passed:
        return
    outcome, reason = report.outcome, ""
    if report.skipped:
        outcome = "xfailed" if "wasxfail" in vars(report) else "skipped"
        reason = f": {report.longrepr[2]}" if isinstance(report.longrepr, tuple) else ""
    elif report.failed and report.longrepr is not None:
        crash = report.longrepr.reprcrash
        reason = f": {Path(crash.path).name}:{crash.lineno}: {crash.message.splitlines()[0][:300]}"
    kept = _outcomes.get(report.nodeid, "passed").partition(":")[0]
    if report.nodeid not in _outcomes or _RANK[outcome] > _RANK[kept]:
        _outcomes[report.nodeid] = outcome + reason


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Only the process that sees every report writes: with xdist, not its workers."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        Path(os.environ["PEFT_SUITE_OUTCOMES"]).write_text(json.dumps(_outcomes, indent=1, sort_keys=True))
