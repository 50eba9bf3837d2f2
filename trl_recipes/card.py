"""The model card of a trained adapter: its metadata, and the template filled with what was measured.

The template, `card_template.md`, lies in this package and not in `model_cards/`, because a wheel holds packages only and
a recipe that was installed must be able to write its card too.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import peft_tinylora


TEMPLATE = Path(__file__).parent / "card_template.md"
LIBRARIES = ("peft", "trl", "transformers", "torch", "accelerate", "datasets")


def write_card(
    path: Path,
    *,
    name: str,
    base_model: str,
    datasets: list[str],
    eval_dataset: str | None,
    method: str,
    curve: str,
    vector: list[float],
    before: dict[str, float] | None,
    after: dict[str, float] | None,
    problems: int,
    settings: dict[str, object],
    command: str,
    try_it: str,
    score_again: str | None,
) -> ModelCard:
    """
    Writes the card of a trained adapter.

    Args:
        path (`Path`): where the card goes, `README.md` of the adapter's folder.
        name (`str`): the adapter's name, its title.
        base_model (`str`): id or folder of the base. A folder stays out of the metadata: the Hub refuses a path.
        datasets (`list[str]`): ids and files of the training problems; the same rule.
        eval_dataset (`str`, *optional*): id or file of the held-out problems.
        method (`str`): "GRPO" or "SFT".
        curve (`str`): what the CSV and PNG of the run show, "reward" or "loss".
        vector (`list[float]`): the trained numbers.
        before, after (`dict[str, float]`, *optional*): held-out accuracy (0 to 1) by way of decoding, "greedy" and
            "sampled". None where there were no held-out problems.
        problems (`int`): held-out problems that were scored.
        settings (`dict[str, object]`): what was set, shown as a table.
        command (`str`): the command that made the adapter.
        try_it (`str`): lines of Python that load the adapter and ask it a problem.
        score_again (`str`, *optional*): the command that measures the accuracy after training again.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card as written.
    """
    on_hub = not Path(base_model).exists()
    data = ModelCardData(
        model_name=name,
        base_model=base_model if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        datasets=[dataset for dataset in datasets if not Path(dataset).exists()] or None,
        tags=[
            *([f"base_model:adapter:{base_model}"] if on_hub else []),
            "tinylora",
            "peft_tinylora",
            "trl",
            method.lower(),
        ],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=eval_dataset if not Path(eval_dataset).exists() else "custom",
                dataset_name=relative(eval_dataset),
                metric_type="accuracy",
                metric_name=f"accuracy, {decoding}",
                metric_value=round(value, 4),
            )
            for decoding, value in (after or {}).items()
        ]
        or None,  # an empty list would be written as an empty model-index
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        base=relative(base_model),
        datasets=[relative(dataset) for dataset in datasets],
        eval_dataset=None if eval_dataset is None else relative(eval_dataset),
        method=method,
        curve=curve,
        vector=vector,
        before=before,
        after=after,
        problems=problems,
        settings=settings,
        command=command,
        try_it=try_it,
        score_again=score_again,
        versions=versions(),
        hardware=hardware(),
        commit=commit(),
        date=datetime.now(UTC).date().isoformat(),
    )
    temporary = path.with_suffix(".tmp")
    card.save(temporary)
    os.replace(temporary, path)
    return card


def relative(name: str) -> str:
    """Returns an id as it is, and a path without the folders above the working directory (or its last part)."""
    path = Path(name)
    if not path.exists():
        return name
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def command_line(processes: int) -> str:
    """Rebuilds the command that started this process, from `sys.argv`."""
    launcher = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
    return f"{launcher} {shlex.join(sys.argv)}"


def versions() -> dict[str, str]:
    """Returns the version of each library that has a part in the result."""
    ours = {"python": platform.python_version(), "peft-tinylora": peft_tinylora.__version__}
    return ours | {library: version(library) for library in LIBRARIES}


def commit() -> str | None:
    """Returns the commit of the checkout that this file lies in; None where it was installed from a wheel."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    return result.stdout.strip() or None if result.returncode == 0 else None


def hardware() -> str:
    """Names the GPU, or says how many CPU threads were used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
