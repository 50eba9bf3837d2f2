"""The steps that grpo.py and sft.py have in common, in the order in which they come.

What differs between the two, and what a reader of a recipe wants to see, is in the recipes: the options, the data, the
trainer, the settings on the card.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import transformers
from accelerate import PartialState
from huggingface_hub import ModelCard
from packaging.version import Version
from transformers import PreTrainedModel, ProgressCallback

from peft_tinylora.card import Facts, Training, use_lines, write_card
from peft_tinylora.describe import Description, describe
from peft_tinylora.published import command_line
from trl_recipes.arguments import Options
from trl_recipes.callbacks import CurveCallback, ShortProgressCallback, draw_curve
from trl_recipes.errors import RecipeError
from trl_recipes.held_out import HeldOut
from trl_recipes.methods import finish, finished_in, prepare, remarks, save, trained_dtypes
from trl_recipes.problems import dataset_names
from trl_recipes.publishing import (
    HubOptions,
    evaluation_of,
    push_result,
    read_recipe,
    take_hub_options,
    write_recipe_file,
)
from trl_recipes.reporting import by_decoding, print_files, print_numbers, print_scores
from trl_recipes.resuming import ResumableTrainer
from trl_recipes.sharding import send_gradients_only
from trl_recipes.trainer_setup import count_trained, load_model, load_tokenizer, quantization_of


@dataclass(frozen=True)
class Curve:
    """What a recipe draws of its training.

    Args:
        recipe (`str`): "GRPO" or "SFT".
        column (`str`): "reward" or "loss": of the CSV, and in the names of the files.
        columns (`dict[str, str]`): of the CSV; see callbacks.py.
        progress (`dict[str, tuple[str, str]]`): what the terminal shows; see callbacks.py.
        is_share (`bool`): whether the column is a share of correct answers.
    """

    recipe: str
    column: str
    columns: dict[str, str]
    progress: dict[str, tuple[str, str]]
    is_share: bool = False

    @property
    def csv(self) -> str:
        """The name of the file with the numbers."""
        return f"{self.column}_curve.csv"

    @property
    def png(self) -> str:
        """The name of the picture."""
        return f"{self.column}_curve.png"


@dataclass(frozen=True)
class Trained:
    """What is known of a run after training: how many numbers were trained, and in how many seconds."""

    parameters: int
    seconds: float


def begin(options: Options) -> tuple[HubOptions | None, object]:
    """
    Refuses to replace what is finished, says what should be known before the run, and sees that the Hub will take it.

    Returns:
        [`HubOptions`]: where to push to; `None` where nothing is to be pushed.
        `object`: what the YAML file holds, for [`write_report`]; `None` without one.

    Raises:
        RecipeError: if `output_dir` holds a finished adapter or model, or pushing is asked for and cannot be.
        HubError: if the token may not write there, or the Hub cannot be reached: now, and not after hours.
    """
    recipe_args, training_args, model_args, _, tinylora_args = options
    recipe = read_recipe(sys.argv)
    send_gradients_only(training_args)
    output_dir = options.output_dir
    say = PartialState().print  # on the main process only
    finished = finished_in(output_dir, training_args.resume_from_checkpoint)
    if finished is not None:
        if not recipe_args.overwrite_output_dir:
            raise RecipeError(
                f"{output_dir} already holds a finished {finished}: choose another output_dir, "
                "or set overwrite_output_dir: true."
            )
        say(f"the finished {finished} in {output_dir} will be replaced at the end of this run")
    for line in remarks(recipe_args, model_args, tinylora_args):
        say(line)
    return take_hub_options(recipe_args, training_args, model_args), recipe


def load_base(options: Options) -> PreTrainedModel:
    """Loads the base model."""
    training_args = options.training
    # A string on the command line only, which TRL's config reads as JSON.
    more = cast(dict[str, Any] | None, training_args.model_init_kwargs)
    model = load_model(options.model, training_args.trust_remote_code, more)
    training_args.model_init_kwargs = None  # used up: TRL warns when it is given a model and these
    return model


def curve_callback(curve: Curve, options: Options) -> CurveCallback:
    """The callback that writes the curve's CSV into `output_dir`."""
    return CurveCallback(options.output_dir / curve.csv, curve.columns)


def make_ready(trainer: ResumableTrainer, curve: Curve, options: Options) -> None:
    """Does to a new trainer what the method and the terminal need."""
    prepare(trainer, options.recipe.method, options.tinylora.tinylora_dtype)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgressCallback(curve.progress))
    trainer.recipe_settings = {"method": options.recipe.method, "tinylora_dtype": options.tinylora.tinylora_dtype}


def train(trainer: ResumableTrainer, held_out: HeldOut, options: Options) -> Trained:
    """Scores the untrained model and trains, from the checkpoint that the options ask for."""
    checkpoint = trainer.checkpoint_to_resume()
    trained_parameters = count_trained(trainer.model)
    PartialState().print(
        f"{options.model.model_name_or_path}: training {trained_parameters} numbers in {trained_dtypes(trainer.model)}, "
        f"{len(held_out)} held out"
    )
    held_out.score_before(trainer)
    started = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    return Trained(trained_parameters, time.time() - started)


