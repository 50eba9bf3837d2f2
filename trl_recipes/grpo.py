"""Train a TinyLoRA adapter with GRPO: any causal LM, any dataset of questions with checkable answers.

    accelerate launch trl_recipes/grpo.py --config trl_recipes/configs/embedded_grpo.yaml
    python trl_recipes/grpo.py --config ... --learning_rate 0.005 --output_dir outputs/slower

Takes every option of `trl grpo` but those of LoRA, and the `tinylora_*` ones. Without `reward_funcs` the reward is
`exact_match_reward`; with them they read the dataset's columns, as they do there.

Leaves in `output_dir`: the adapter (adapter_model.safetensors, adapter_config.json), README.md (the model card),
recipe.yaml (what was set), reward_curve.csv and reward_curve.png. With `push_to_hub: true` and `hub_model_id` they go to the
Hub, as one commit. The last line of stdout is one JSON object with the result.

With `save_steps`, a run that was killed at any point goes on by `resume_from_checkpoint: true`, and ends with the same numbers
(resuming.py). After SIGTERM it finishes its step, saves a checkpoint and exits with status 143 (ending.py).

parse -> data -> model -> trainer -> train -> save -> push
"""

import logging
import os
import time
from collections.abc import Mapping


START = time.time()
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, when huggingface_hub is imported
# bitsandbytes warns at import that an optional CPU kernel is missing, and on 8-bit bases that inputs are cast.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from peft_tinylora.versions import check_libraries_of_recipes  # noqa: E402


check_libraries_of_recipes()

from accelerate import PartialState  # noqa: E402
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig  # noqa: E402

from trl_recipes.arguments import (  # noqa: E402
    GRPOArguments,
    Options,
    TinyLoraArguments,
    parse,
    refuse_quantization_options,
    run_script,
)
from trl_recipes.callbacks import REWARD_COLUMNS, REWARD_PROGRESS  # noqa: E402
from trl_recipes.ending import explained  # noqa: E402
from trl_recipes.errors import RecipeError  # noqa: E402
from trl_recipes.held_out import HeldOut  # noqa: E402
from trl_recipes.methods import peft_config_of, refuse_unread_options  # noqa: E402
from trl_recipes.problems import (  # noqa: E402
    NOTHING_TO_EVALUATE,
    column_names,
    held_out_problems,
    load_train_and_held_out,
    to_problems,
    to_prompts,
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
from trl_recipes.resuming import ResumableGRPOTrainer  # noqa: E402
from trl_recipes.rewards import check_rewards, load_rewards  # noqa: E402
from trl_recipes.rollouts import make_rollouts, weigh_by_importance  # noqa: E402
from trl_recipes.trainer_setup import (  # noqa: E402
    hide_known_noise,
    load_tokenizer,
    refuse_rounding_options,
)


ARGUMENT_CLASSES = (GRPOArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig, TinyLoraArguments)
USAGE = "grpo.py --config FILE.yaml [--option value ...]   (--help lists every option)"


def main() -> None:
    """Parses the options and runs the recipe with them."""
    hide_known_noise()
    options: Options[GRPOArguments, GRPOConfig] = Options(*parse(ARGUMENT_CLASSES, USAGE))
    with explained(options.training):
        run(options)


def run(options: Options[GRPOArguments, GRPOConfig]) -> None:
    """Runs the recipe, top to bottom."""
    recipe_args, training_args, model_args, mixture_args, tinylora_args = options
    refuse_unread_options(recipe_args, training_args, model_args)
    refuse_quantization_options(model_args, training_args.use_vllm)
    refuse_rounding_options(training_args)
    hub, recipe = begin(options)

    # --- data
    tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
    rewards = load_rewards(recipe_args)
    is_exact_match = list(rewards) == ["exact_match_reward"]
    train_rows, held_out_rows = load_train_and_held_out(recipe_args, mixture_args)
    to_dataset = to_problems if is_exact_match else to_prompts
    has_chat_template = tokenizer.chat_template is not None
    train_dataset = to_dataset(train_rows, recipe_args, has_chat_template)
    check_rewards(rewards, column_names(train_dataset), next(iter(train_dataset))["prompt"])
    eval_dataset = None
    if training_args.eval_strategy != "no":
        if held_out_rows is None:
            raise RecipeError(NOTHING_TO_EVALUATE)
        eval_dataset = to_dataset(held_out_rows, recipe_args, has_chat_template)
    problems = held_out_problems(held_out_rows, recipe_args, has_chat_template)
    held_out = HeldOut(problems, tokenizer, recipe_args, training_args.max_completion_length)

    # --- model
    model = load_base(options)
    peft_config = peft_config_of(recipe_args.method, tinylora_args, model_args, model)

    # --- trainer
    rollouts = make_rollouts(recipe_args, training_args, model_args, tinylora_args)
    curve = Curve("GRPO", "reward", REWARD_COLUMNS, REWARD_PROGRESS, is_share=is_exact_match)
    trainer = ResumableGRPOTrainer(
        model=model,
        reward_funcs=list(rewards.values()),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[curve_callback(curve, options)],
        rollout_func=rollouts,
    )
    make_ready(trainer, curve, options)
    trainer.recipe_settings |= {"rewards": list(rewards), "rollout": recipe_args.rollout}
    if rollouts is not None:
        weigh_by_importance(trainer)
        rollouts.check(trainer)

    # --- train
    trained = train(trainer, held_out, options)

    # --- save
    save_and_score(trainer, curve, held_out, options)
    if not PartialState().is_main_process:
        return
    settings = settings_of_run(options, trainer.state.max_steps, settings_of_grpo(recipe_args, training_args, rewards))
    report = write_report(curve, held_out, settings, options, recipe)
    if report is not None and not any(report[0].numbers):
        print(
            "\nv did not move: no group of completions had unequal rewards. Can the model solve some of these problems, "
            "and does the prompt ask it to mark its answer (#### 72)?"
        )

    # --- push
    conclude(curve, trained, held_out, report, hub, options, START)


def settings_of_grpo(
    recipe_args: GRPOArguments, training_args: GRPOConfig, rewards: Mapping[str, object]
) -> dict[str, object]:
    """Returns the settings that the card shows, beside those of every recipe."""
    return {
        "reward": ", ".join(rewards),
        "completions from": recipe_args.rollout,
        "completions a step": training_args.generation_batch_size,
        "completions a problem": training_args.num_generations,
        "most tokens in a completion": training_args.max_completion_length,
        "temperature": training_args.temperature,
        "KL coefficient (beta)": training_args.beta,
    }


if __name__ == "__main__":
    run_script(main)
