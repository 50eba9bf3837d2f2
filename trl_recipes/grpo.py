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

import json
import logging
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path


START = time.time()
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, when huggingface_hub is imported
# bitsandbytes warns at import that an optional CPU kernel is missing, and on 8-bit bases that inputs are cast.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import transformers  # noqa: E402
from accelerate import PartialState  # noqa: E402
from packaging.version import Version  # noqa: E402
from transformers import ProgressCallback  # noqa: E402
from trl import DatasetMixtureConfig, GRPOConfig, GRPOTrainer, ModelConfig  # noqa: E402

from peft_tinylora import TinyLoraError  # noqa: E402
from peft_tinylora.card import Facts, Training, use_lines, write_card  # noqa: E402
from peft_tinylora.describe import describe  # noqa: E402
from peft_tinylora.hub import check_access  # noqa: E402
from peft_tinylora.published import command_line  # noqa: E402
from trl_recipes.arguments import (  # noqa: E402
    GRPOArguments,
    RecipeError,
    TinyLoraArguments,
    parse,
    refuse_quantization_options,
)
from trl_recipes.callbacks import (  # noqa: E402
    REWARD_COLUMNS,
    REWARD_PROGRESS,
    CurveCallback,
    ShortProgressCallback,
    draw_curve,
)
from trl_recipes.ending import explained  # noqa: E402
from trl_recipes.methods import (  # noqa: E402
    finish,
    finished_in,
    peft_config_of,
    prepare,
    refuse_unread_options,
    remarks,
    save,
    trained_dtypes,
    without_adapter,
)
from trl_recipes.problems import (  # noqa: E402
    NOT_SCORED,
    NOTHING_TO_EVALUATE,
    column_names,
    dataset_names,
    held_out_problems,
    load_train_and_held_out,
    to_problems,
    to_prompts,
)
from trl_recipes.publishing import evaluation_of, push_result, take_hub_options, write_recipe_file  # noqa: E402
from trl_recipes.reporting import by_decoding, print_files, print_numbers, print_scores  # noqa: E402
from trl_recipes.resuming import resumable  # noqa: E402
from trl_recipes.rewards import check_rewards, load_rewards  # noqa: E402
from trl_recipes.rollouts import make_rollouts, weigh_by_importance  # noqa: E402
from trl_recipes.score import score_both_ways, score_options  # noqa: E402
from trl_recipes.sharding import (  # noqa: E402
    is_sharded,
    ready_to_generate,
    send_gradients_only,
)
from trl_recipes.trainer_setup import (  # noqa: E402
    count_trained,
    hide_known_noise,
    load_model,
    load_tokenizer,
    quantization_of,
    refuse_rounding_options,
)


ARGUMENT_CLASSES = (GRPOArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig, TinyLoraArguments)
USAGE = "grpo.py --config FILE.yaml [--option value ...]   (--help lists every option)"


def main() -> None:
    """Parses the options and runs the recipe with them."""
    hide_known_noise()
    parsed = parse(ARGUMENT_CLASSES, USAGE)
    with explained(parsed[1]):
        run(*parsed)


