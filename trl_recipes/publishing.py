"""What a recipe publishes: where to, what it was set to, what was measured, and the push itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import yaml
from accelerate import PartialState
from transformers.trainer_utils import HubStrategy
from trl import GRPOConfig, ModelConfig, SFTConfig

from peft_tinylora import TinyLoraError
from peft_tinylora.card import Evaluation
from peft_tinylora.hub import Pushed, check_access, push
from peft_tinylora.published import published
from trl_recipes.arguments import RecipeArguments
from trl_recipes.errors import RecipeError, shown
from trl_recipes.trainer_setup import model_name
from trl_recipes.yaml_files import read_yaml


@dataclass(frozen=True)
class HubOptions:
    """Where a finished adapter is pushed to: the arguments of [`peft_tinylora.hub.push`], with the repository's full id on
    the main process, which pushes."""

    repository: str
    revision: str | None
    private: bool | None
    token: str | None
    base: str


def take_hub_options(
    recipe_args: RecipeArguments, training_args: GRPOConfig | SFTConfig, model_args: ModelConfig
) -> HubOptions | None:
    """
    Takes the options of pushing away from the trainer, which would push whatever lies in `output_dir`, time and again; makes
    the repository if there is none.

    Returns:
        [`HubOptions`], or `None` without `push_to_hub`.

    Raises:
        RecipeError: if checkpoints are asked for too, or there is no base model, or nobody else has it.
        ConfigError: if it is no place for an adapter.
        HubError: if the token may not write to it, or the Hub cannot be reached.
    """
    if not training_args.push_to_hub:
        return None
    if HubStrategy(training_args.hub_strategy).value in ("checkpoint", "all_checkpoints"):
        raise RecipeError(
            f"hub_strategy={HubStrategy(training_args.hub_strategy).value!r}: this recipe pushes the finished adapter, once: leave it out."
        )
    name = model_name(model_args)  # now: a run that cannot start leaves no repository
    if recipe_args.hub_base_model is None and Path(name).exists():
        raise RecipeError(
            f"push_to_hub with model_name_or_path={shown(name)}, a folder of this machine: name the "
            "base model's id on the Hub by hub_base_model, or leave push_to_hub out."
        )
    repository = training_args.hub_model_id or Path(cast(str, training_args.output_dir)).name
    if PartialState().is_main_process:
        repository = check_access(
            repository, private=training_args.hub_private_repo, token=training_args.hub_token
        )  # now, not after hours
    options = HubOptions(
        repository=repository,
        revision=training_args.hub_revision,
        private=training_args.hub_private_repo,
        token=training_args.hub_token,
        base=recipe_args.hub_base_model or name,
    )
    training_args.push_to_hub, training_args.hub_token = False, None
    return options


def read_recipe(argv: Sequence[str]) -> object:
    """What the YAML file holds that a command line names by `--config`; `None` where it names none."""
    named = [following for argument, following in zip(argv, argv[1:], strict=False) if argument == "--config"]
    return read_yaml(Path(named[-1]), "config file") if named else None


def write_recipe_file(folder: Path, recipe: object, command: str) -> bool:
    """
    Writes what a run was set to by `--config` to `recipe.yaml`, without tokens and paths of this machine: it may be published.

    Args:
        folder (`Path`):
            The adapter's folder.
        recipe (`object`):
            What [`read_recipe`] returned when the run began: the file may be another by now.
        command (`str`):
            The command line as it is shown, which goes above it.

    Returns:
        `bool`: whether there is one; that of an earlier run is removed if not.
    """
    path = folder / "recipe.yaml"
    if recipe is None:
        path.unlink(missing_ok=True)
        return False
    path.write_text(f"# {command}\n" + yaml.safe_dump(published(recipe), sort_keys=False), encoding="utf-8")
    return True


def evaluation_of(
    recipe_args: RecipeArguments,
    before: dict[str, float] | None,
    after: dict[str, float] | None,
    problems: int,
    score_options: str | None,
) -> Evaluation | None:
    """
    What was measured, for the card; `None` where there were no held-out problems.

    Args:
        recipe_args ([`RecipeArguments`]):
            Which problems they were.
        before, after (`dict[str, float]`, *optional*):
            Accuracy by way of decoding.
        problems (`int`):
            How many were scored.
        score_options (`str`, *optional*):
            Of score.py, to measure it again.
    """
    if before is None or after is None:
        return None
    return Evaluation(
        dataset=recipe_args.eval_dataset_name or recipe_args.dataset_name or "a part of the training problems",
        config=None if recipe_args.eval_dataset_name else recipe_args.dataset_config,
        split=recipe_args.dataset_test_split,
        problems=problems,
        before=before,
        after=after,
        score_options=score_options,
        is_whole=recipe_args.max_eval_problems is None,
    )


def push_result(output_dir: Path, hub: HubOptions) -> tuple[Pushed | None, TinyLoraError | None]:
    """
    Pushes a finished adapter.

    Args:
        output_dir (`Path`):
            The adapter's folder.
        hub ([`HubOptions`]):
            Where to.

    Returns:
        What was pushed, or why it was not: then the run has its result to print before it says so and fails.
    """
    try:
        done = push(
            output_dir, hub.repository, revision=hub.revision, private=hub.private, token=hub.token, base=hub.base
        )
    except TinyLoraError as error:
        return None, error
    print(f"pushed {', '.join(done.files)}: {done.url}")
    return done, None
