"""PEFT's own tests of its TinyLoRA, run with peft_tinylora registered in its place.

    python tests/contract/run_peft_tests.py            # stock PEFT once, then the plugin, then the differences
    python tests/contract/run_peft_tests.py --stock    # stock PEFT again
    python tests/contract/run_peft_tests.py -k merge   # anything else goes to pytest, for the plugin only

Enters: the source package of the installed PEFT, from PyPI; its models are made here (peft_support/tiny_models.py).
Leaves: build/peft_tests/<version>/{stock,plugin}.json, the outcome of each test. Exits 1 if a test that passes with
stock PEFT does not pass with the plugin, or is no longer collected.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent / "peft_support"
TEST_FILES = (
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_initialization.py",
    "test_low_level_api.py",
    "test_seq_classifier.py",
)
PICKLE_REFUSED = "safe_serialization=False would write a pickle, which is not read again"


def fetch_tests(build: Path) -> Path:
    """Unpack the source package of the installed PEFT under `build`; returns the folder that holds `tests/`."""
    name = f"peft-{version('peft')}"
    source = build / name
    if not (source / "tests" / "__init__.py").exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*pip, "--dest", str(build), name.replace("-", "==")], check=True)
        with tarfile.open(build / f"{name}.tar.gz") as archive:
            archive.extractall(build, filter="data")
        # PEFT's package leaves this file out, and its tests import one another relatively.
        (source / "tests" / "__init__.py").touch()
    return source


def run_suite(source: Path, build: Path, side: str, pytest_args: list[str]) -> dict[str, str]:
    """Run the TinyLoRA tests on "stock" or "plugin"; returns the outcome of each test by its id."""
    outcomes = build / f"{side}.json"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(source), str(ROOT)]),
        "HF_HUB_CACHE": str(build / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # one CPU contract: several of PEFT's tests take another path on a GPU
        "PEFT_SUITE_OUTCOMES": str(outcomes),
    }
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(source), "-p", "peft_suite"]
    # Naming the package as a pytest plugin imports it before anything of PEFT's tests.
    command += [] if side == "stock" else ["-p", "peft_tinylora"]
    command += ["-q", "--tb=short", "-k", "tinylora", *pytest_args]
    print(f"PEFT {version('peft')} TinyLoRA tests, {side}: log in {build / side}.log", flush=True)
    with open(build / f"{side}.log", "w") as log:
        files = [f"tests/{name}" for name in TEST_FILES]
        finished = subprocess.run([*command, *files], cwd=source, env=env, stdout=log, stderr=subprocess.STDOUT)
    if finished.returncode not in (0, 1) or not outcomes.exists():
        raise SystemExit(f"pytest could not run the {side} tests (status {finished.returncode}): see the log")
    return json.loads(outcomes.read_text())


def summary(results: dict[str, str]) -> str:
    counts = collections.Counter(outcome.partition(":")[0] for outcome in results.values())
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true", help="run stock PEFT alone, and keep the outcome")
    options, pytest_args = parser.parse_known_args()

    build = ROOT / "build" / "peft_tests" / version("peft")
    build.mkdir(parents=True, exist_ok=True)
    source = fetch_tests(build)
    fill = f"from pathlib import Path; from tiny_models import fill_hub_cache; fill_hub_cache(Path({str(build / 'hub')!r}))"
    subprocess.run([sys.executable, "-c", fill], check=True, env=os.environ | {"PYTHONPATH": str(SUPPORT)})

    kept = build / "stock.json"
    if options.stock or not kept.exists():
        stock = run_suite(source, build, "stock", pytest_args if options.stock else [])
    else:
        stock = json.loads(kept.read_text())
    print(f"stock:  {summary(stock)}")
    if options.stock:
        return 0

    plugin = run_suite(source, build, "plugin", pytest_args)
    print(f"plugin: {summary(plugin)}")
    selected = stock if not pytest_args else {test: stock[test] for test in plugin if test in stock}
    differences = {
        test: plugin.get(test, "not collected")
        for test, outcome in selected.items()
        if outcome == "passed" and plugin.get(test) != "passed"
    }
    refused = {test for test, outcome in differences.items() if PICKLE_REFUSED in outcome}
    differences = {test: outcome for test, outcome in differences.items() if test not in refused}
    print(f"{len(refused)} tests write a pickle, which the plugin refuses on purpose")
    for test, outcome in differences.items():
        print(f"  {test}\n    {outcome}")
    print(f"{len(differences)} tests pass with stock PEFT and not with the plugin")
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
