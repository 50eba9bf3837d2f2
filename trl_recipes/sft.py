"""Train a TinyLoRA adapter with SFT: any causal LM, any dataset in one of TRL's formats or of questions and answers.

    accelerate launch trl_recipes/sft.py --config trl_recipes/configs/embedded_sft.yaml
    python trl_recipes/sft.py --config ... --learning_rate 0.005 --output_dir outputs/slower

Takes every option of `trl sft` but those of LoRA, and the `tinylora_*` ones. The loss is on the completion only, where
there is one. Held-out problems, questions with checkable answers, are scored before and after.

Leaves in `output_dir`: the adapter (adapter_model.safetensors, adapter_config.json), README.md (the model card),
recipe.yaml (what was set), loss_curve.csv and loss_curve.png. With `push_to_hub: true` and `hub_model_id` they go to the
Hub, as one commit. The last line of stdout is one JSON object with the result.

With `save_steps`, a run that was killed at any point goes on by `resume_from_checkpoint: true`, and ends with the same numbers
(resuming.py). After SIGTERM it finishes its step, saves a checkpoint and exits with status 143 (ending.py).

parse -> data -> model -> trainer -> train -> save -> push
"""

import logging
import os
import time


START = time.time()
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, when huggingface_hub is imported
# bitsandbytes warns at import that an optional CPU kernel is missing, and on 8-bit bases that inputs are cast.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from peft_tinylora.versions import check_libraries_of_recipes  # noqa: E402


check_libraries_of_recipes()

from accelerate import PartialState  # noqa: E402
from trl import DatasetMixtureConfig, ModelConfig, SFTConfig  # noqa: E402

from trl_recipes.arguments import (  # noqa: E402
    Options,
    SFTArguments,
    TinyLoraArguments,
    parse,
    refuse_quantization_options,
    run_script,
)
from trl_recipes.callbacks import LOSS_COLUMNS, LOSS_PROGRESS  # noqa: E402
from trl_recipes.ending import explained  # noqa: E402
from trl_recipes.errors import RecipeError  # noqa: E402
from trl_recipes.held_out import HeldOut  # noqa: E402
from trl_recipes.methods import peft_config_of, refuse_unread_options  # noqa: E402
from trl_recipes.problems import (  # noqa: E402
    NOTHING_TO_EVALUATE,
    held_out_problems,
    load_train_and_held_out,
    to_examples,
)
from trl_recipes.recipe_steps import (  # noqa: E402
    Curve,
    begin,
    conclude,
    curve_callback,
    load_base,
    make_ready,
    save_and_score,
    settings_of_run,
    train,
    write_report,
)
from trl_recipes.resuming import ResumableSFTTrainer  # noqa: E402
from trl_recipes.trainer_setup import hide_known_noise, load_tokenizer  # noqa: E402


ARGUMENT_CLASSES = (SFTArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, TinyLoraArguments)
USAGE = "sft.py --config FILE.yaml [--option value ...]   (--help lists every option)"
CURVE = Curve("SFT", "loss", LOSS_COLUMNS, LOSS_PROGRESS)


def main() -> None:
    """Parses the options and runs the recipe with them."""
    hide_known_noise()
    options: Options[SFTArguments, SFTConfig] = Options(*parse(ARGUMENT_CLASSES, USAGE))
    with explained(options.training):
        run(options)


def run(options: Options[SFTArguments, SFTConfig]) -> None:
    """Runs the recipe, top to bottom."""
    recipe_args, training_args, model_args, mixture_args, tinylora_args = options
    refuse_unread_options(recipe_args, training_args, model_args)
    refuse_quantization_options(model_args)
    hub, recipe = begin(options)

    # --- data
    tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
    train_rows, held_out_rows = load_train_and_held_out(recipe_args, mixture_args)
    has_chat_template = tokenizer.chat_template is not None or training_args.chat_template_path is not None
    text_column = training_args.dataset_text_field
    train_dataset = to_examples(train_rows, recipe_args, text_column, has_chat_template)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        if held_out_rows is None:
            raise RecipeError(NOTHING_TO_EVALUATE)
        eval_dataset = to_examples(held_out_rows, recipe_args, text_column, has_chat_template)
    problems = held_out_problems(held_out_rows, recipe_args, has_chat_template)
    held_out = HeldOut(problems, tokenizer, recipe_args, recipe_args.max_completion_length)

    # --- model
    model = load_base(options)
    peft_config = peft_config_of(recipe_args.method, tinylora_args, model_args, model)

    # --- trainer
    trainer = ResumableSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[curve_callback(CURVE, options)],
    )
    make_ready(trainer, CURVE, options)

    # --- train
    trained = train(trainer, held_out, options)

    # --- save
    save_and_score(trainer, CURVE, held_out, options)
    if not PartialState().is_main_process:
        return
    settings = settings_of_run(options, trainer.state.max_steps, settings_of_sft(training_args))
    report = write_report(CURVE, held_out, settings, options, recipe)

    # --- push
    conclude(CURVE, trained, held_out, report, hub, options, START)


def settings_of_sft(training_args: SFTConfig) -> dict[str, object]:
    """Returns the settings that the card shows, beside those of every recipe."""
    examples = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    return {"examples a step": examples, "most tokens in an example": training_args.max_length}


if __name__ == "__main__":
    run_script(main)
