"""Fuzzes readers by what of the package's code an input reaches, with atheris; each in a process of its own.

    python tests/fuzz/guided.py inline_body answers --runs 20000 [--seed 1]

Without a name, all of them. An input that is read wrongly is printed in Base64; once what is behind it is mended it goes
into its reader's `found`. The last line says how many inputs were read.
"""

import argparse
import base64
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


TESTS = Path(__file__).parents[1]
PACKAGES = ["peft_tinylora", "trl_recipes"]
SECONDS_FOR_ONE = 60  # by the clock
MOST_MEGABYTES = 6000  # PyTorch and transformers take 600
LONGEST = 16384  # bytes of an input
CHILD = "TINYLORA_FUZZED_READER"


def fuzz_in_this_process(name: str) -> None:
    """Runs libFuzzer, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=PACKAGES):
        from fuzz.harness import attempt
        from fuzz.readers.all import reader_of

        reader = reader_of(name)
    atheris.Setup(sys.argv, lambda data: attempt(reader, data) and None)
    atheris.Fuzz()


def run(name: str, runs: int, seed: int) -> int:
    """Fuzzes one reader in a process of its own; returns how many inputs libFuzzer says that it read.

    Raises:
        RuntimeError: if one was read wrongly; with the end of what the process said, and the input.
    """
    from fuzz.readers.all import reader_of

    reader = reader_of(name)
    with tempfile.TemporaryDirectory(prefix="tinylora-guided-") as folder:
        corpus, tokens = Path(folder, "corpus"), Path(folder, "tokens")
        corpus.mkdir()
        for index, data in enumerate([*reader.seeds(), *reader.found]):
            (corpus / f"seed-{index}").write_bytes(data)
        tokens.write_text("".join(f'"{as_token(token)}"\n' for token in reader.tokens if 0 < len(token) <= 64))
        options = [f"-runs={runs}", f"-seed={seed}", f"-max_len={LONGEST}", f"-timeout={SECONDS_FOR_ONE}"]
        options += [f"-rss_limit_mb={MOST_MEGABYTES}", "-print_final_stats=1", "-verbosity=0"]
        options += [f"-artifact_prefix={folder}/wrong-"]
        options += [f"-dict={tokens}"] * (tokens.stat().st_size > 0)  # libFuzzer refuses an empty one
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, *options, str(corpus)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # What a reader leaves in its workplace goes with the folder: libFuzzer ends a process without cleaning up.
            env=os.environ
            | {CHILD: name, "TMPDIR": folder, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        )
        # libFuzzer prints those of up to 256 bytes only.
        wrong = [
            f"{path.name}: {base64.b64encode(path.read_bytes()).decode()}" for path in Path(folder).glob("wrong-*")
        ]
    read = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stdout)
    if done.returncode or read is None:
        said = "\n".join([done.stdout[-6000:], *wrong])
        raise RuntimeError(f"{name}: libFuzzer ended with {done.returncode}:\n{said}")
    return int(read[1])


def as_token(token: bytes) -> str:
    """A token as libFuzzer's dictionaries have it."""
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in token)


def main() -> None:
    """Fuzzes the readers that are named, one after the other."""
    from fuzz.readers.all import READERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}")
    parser.add_argument("--runs", type=int, default=10_000, help="inputs for each (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="0, the default: another one each time")
    options = parser.parse_args()
    counts = {}
    for name in options.readers or READERS:
        counts[name] = run(name, options.runs, options.seed)
        print(f"{name}: {counts[name]:,} inputs", flush=True)
    print(f"{sum(counts.values()):,} inputs")


if __name__ == "__main__":
    if CHILD in os.environ:
        fuzz_in_this_process(os.environ[CHILD])
    else:
        sys.path[:0] = [str(TESTS.parent), str(TESTS)]
        main()
