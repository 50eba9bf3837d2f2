"""An adapter's folder, and what a recipe knows of its training -> its model card and evaluation results, for the Hub.

The template, `card_template.md`, lies in this package, because a wheel holds packages only and a recipe that was installed
must be able to write its card too; `model_cards/` links to it. Nothing of a card is written by hand.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from peft import TaskType

from .describe import MOST_SHOWN, Description


TEMPLATE = Path(__file__).parent / "card_template.md"
TAG = "peft_tinylora"  # of every card that is made here
LIBRARIES = ("peft-tinylora", "peft", "trl", "transformers", "torch", "accelerate", "datasets", "bitsandbytes")
PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
}
# How transformers is told to load the base in a form that an adapter was trained on.
LOADING = {
    "bnb 4bit nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
    "bnb 4bit fp4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")',
    "bnb 8bit": "BitsAndBytesConfig(load_in_8bit=True)",
}
# Not every token is one: `eos_token`, `max_new_tokens`.
SECRET = re.compile(r"(hub|hf|auth|access|api)_?token$|secret|password|api_?key", re.IGNORECASE)
HIDDEN = "HIDDEN"


@dataclass(frozen=True)
class Training:
    """How an adapter was trained.

    Args:
        method (`str`): "GRPO" or "SFT".
        datasets (`list[str]`): ids and files of the training problems.
        curve (`str`): what `{curve}_curve.csv` and `.png` in the folder show, "reward" or "loss".
        settings (`dict[str, object]`): what was set, shown as a table.
        command (`str`): the command, from [`command_line`].
        has_config_file (`bool`): whether recipe.yaml, the file that the command names, is in the folder.
    """

    method: str
    datasets: list[str]
    curve: str
    settings: dict[str, object]
    command: str
    has_config_file: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What was measured before and after training.

    Args:
        dataset (`str`): id or file of the held-out problems.
        config, split (`str`, *optional*): of a dataset on the Hub.
        problems (`int`): how many were scored.
        before, after (`dict[str, float]`): accuracy, 0 to 1, by way of decoding: "greedy" and "sampled".
        score_again (`str`, *optional*): the command that measures `after` again.
        is_whole (`bool`): whether all problems of the dataset were scored.
        date (`str`): year-month-day.
    """

    dataset: str
    problems: int
    before: dict[str, float]
    after: dict[str, float]
    config: str | None = None
    split: str | None = None
    score_again: str | None = None
    is_whole: bool = True
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())


def make_card(
    adapter: Description,
    place: str,
    training: Training | None = None,
    evaluation: Evaluation | None = None,
    prompt: str | list[dict[str, str]] = "YOUR PROMPT",
    max_new_tokens: int = 100,
) -> ModelCard:
    """The card of an adapter.

    Args:
        adapter ([`Description`]): the adapter, as saved.
        place (`str`): where it is loaded from, the id of its repository or its folder.
        training ([`Training`], *optional*): how it was trained; without it the card says that it does not know.
        evaluation ([`Evaluation`], *optional*): what was measured.
        prompt (`str` or `list[dict]`): for the lines that try it, a text or chat messages.
        max_new_tokens (`int`): for these lines.
    """
    base = adapter.config.base_model_name_or_path
    on_hub = base is not None and not Path(base).exists()
    datasets = [] if training is None else training.datasets
    name = Path(place).name
    call = f"{prompt!r}, do_sample=False, max_new_tokens={max_new_tokens}"
    data = ModelCardData(
        model_name=name,
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag=PIPELINES.get(adapter.config.task_type),
        datasets=[dataset for dataset in datasets if not Path(dataset).exists()] or None,
        tags=[
            *([f"base_model:adapter:{base}"] if on_hub else []),
            "transformers",
            "tinylora",
            TAG,
            *(["trl", training.method.lower()] if training is not None else []),
        ],
        eval_results=None if evaluation is None else model_index(evaluation),
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        place=place,
        base=relative(base) if base is not None else "a model that its config does not name",
        adapter=adapter,
        most_shown=MOST_SHOWN,
        training=training,
        datasets=[relative(dataset) for dataset in datasets],
        evaluation=evaluation,
        eval_dataset=None if evaluation is None else relative(evaluation.dataset),
        call=call,
        generates=adapter.config.task_type == TaskType.CAUSAL_LM,
        loading=LOADING.get(adapter.weights),
        versions=versions(),
        hardware=hardware(),
        commit=commit(),
        date=datetime.now(UTC).date().isoformat(),
    )