def run(
    recipe_args: GRPOArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    mixture_args: DatasetMixtureConfig,
    tinylora_args: TinyLoraArguments,
) -> None:
    """Runs the recipe, top to bottom."""
    refuse_unread_options(recipe_args, training_args, model_args)
    refuse_quantization_options(model_args, training_args.use_vllm)
    refuse_rounding_options(training_args)
    send_gradients_only(training_args)
    output_dir = Path(training_args.output_dir)
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
    hub = take_hub_options(recipe_args, training_args, model_args)
    repository = None
    if hub is not None and PartialState().is_main_process:
        repository = check_access(hub.repository, private=hub.private, token=hub.token)  # now, not after hours

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
    held_out = held_out_problems(held_out_rows, recipe_args, has_chat_template)
    problems = 0 if held_out is None else len(held_out)

    # --- model
    model = load_model(model_args, training_args.trust_remote_code, training_args.model_init_kwargs)
    training_args.model_init_kwargs = None  # used up: TRL warns when it is given a model and these
    peft_config = peft_config_of(recipe_args.method, tinylora_args, model_args, model)

    # --- trainer
    rollouts = make_rollouts(recipe_args, training_args, model_args, tinylora_args)
    curve = CurveCallback(output_dir / "reward_curve.csv", REWARD_COLUMNS)
    trainer = resumable(GRPOTrainer)(
        model=model,
        reward_funcs=list(rewards.values()),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[curve],
        rollout_func=rollouts,
    )
    prepare(trainer, recipe_args.method, tinylora_args.tinylora_dtype)
    if rollouts is not None:
        weigh_by_importance(trainer)
        rollouts.check(trainer)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgressCallback(REWARD_PROGRESS))

    trainer.recipe_settings = {
        "method": recipe_args.method,
        "tinylora_dtype": tinylora_args.tinylora_dtype,
        "rewards": list(rewards),
        "rollout": recipe_args.rollout,
    }
    checkpoint = trainer.checkpoint_to_resume()

    # --- train
    trained_parameters = count_trained(trainer.model)
    dtypes = trained_dtypes(trainer.model)
    say(f"{model_args.model_name_or_path}: training {trained_parameters} numbers in {dtypes}, {problems} held out")
    measure = partial(
        score_both_ways,
        tokenizer=tokenizer,
        problems=held_out,
        recipe_args=recipe_args,
        max_completion_length=training_args.max_completion_length,
    )
    before = None
    if held_out is None:
        say(NOT_SCORED)
    elif not is_sharded(trainer):  # else only once it is on its devices, after training
        with without_adapter(trainer.model):
            before, _ = measure(trainer.model)
        say(f"before: greedy {before['greedy']:.1%}, sampled {before['sampled']:.1%}")
    started = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    grpo_seconds = time.time() - started

    # --- save
    finish(trainer.model, recipe_args.method, tinylora_args.tinylora_save_dtype)
    # Before scoring, which takes a while: Ctrl-C must not cost the training.
    save(trainer, output_dir, load_tokenizer(model_args, training_args.trust_remote_code), keep=curve.path.name)
    with ready_to_generate(trainer) as policy:
        after, answers_sha256 = measure(policy)
        if is_sharded(trainer) and recipe_args.method != "full":
            with without_adapter(policy):
                before, _ = measure(policy)
    if Version(transformers.__version__) >= Version("5.18"):  # remove when that is the oldest supported
        trainer.end()
    if not PartialState().is_main_process:
        return
    score_with = None
    if held_out is not None:
        score_with = score_options(recipe_args, training_args, model_args, training_args.max_completion_length)
    names = dataset_names(recipe_args, mixture_args)
    command = command_line(training_args.world_size)
    has_config_file = write_recipe_file(output_dir, sys.argv, command)
    if recipe_args.method == "tinylora":
        adapter = describe(output_dir)
        question = "YOUR PROMPT" if held_out is None else held_out[0]["prompt"]
        training = Training(
            method="GRPO",
            datasets=names,
            curve="reward",
            settings=settings_table(
                recipe_args, training_args, model_args, tinylora_args, rewards, trainer.state.max_steps
            ),
            command=command,
            has_config_file=has_config_file,
        )
        evaluation = evaluation_of(recipe_args, before, after, problems, score_with)
        facts = Facts(training, evaluation, question, training_args.max_completion_length)
        card = write_card(output_dir, adapter, str(output_dir), facts)
        if not any(adapter.numbers):
            print(
                "\nv did not move: no group of completions had unequal rewards. Can the model solve some of these problems, "
                "and does the prompt ask it to mark its answer (#### 72)?"
            )
        print_numbers(adapter.numbers)
    # The last file of a run: without it, one that was killed goes on (`finished_in`).
    title = f"{output_dir.name}: GRPO reward"
    picture = output_dir / "reward_curve.png"
    draw_curve(curve.path, picture, title, "reward", before, after, is_share=is_exact_match)
    print_scores(before, after)
    has_card = recipe_args.method == "tinylora"
    adapter_bytes = print_files(output_dir, "reward", has_card, score_with)
    if has_card:
        print(f"try it:\n\n{use_lines(card)}")

    # --- push
    pushed = failure = None
    if hub is not None:
        pushed, failure = push_result(output_dir, repository, hub)
    result = {
        "method": recipe_args.method,
        "trained_parameters": trained_parameters,
        **by_decoding(before, after),
        "greedy_answers_sha256": answers_sha256,
        "problems": problems,
        "grpo_seconds": round(grpo_seconds, 1),
        "total_seconds": round(time.time() - float(os.environ.get("TINYLORA_DEMO_START", START)), 1),
        "adapter_bytes": adapter_bytes,
        "pushed": None if pushed is None else pushed.url,
    }
    print(json.dumps(result), flush=True)
    if failure is not None:
        raise failure


def settings_table(
    recipe_args: GRPOArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    tinylora_args: TinyLoraArguments,
    rewards: dict[str, object],
    steps: int,
) -> dict[str, object]:
    """Returns the settings that the card shows: those of the adapter, and the training ones that change the result."""
    return asdict(tinylora_args) | {
        "dtype of the base": model_args.dtype,
        "quantization of the base": quantization_of(model_args),
        "learning rate": f"{training_args.learning_rate:g}, {training_args.lr_scheduler_type.value}",
        "steps": steps,
        "reward": ", ".join(rewards),
        "completions from": recipe_args.rollout,
        "completions a step": training_args.generation_batch_size,
        "completions a problem": training_args.num_generations,
        "most tokens in a completion": training_args.max_completion_length,
        "temperature": training_args.temperature,
        "KL coefficient (beta)": training_args.beta,
        "loss": training_args.loss_type,
        "gradient clipping": training_args.max_grad_norm,
        "problems generated at once when scoring": recipe_args.score_batch_size,
        "processes": training_args.world_size,
        "seed": training_args.seed,
    }


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, TinyLoraError) as error:
        sys.exit(f"error: {error}")
