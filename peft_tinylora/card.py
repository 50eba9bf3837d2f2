"""An adapter's folder, and what a recipe knows of its training -> its model card and evaluation results, for the Hub.

The template, `card_template.md`, lies in this package, because a wheel holds packages only and a recipe that was installed
must be able to write its card too; `model_cards/` links to it. Nothing of a card is written by hand.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

import torch
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from peft import TaskType

from .describe import MOST_SHOWN, Description, describe
from .errors import AdapterFileError, first_line
from .fingerprint import digest_of_tensor
from .published import relative


TEMPLATE = Path(__file__).parent / "card_template.md"
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
FACTS_FILE = ".card.json"
# What metadata of cards raises that are no YAML, or whose YAML is not what the Hub's client expects in them.
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
EMPTY_FIELD = "[More Information Needed]"  # PEFT's card has some thirty of these


@dataclass(frozen=True)
class Training:
    """How an adapter was trained.

    Args:
        method (`str`): "GRPO" or "SFT".
        datasets (`list[str]`): ids and files of the training problems.
        curve (`str`): what `{curve}_curve.csv` and `.png` in the folder show, "reward" or "loss".
        settings (`dict[str, object]`): what was set, shown as a table.
        command (`str`): the command, from [`published.command_line`].
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
        dataset (`str`): id or file of the held-out problems, or in words what they are.
        config, split (`str`, *optional*): of a dataset on the Hub.
        problems (`int`): how many were scored.
        before, after (`dict[str, float]`): accuracy, 0 to 1, by way of decoding: "greedy" and "sampled".
        score_options (`str`, *optional*): options of score.py, besides the adapter, that measure `after` again.
        is_whole (`bool`): whether all problems of the dataset were scored.
        table (`str`, *optional*): in Markdown, in place of the one of `before` and `after`.
    """

    dataset: str
    problems: int
    before: dict[str, float]
    after: dict[str, float]
    config: str | None = None
    split: str | None = None
    score_options: str | None = None
    is_whole: bool = True
    table: str | None = None

    @property
    def problems_from(self) -> tuple[str, str | None, str | None]:
        """Which problems they were; a file has no config and no split."""
        on_hub = is_hub_id(self.dataset)
        return relative(self.dataset), self.config if on_hub else None, self.split if on_hub else None


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

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "HEAD")
    return f"{head} with changes" if head and git("status", "--porcelain", "--", "*.py") else head or None


def hardware() -> str:
    """Names the GPU, or says how many CPU threads were used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Facts:
    """What a card says beyond the adapter's files; kept beside them, so that the card can be made for another place.

    Args:
        training ([`Training`], *optional*): how it was trained; without it the card says that it does not know.
        evaluation ([`Evaluation`], *optional*): what was measured around training.
        more (`list[Evaluation]`): what was measured later, by score.py.
        prompt (`str` or `list[dict]`): for the lines that try it, a text or chat messages.
        max_new_tokens (`int`): for these lines.
        made_on, date, commit, versions: the machine, the day, the commit of this package, and the libraries.
    """

    training: Training | None = None
    evaluation: Evaluation | None = None
    prompt: str | list[dict[str, str]] = "YOUR PROMPT"
    max_new_tokens: int = 100
    more: list[Evaluation] = field(default_factory=list)
    made_on: str = field(default_factory=hardware)
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())
    commit: str | None = field(default_factory=commit)
    versions: dict[str, str] = field(default_factory=versions)


def make_card(
    adapter: Description, place: str, facts: Facts, base: str | None = None, revision: str | None = None
) -> ModelCard:
    """The card of an adapter.

    Args:
        adapter ([`Description`]): the adapter, as saved.
        place (`str`): where it is loaded from, the id of its repository or its folder.
        facts ([`Facts`]): what the files do not say.
        base (`str`, *optional*): Hub id of the base model, in place of the one that its config names.
        revision (`str`, *optional*): branch of the repository, other than main.
    """
    config, training, evaluation = adapter.config, facts.training, facts.evaluation
    base = base or config.base_model_name_or_path
    on_hub = base is not None and is_hub_id(base)
    datasets = [] if training is None else training.datasets
    name = Path(place).resolve().name if Path(place).exists() else place.rpartition("/")[2]
    data = ModelCardData(
        model_name=name,
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag=PIPELINES.get(config.task_type),
        datasets=[dataset for dataset in datasets if is_hub_id(dataset)] or None,
        tags=[
            *([f"base_model:adapter:{base}"] if on_hub else []),
            "transformers",
            "tinylora",
            "peft_tinylora",
            *(["trl", training.method.lower()] if training is not None else []),
        ],
        eval_results=[result for each in evaluations_of(facts) for result in model_index(each)] or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        place=place,
        revision=revision,
        base=base,
        base_shown=relative(base) if base is not None else "a model that its config does not name",
        base_revision=config.revision,
        adapter=adapter,
        most_shown=MOST_SHOWN,
        facts=facts,
        training=training,
        datasets=[relative(dataset) for dataset in datasets],
        evaluation=evaluation,
        relative=relative,
        call=f"{facts.prompt!r}, do_sample=False, max_new_tokens={facts.max_new_tokens}",
        generates=config.task_type == TaskType.CAUSAL_LM,
        loading=LOADING.get(adapter.weights),
        quote=shlex.quote,
    )


def evaluations_of(facts: Facts) -> list[Evaluation]:
    """All that was measured, the latest where the same problems were scored twice."""
    latest = {each.problems_from: each for each in (facts.evaluation, *facts.more) if each is not None}
    return list(latest.values())


def model_index(evaluation: Evaluation) -> list[EvalResult]:
    """The results for the metadata of the card."""
    on_hub = is_hub_id(evaluation.dataset)
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


