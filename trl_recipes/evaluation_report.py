"""The result of score.py -> results.json, a table in Markdown, and the results in the card of an adapter's folder."""

import json
import os
from pathlib import Path
from typing import cast

from peft_tinylora.card import Evaluation, add_evaluation
from peft_tinylora.published import relative
from trl_recipes.errors import RecipeError
from trl_recipes.score_arguments import ScoreArguments
from trl_recipes.variants import ADAPTER, BASE


def table(result: dict) -> str:
    """The accuracies and the difference in Markdown: in percent, ± one standard error, the interval in brackets."""
    lines = ["| model | decoding | strict | lenient |", "| --- | --- | --- | --- |"]
    for variant, decodings in result["variants"].items():
        for decoding, levels in decodings.items():
            lines.append(
                f"| {variant} | {shown_decoding(decoding, result)} | {' | '.join(map(shown, levels.values()))} |"
            )
    asked = next(iter(result["variants"]))
    for decoding, levels in (result["difference"] or {}).items():
        differences = " | ".join(map(shown_difference, levels.values()))
        lines.append(f"| {asked} - {BASE} | {shown_decoding(decoding, result)} | {differences} |")
    return "\n".join(lines) + "\n"


def shown_decoding(decoding: str, result: dict) -> str:
    """A way of decoding in words."""
    if decoding != "samples":
        return decoding
    return f"{result['samples']} samples, temperature {result['temperature']:g}, top-p {result['top_p']:g}"


def shown(accuracy: dict) -> str:
    """91.2 ± 0.8 %"""
    error = accuracy["standard_error"]
    return f"{100 * accuracy['mean']:.1f}{'' if error is None else f' ± {100 * error:.1f}'} %"


def shown_difference(difference: dict) -> str:
    """+1.2 [+0.3, +2.1], 20 gained, 4 lost"""
    interval = (
        "" if difference["low"] is None else f" [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
    )
    return f"{100 * difference['mean']:+.1f}{interval}, {difference['gained']} gained, {difference['lost']} lost"


def explained(result: dict) -> str:
    """The table with a head that says of what it is, and a note on how to read it."""
    changed = result["changed_by_zero_adapter"]
    notes = [
        f"{result['problems']} problems of `{result['benchmark'] or result['dataset']}`; ± is one standard error, [ ] the "
        "95 % confidence interval of the paired difference. Strict reads the marked answer, as training rewards it; "
        "lenient also what the text calls its answer, or its last number."
    ]
    if result.get("base_model") is not None:
        notes.append(f"The base is `{relative(result['base_model'])}`.")
    if changed is not None:
        notes.append(f"The zero adapter changes {changed} of the base's greedy answers, by rounding alone.")
    return table(result) + "\n" + " ".join(notes) + "\n"


def write_report(folder: Path, result: dict) -> None:
    """Writes results.json and results.md, each whole or not at all."""
    for name, text in (("results.json", json.dumps(result, indent=1) + "\n"), ("results.md", explained(result))):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)


def check_card_can_be_updated(arguments: ScoreArguments) -> None:
    """Raises [`RecipeError`] where `update_card` has no card or no controls to write."""
    if not arguments.update_card:
        return
    if arguments.adapter is None or not Path(arguments.adapter, "adapter_config.json").is_file():
        raise RecipeError(
            f"update_card: adapter={arguments.adapter!r} is no folder here: name the folder of an adapter."
        )
    if not arguments.controls:
        raise RecipeError("update_card with controls: false: a card says what the base does too: leave controls out.")
    if arguments.max_problems is not None:
        raise RecipeError(
            f"update_card with max_problems={arguments.max_problems}: who reads a card takes its results for those of the "
            "whole dataset: leave max_problems out."
        )


def update_card(arguments: ScoreArguments, result: dict, score_options: str) -> None:
    """Puts the result into the card of the adapter's folder, in place of an earlier one on the same problems.

    Raises:
        TinyLoraError: if the card is of other numbers than the adapter's.
    """

    def means(variant: str) -> dict[str, float]:
        decodings = result["variants"][variant].items()
        return {shown_decoding(decoding, result): levels["strict"]["mean"] for decoding, levels in decodings}

    evaluation = Evaluation(
        dataset=relative(cast(str, arguments.dataset)),
        config=arguments.dataset_config,
        split=arguments.dataset_split,
        problems=result["problems"],
        before=means(BASE),
        after=means(ADAPTER),
        score_options=score_options,
        table=explained(result),
    )
    add_evaluation(Path(cast(str, arguments.adapter)), evaluation)
