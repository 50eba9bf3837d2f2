"""What every benchmark says of the run that its tables come from."""

import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.training import processor_name


def run_lines(
    module: str, argv: Sequence[str], started: float, others_seconds: float, packages: Sequence[str]
) -> list[str]:
    """Command, machine, versions and date, as Markdown.

    Args:
        module (`str`): of the benchmark, such as "benchmarks.basis".
        argv (`Sequence[str]`): its arguments.
        started (`float`): when it began, by `time.perf_counter`.
        others_seconds (`float`): CPU seconds that other programs took meanwhile.
        packages (`Sequence[str]`): whose versions matter.
    """
    seconds = time.perf_counter() - started
    others = others_seconds / (seconds * (os.cpu_count() or 1))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    return [
        f"- command: `{shlex.join(['python', '-m', module, *argv])}`, {seconds:.0f} s",
        f"- machine: {device}, {torch.get_num_threads()} thread(s), of which other programs took {others:.0%} meanwhile; "
        f"Python {platform.python_version()}",
        f"- versions: {', '.join(f'{package} {version(package)}' for package in packages)}",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
    ]


def publish(head: str, sections: Mapping[str, str], output: Path | None) -> None:
    """Prints a report, and writes it.

    Args:
        head (`str`): Markdown, what stands first.
        sections (`dict[str, str]`): Markdown by title.
        output (`Path`, *optional*): the file to write.
    """
    text = head + "".join(f"\n\n## {title}\n\n{section}" for title, section in sections.items()) + "\n"
    print(text)
    if output is not None:
        output.write_text(text)
