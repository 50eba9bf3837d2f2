"""What a recipe says at its end: the trained numbers, the scores, where everything is, and the result as one JSON object."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from peft_tinylora.adapter_files import WEIGHTS_FILE
from peft_tinylora.describe import MOST_SHOWN


Scores = dict[str, float] | None  # share correct by way of decoding; None: not measured


def print_numbers(numbers: Sequence[float]) -> None:
    """Prints the trained numbers, the first `MOST_SHOWN` of more."""
    shown = numbers[:MOST_SHOWN]
    print(f"\n{len(numbers)} trained numbers{':' if shown == numbers else f', the first {len(shown)}:'}")
    for start in range(0, len(shown), 7):
        print("  " + " ".join(f"{value:+.5f}" for value in shown[start : start + 7]))


def print_scores(before: Scores, after: Scores) -> None:
    """Prints the held-out accuracies side by side, where both were measured."""
    if before is None or after is None:
        return
    print(f"\n{'held out':<12}{'before':>8}{'after':>8}")
    for decoding in after:
        print(f"{decoding:<12}{before[decoding]:>8.1%}{after[decoding]:>8.1%}")


def print_files(output_dir: Path, curve: tuple[str, str], has_card: bool, score_with: str | None) -> int | None:
    """
    Prints what lies in a finished run's folder, and the command that scores it again.

    Returns:
        `int`, *optional*: bytes of the adapter; `None` where the folder holds a whole model.
    """
    weights = output_dir / WEIGHTS_FILE
    adapter_bytes = weights.stat().st_size if weights.exists() else None
    saved = "the model" if adapter_bytes is None else f"the adapter ({adapter_bytes} bytes)"
    card = "README.md, " if has_card else ""
    print(f"\nsaved in {output_dir}: {saved}, {card}{', '.join(curve)}")
    if score_with is not None:
        what = "--model_name_or_path" if adapter_bytes is None else "--adapter"
        print(f"score it again: python trl_recipes/score.py {what} {shlex.quote(str(output_dir))} {score_with}")
    return adapter_bytes


def by_decoding(before: Scores, after: Scores) -> dict[str, float | None]:
    """The accuracies as the result line names them: greedy_before, greedy_after, sampled_before, sampled_after."""
    return {
        f"{decoding}_{when}": None if scores is None else scores[decoding]
        for decoding in ("greedy", "sampled")
        for when, scores in (("before", before), ("after", after))
    }