def model_index(evaluation: Evaluation) -> list[EvalResult]:
    """The results for the metadata of the card."""
    on_hub = not Path(evaluation.dataset).exists()
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=evaluation.dataset if on_hub else "custom",
            dataset_name=relative(evaluation.dataset),
            dataset_config=evaluation.config if on_hub else None,
            dataset_split=evaluation.split if on_hub else None,
            metric_type="accuracy",
            metric_name=f"accuracy, {decoding}",
            metric_value=round(value, 4),
        )
        for decoding, value in evaluation.after.items()
    ]


def eval_result_files(evaluation: Evaluation) -> dict[str, str]:
    """The results as the Hub's leaderboards read them: name of the file -> YAML, one for each way of decoding.

    Empty where the problems are no dataset of the Hub. Values are percentages, as other entries are.
    """
    if Path(evaluation.dataset).exists():
        return {}
    name = evaluation.dataset.rpartition("/")[2]
    files = {}
    for decoding, value in evaluation.after.items():
        part = "" if evaluation.is_whole else f", the first {evaluation.problems} problems"
        entry = EvalResultEntry(
            dataset_id=evaluation.dataset,
            task_id=evaluation.config or "default",
            value=round(100 * value, 2),
            date=evaluation.date,
            notes=f"{decoding}, split {evaluation.split}, exact match of the marked answer{part}",
        )
        suffix = "" if decoding == "greedy" else f"_{decoding}"
        files[f".eval_results/{name}{suffix}.yaml"] = yaml.safe_dump(
            eval_result_entries_to_yaml([entry]), sort_keys=False
        )
    return files


def write_card(folder: Path, card: ModelCard, evaluation: Evaluation | None) -> None:
    """Write the card as README.md, and the evaluation results beside it; those of an earlier run go."""
    temporary = folder / "README.tmp"
    card.save(temporary)
    os.replace(temporary, folder / "README.md")
    shutil.rmtree(folder / ".eval_results", ignore_errors=True)
    for name, text in ({} if evaluation is None else eval_result_files(evaluation)).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def is_made_here(text: str) -> bool:
    """Whether a README is a card of [`make_card`]."""
    metadata = text.partition("\n---\n")[0]
    return metadata.startswith("---\n") and re.search(rf"^- {TAG}$", metadata, re.MULTILINE) is not None


def is_nobodys(text: str) -> bool:
    """Whether a README is what PEFT and transformers write for whoever saves, with everything left to be filled in."""
    return "[More Information Needed]" in text


def with_place(text: str, place: str) -> str:
    """A card of [`make_card`] for an adapter that has moved: its lines of use load it from `place`."""
    head, use, rest = text.partition("\n## Use\n")
    use_text, rest_head, rest_text = rest.partition("\n## ")
    old = re.search(r"^peft-tinylora export (\S+) ", use_text, re.MULTILINE)
    if old is not None:
        use_text = re.sub(rf"(?<![\w./-]){re.escape(old.group(1))}(?![\w./-])", lambda _: place, use_text)
    return head + use + use_text + rest_head + rest_text


def use_lines(card: ModelCard) -> str:
    """The Python of a card of [`make_card`] that loads the adapter and tries it."""
    return re.search(r"## Use\n.*?```python\n(.*?)```", card.text, re.DOTALL).group(1)


def relative(name: str) -> str:
    """Returns an id as it is, and a path without the folders above the working directory (or its last part)."""
    path = Path(name)
    if not path.exists():
        return name
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def command_line(processes: int) -> str:
    """Rebuilds the command that started this process, from `sys.argv`, without tokens."""
    launcher = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
    shown, hide_next = [], False
    for argument in sys.argv:
        name, equals, _ = argument.partition("=")
        hides = argument.startswith("--") and is_secret(name)
        shown.append(HIDDEN if hide_next and not argument.startswith("--") else argument)
        if hides and equals:
            shown[-1] = f"{name}={HIDDEN}"
        hide_next = hides and not equals
    return f"{launcher} {shlex.join(shown)}"


def is_secret(name: str) -> bool:
    """Whether an option or a variable of this name holds what must not be published."""
    return SECRET.search(name) is not None


def versions() -> dict[str, str]:
    """Returns the version of each library that has a part in the result."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


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