def save_and_score(trainer: ResumableTrainer, curve: Curve, held_out: HeldOut, options: Options) -> None:
    """Saves what was trained and scores it. Every process calls it."""
    training_args = options.training
    finish(trainer.model, options.recipe.method, options.tinylora.tinylora_save_dtype)
    # Before scoring, which takes a while: Ctrl-C must not cost the training.
    tokenizer_of_base = load_tokenizer(options.model, training_args.trust_remote_code)
    save(trainer, options.output_dir, tokenizer_of_base, keep=curve.csv)
    held_out.score_after(trainer)
    if Version(transformers.__version__) >= Version("5.18"):  # remove when that is the oldest supported
        trainer.end()


def settings_of_run(options: Options, steps: int, own: Mapping[str, object]) -> dict[str, object]:
    """Returns the settings that the card shows: those of the adapter, and the training ones that change the result.

    Args:
        options ([`Options`]): what was set.
        steps (`int`): optimizer steps that were taken.
        own (`dict[str, object]`): the recipe's own settings.
    """
    training_args = options.training
    return {
        **asdict(options.tinylora),
        "dtype of the base": options.model.dtype,
        "quantization of the base": quantization_of(options.model),
        "learning rate": f"{training_args.learning_rate:g}, {training_args.lr_scheduler_type.value}",
        "steps": steps,
        **own,
        "loss": training_args.loss_type,
        "gradient clipping": training_args.max_grad_norm,
        "problems generated at once when scoring": options.recipe.score_batch_size,
        "processes": training_args.world_size,
        "seed": training_args.seed,
    }


def write_report(
    curve: Curve, held_out: HeldOut, settings: Mapping[str, object], options: Options, recipe: object
) -> tuple[Description, ModelCard] | None:
    """
    Writes the picture of the curve, recipe.yaml and, of a TinyLoRA, the card.

    Args:
        curve, held_out, options: of the run.
        settings (`dict[str, object]`): what [`settings_of_run`] returned.
        recipe (`object`): what the YAML file held when the run began, as [`begin`] returned it.

    Returns:
        The adapter as it was saved, and its card; `None` of a baseline, which has no card.
    """
    output_dir = options.output_dir
    command = command_line(options.training.world_size)
    has_config_file = write_recipe_file(output_dir, recipe, command)
    report = None
    if options.recipe.method == "tinylora":
        report = _write_tinylora_card(curve, held_out, settings, command, has_config_file, options)
    # The last file of a run: without it, one that was killed goes on (`finished_in`).
    draw_curve(
        output_dir / curve.csv,
        output_dir / curve.png,
        f"{output_dir.name}: {curve.recipe} {curve.column}",
        curve.column,
        held_out.before,
        held_out.after,
        is_share=curve.is_share,
    )
    return report


def _write_tinylora_card(
    curve: Curve,
    held_out: HeldOut,
    settings: Mapping[str, object],
    command: str,
    has_config_file: bool,
    options: Options,
) -> tuple[Description, ModelCard]:
    output_dir = options.output_dir
    training = Training(
        method=curve.recipe,
        datasets=dataset_names(options.recipe, options.mixture),
        curve=curve.column,
        settings=dict(settings),
        command=command,
        has_config_file=has_config_file,
    )
    evaluation = evaluation_of(
        options.recipe, held_out.before, held_out.after, len(held_out), held_out.score_again(options)
    )
    question = "YOUR PROMPT" if held_out.problems is None else held_out.problems[0]["prompt"]
    adapter = describe(output_dir)
    card = write_card(
        output_dir, adapter, str(output_dir), Facts(training, evaluation, question, held_out.max_completion_length)
    )
    return adapter, card


def conclude(
    curve: Curve,
    trained: Trained,
    held_out: HeldOut,
    report: tuple[Description, ModelCard] | None,
    hub: HubOptions | None,
    options: Options,
    start: float,
) -> None:
    """
    Says what came of the run, pushes it, and prints the result, one JSON object, as the last line.

    Args:
        curve, trained, held_out, options: of the run.
        report (`tuple`, *optional*): what [`write_report`] returned.
        hub ([`HubOptions`], *optional*): what [`begin`] returned.
        start (`float`): when the run was started, in seconds since 1970.

    Raises:
        TinyLoraError: if pushing failed: after the result was printed.
    """
    output_dir = options.output_dir
    if report is not None:
        print_numbers(report[0].numbers)
    print_scores(held_out.before, held_out.after)
    adapter_bytes = print_files(output_dir, (curve.csv, curve.png), report is not None, held_out.score_again(options))
    if report is not None:
        print(f"try it:\n\n{use_lines(report[1])}")
    pushed, failure = (None, None) if hub is None else push_result(output_dir, hub)
    result = {
        "method": options.recipe.method,
        "trained_parameters": trained.parameters,
        **by_decoding(held_out.before, held_out.after),
        "greedy_answers_sha256": held_out.answers_sha256,
        "problems": len(held_out),
        f"{curve.recipe.lower()}_seconds": round(trained.seconds, 1),
        "total_seconds": round(time.time() - float(os.environ.get("TINYLORA_DEMO_START", start)), 1),
        "adapter_bytes": adapter_bytes,
        "pushed": None if pushed is None else pushed.url,
    }
    print(json.dumps(result), flush=True)
    if failure is not None:
        raise failure
