"""The other process of latex_equality.py: pairs of LaTeX answers on stdin, a verdict each on stdout, as lines of JSON.

Started as a file, so that it imports math_verify and nothing of this package: it is up in a second. A pair that takes too
long or too much memory ends it: the kernel stops it inside a C function too, such as the power of two large integers,
where Python's signal handlers and math_verify's own timeouts wait for ever.
"""

import json
import logging
import os
import resource
import signal
import sys

from math_verify import LatexExtractionConfig, parse, verify


CPU_SECONDS = 1.0  # for one pair: of the processor, so that a busy machine gives no other verdict
MEMORY_BYTES = 4 * 2**30
CONFIG = [LatexExtractionConfig()]


def agree(found: str, gold: str) -> bool:
    """Whether math_verify takes them for equal, in either order: it looks into an interval on one side only."""
    parsed_found, parsed_gold = (
        parse(f"${answer}$", extraction_config=CONFIG, parsing_timeout=None) for answer in (found, gold)
    )
    return verify(parsed_gold, parsed_found, timeout_seconds=None) or verify(
        parsed_found, parsed_gold, timeout_seconds=None
    )


def main() -> None:
    """Answers until stdin ends; each verdict has the number of its pair."""
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever else prints
    logging.disable(logging.CRITICAL)  # math_verify warns that its timeouts are off
    agree("x+1", r"\frac{1}{2}")  # imports the rest, so that the first pair has as much time as any other
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps([0, True]), file=verdicts, flush=True)
    for line in sys.stdin:
        number, found, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # nobody handles SIGPROF: it ends the process
        try:
            verdict = bool(agree(found, gold))
        except Exception:  # what cannot be compared is not equal
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([number, verdict]), file=verdicts, flush=True)


if __name__ == "__main__":
    main()