def eval_result_files(facts: Facts) -> dict[str, str]:
    """The result as the Hub's leaderboards read it: name of the file -> YAML, with a percentage as other entries have.

    Only of greedy decoding on the whole of a dataset of the Hub: a leaderboard does not tell a part from the whole.
    """
    files = {}
    for evaluation in evaluations_of(facts):
        if not (evaluation.is_whole and is_hub_id(evaluation.dataset)):
            continue
        entry = EvalResultEntry(
            dataset_id=evaluation.dataset,
            task_id=evaluation.config or "default",
            value=round(100 * evaluation.after["greedy"], 2),
            date=facts.date,
            notes=f"greedy, split {evaluation.split}, {evaluation.problems} problems, exact match of the marked answer",
        )
        # No id of the Hub holds `--`, so that two measurements never have one name.
        measured = (*evaluation.dataset.split("/"), evaluation.config or "default", evaluation.split or "all")
        name = "--".join(re.sub(r"[^\w.-]", "_", part) for part in measured)
        files[f".eval_results/peft_tinylora_{name}.yaml"] = yaml.safe_dump(
            eval_result_entries_to_yaml([entry]), sort_keys=False
        )
    return files


def write_card(folder: Path, adapter: Description, place: str, facts: Facts) -> ModelCard:
    """Write README.md, and beside it what [`read_facts`] reads; see [`make_card`]."""
    card = make_card(adapter, place, facts)
    kept = {"v": digest_of_tensor(adapter.vectors), "readme": digest(str(card)), "facts": asdict(facts)}
    for name, text in ((FACTS_FILE, json.dumps(kept, indent=1, default=str)), ("README.md", str(card))):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)
    return card


def read_facts(folder: Path, adapter: Description) -> Facts | None:
    """What [`write_card`] kept of a card; `None` where README.md is somebody else's, or was edited since.

    Raises:
        AdapterFileError: if the card is of other numbers than the adapter's.
    """
    readme, path = folder / "README.md", folder / FACTS_FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        fields = kept["facts"]
        training, evaluation = fields.pop("training"), fields.pop("evaluation")
        facts = Facts(
            None if training is None else Training(**_checked(Training, training)),
            None if evaluation is None else Evaluation(**_checked(Evaluation, evaluation)),
            more=[Evaluation(**_checked(Evaluation, each)) for each in fields.pop("more", [])],
            **_checked(Facts, fields),
        )
        for each in evaluations_of(facts):
            if "greedy" not in each.after or not (each.table or each.after.keys() <= each.before.keys()):
                return None
        of_these_numbers = kept["v"] == digest_of_tensor(adapter.vectors)
        is_unchanged = kept["readme"] == digest(readme.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, StrictDataclassError):
        return None
    if is_unchanged and not of_these_numbers:
        raise AdapterFileError(
            f"{readme} is of other numbers than the adapter beside it: the run that wrote those did not finish. Finish "
            f"it, or remove README.md and {FACTS_FILE}, and a card without results is made."
        )
    return facts if is_unchanged else None


def _checked(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """What JSON has for fields of a dataclass; raises [`StrictDataclassError`] where a value is of another type."""
    hints = get_type_hints(kind)
    # mypy knows no TypedDict that is made of what the program finds.
    validate_typed_dict(TypedDict(kind.__name__, {name: hints[name] for name in values}), values)  # type: ignore[operator]
    return values


def read_readme(readme: Path) -> str:
    """The text of a card, nothing where there is none; raises [`AdapterFileError`] where it is no text."""
    try:
        return readme.read_text(encoding="utf-8") if readme.exists() else ""
    except ValueError as error:
        raise AdapterFileError(f"{readme} is no text ({first_line(error)}): mend or remove it.") from error


def add_evaluation(folder: Path, evaluation: Evaluation) -> ModelCard:
    """Put a later measurement into the card of an adapter's folder, in place of an earlier one on the same problems.

    A card that a recipe wrote is made anew with it, and so is one that is missing or PEFT's empty form. In one that
    somebody wrote or edited only the metadata change.

    Raises:
        AdapterFileError: if the card is of other numbers than the adapter's, or its metadata cannot be read.
    """
    readme = folder / "README.md"
    adapter = describe(folder)
    text = read_readme(readme)
    facts = Facts() if not text.strip() or is_empty_form(text) else read_facts(folder, adapter)
    if facts is not None:
        others = [each for each in facts.more if each.problems_from != evaluation.problems_from]
        return write_card(folder, adapter, str(folder), replace(facts, more=[*others, evaluation]))
    try:
        card = ModelCard(text)
    except UNREADABLE as error:
        raise AdapterFileError(
            f"The metadata of {readme} cannot be read ({first_line(error)[:200]}): mend or remove it."
        ) from error
    new, data = model_index(evaluation), card.data
    assert isinstance(data, ModelCardData)
    kept = [old for old in data.eval_results or [] if not any(old.is_equal_except_value(each) for each in new)]
    data.model_name, data.eval_results = data.model_name or folder.name, [*kept, *new]
    temporary = folder / "README.md.tmp"
    temporary.write_text(str(card), encoding="utf-8")
    os.replace(temporary, readme)
    return card


def digest(text: str) -> str:
    """What a text is known again by."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_empty_form(text: str) -> bool:
    """Whether a README is the form that PEFT writes for whoever saves, with everything left to be filled in."""
    return "# Model Card for Model ID" in text and text.count(EMPTY_FIELD) >= 10


def use_lines(card: ModelCard) -> str:
    """The Python of a card of [`make_card`] that loads the adapter and tries it."""
    [lines] = re.findall(r"^## Use$.*?^```python$\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)
    return lines


def is_hub_id(name: str) -> bool:
    """Whether a name may be the id of a repository on the Hub, and is no file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()
