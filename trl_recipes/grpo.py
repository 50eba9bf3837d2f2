"""Train a TinyLoRA adapter with GRPO: any causal LM, any dataset of questions with checkable answers.

    accelerate launch trl_recipes/grpo.py --config trl_recipes/configs/embedded_grpo.yaml
    python trl_recipes/grpo.py --config ... --learning_rate 0.005 --output_dir outputs/slower

Leaves in `output_dir`: the adapter (adapter_model.safetensors, adapter_config.json), README.md (the model card),
reward_curve.csv and reward_curve.png. The last line of stdout is one JSON object with the result.

parse -> data -> model -> trainer -> train -> save
"""

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path


START = time.time()
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, when huggingface_hub is imported

import transformers  # noqa: E402
from accelerate import PartialState  # noqa: E402
from datasets import Dataset  # noqa: E402
from packaging.version import Version  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import PreTrainedTokenizerBase, ProgressCallback  # noqa: E402
from trl import DatasetMixtureConfig, GRPOConfig, GRPOTrainer, ModelConfig  # noqa: E402

from peft_tinylora import TinyLoraError  # noqa: E402
from trl_recipes.arguments import (  # noqa: E402
    ProblemArguments,
    RecipeArguments,
    RecipeError,
    ScoreArguments,
    TinyLoraArguments,
    parse,
    refuse_lora_options,
)
from trl_recipes.callbacks import RewardCurveCallback, ShortProgressCallback, draw_reward_curve  # noqa: E402
from trl_recipes.card import command_line, write_card  # noqa: E402
from trl_recipes.problems import dataset_names, load_train_and_held_out, to_problems  # noqa: E402
from trl_recipes.rewards import exact_match_reward  # noqa: E402
from trl_recipes.score import score  # noqa: E402
from trl_recipes.trainer_setup import (  # noqa: E402
    count_trained,
    hide_known_noise,
    keep_vector_in_fp32,
    load_model,
    load_tokenizer,
    refuse_rounding_options,
    save_adapter,
    tinylora_config,
    trained_numbers,
)


ARGUMENT_CLASSES = (RecipeArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig, TinyLoraArguments)
MOST_PRINTED = 64  # trained numbers shown in the terminal
USAGE = "grpo.py --config FILE.yaml [--option value ...]   (--help lists every option)"


def main() -> None:
    """Runs the recipe, top to bottom."""
    # --- parse
    hide_known_noise()
    recipe_args, training_args, model_args, mixture_args, tinylora_args = parse(ARGUMENT_CLASSES, USAGE)
    refuse_lora_options(model_args)
    refuse_rounding_options(training_args)
    output_dir = Path(training_args.output_dir)
    say = PartialState().print  # on the main process only
    if (output_dir / "adapter_model.safetensors").exists():
        if not recipe_args.overwrite_output_dir:
            raise RecipeError(
                f"{output_dir} already holds a finished adapter: choose another output_dir, "
                "or set overwrite_output_dir: true."
            )
        say(f"the finished adapter in {output_dir} will be replaced at the end of this run")

    # --- data
    tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
    train_rows, held_out_rows = load_train_and_held_out(recipe_args, mixture_args)
    train_problems = to_problems(train_rows, recipe_args, tokenizer.chat_template is not None)
    held_out = to_problems(held_out_rows, recipe_args, tokenizer.chat_template is not None)
    held_out = held_out.take(min(recipe_args.max_eval_problems or len(held_out), len(held_out)))

    # --- model
    model = load_model(model_args, training_args.trust_remote_code, training_args.model_init_kwargs)
    training_args.model_init_kwargs = None  # used up: TRL warns when it is given a model and these
    tinylora = tinylora_config(tinylora_args)

    # --- trainer
    curve = RewardCurveCallback(output_dir / "reward_curve.csv")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=exact_match_reward,
        args=training_args,
        train_dataset=train_problems,
        eval_dataset=held_out if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=tinylora,
        callbacks=[curve],
    )
    keep_vector_in_fp32(trainer)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgressCallback)

    # --- train
    trained_parameters = count_trained(trainer.model)
    say(f"{model_args.model_name_or_path}: training {trained_parameters} numbers in fp32, {len(held_out)} held out")
    with trainer.model.disable_adapter():
        before = score_both_ways(trainer.model, tokenizer, held_out, recipe_args, training_args)
    say(f"before: greedy {before['greedy']:.1%}, sampled {before['sampled']:.1%}")
    started = time.time()
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    grpo_seconds = time.time() - started

    # --- save
    save_adapter(trainer, output_dir)  # first of all: scoring takes a while, and Ctrl-C must not cost the training
    # Scored outside of mixed precision, as a later process will score it.
    policy = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    after = score_both_ways(policy, tokenizer, held_out, recipe_args, training_args)
    if Version(transformers.__version__) >= Version("5.18"):  # remove when that is the oldest supported
        trainer.end()
    if not PartialState().is_main_process:
        return
    adapter_bytes = (output_dir / "adapter_model.safetensors").stat().st_size
    vector = trained_numbers(policy).tolist()
    question = held_out[0]["prompt"]
    try_it = (
        "import peft_tinylora, transformers\n"
        f'print(transformers.pipeline("text-generation", {str(output_dir)!r})({question!r}, do_sample=False, '
        f'max_new_tokens={training_args.max_completion_length})[0]["generated_text"])'
    )
    score_again = score_command(output_dir, recipe_args, training_args, model_args)
    draw_reward_curve(curve.path, output_dir / "reward_curve.png", f"{output_dir.name}: GRPO reward", before, after)
    names = dataset_names(recipe_args, mixture_args)
    write_card(
        output_dir / "README.md",
        name=output_dir.name,
        base_model=model_args.model_name_or_path,
        datasets=names,
        eval_dataset=recipe_args.eval_dataset_name or names[0],
        method="GRPO",
        vector=vector,
        before=before,
        after=after,
        problems=len(held_out),
        settings=settings_table(recipe_args, training_args, model_args, tinylora_args, trainer.state.max_steps),
        command=command_line(training_args.world_size),
        try_it=try_it,
        score_again=score_again,
    )

    if not any(vector):
        print(
            "\nv did not move: no group of completions had unequal rewards. Can the model solve some of these problems, "
            "and does the prompt ask it to mark its answer (#### 72)?"
        )
    shown = vector[:MOST_PRINTED]
    print(f"\n{len(vector)} trained numbers{':' if shown == vector else f', the first {len(shown)}:'}")
    for start in range(0, len(shown), 7):
        print("  " + " ".join(f"{value:+.5f}" for value in shown[start : start + 7]))
    print(f"\n{'held out':<12}{'before':>8}{'after':>8}")
    for decoding in after:
        print(f"{decoding:<12}{before[decoding]:>8.1%}{after[decoding]:>8.1%}")
    print(
        f"\nsaved in {output_dir}: the adapter ({adapter_bytes} bytes), README.md, reward_curve.csv, reward_curve.png"
    )
    if score_again is not None:
        print(f"score it again: {score_again}")
    print(f"try it:\n\n{try_it}\n")
    result = {
        "trained_parameters": trained_parameters,
        "greedy_before": before["greedy"],
        "greedy_after": after["greedy"],
        "sampled_before": before["sampled"],
        "sampled_after": after["sampled"],
        "problems": len(held_out),
        "grpo_seconds": round(grpo_seconds, 1),
        "total_seconds": round(time.time() - float(os.environ.get("TINYLORA_DEMO_START", START)), 1),
        "adapter_bytes": adapter_bytes,
    }
    print(json.dumps(result), flush=True)


def score_both_ways(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    recipe_args: RecipeArguments,
    training_args: GRPOConfig,
) -> dict[str, float]:
    """Returns the share of problems solved (0 to 1), "greedy" and "sampled" at temperature 1."""
    return {
        decoding: score(
            model,
            tokenizer,
            problems,
            batch_size=recipe_args.score_batch_size,
            max_completion_length=training_args.max_completion_length,
            sampled=decoding == "sampled",
            progress=decoding if PartialState().is_main_process else None,
        ).fraction
        for decoding in ("greedy", "sampled")
    }


def score_command(
    output_dir: Path, recipe_args: RecipeArguments, training_args: GRPOConfig, model_args: ModelConfig
) -> str | None:
    """Returns the command that measures the held-out accuracy of the saved adapter again; None after a mixture."""
    dataset = recipe_args.eval_dataset_name or recipe_args.dataset_name
    if dataset is None:  # the held-out part was split off at random
        return None
    options = {
        "adapter": output_dir,
        "dataset": dataset,
        "dataset_config": None if recipe_args.eval_dataset_name else recipe_args.dataset_config,
        "dataset_split": recipe_args.dataset_test_split,
        "dtype": model_args.dtype,
        "batch_size": recipe_args.score_batch_size,
        "max_completion_length": training_args.max_completion_length,
        "max_problems": recipe_args.max_eval_problems,
        "use_cpu": training_args.use_cpu,
        "sampled": True,
    }
    options |= {f.name: getattr(recipe_args, f.name) for f in fields(ProblemArguments)}
    defaults = {f.name: f.default for f in fields(ScoreArguments)}
    given = [(name, str(value)) for name, value in options.items() if value != defaults.get(name)]
    return "python trl_recipes/score.py " + shlex.join(part for name, value in given for part in (f"--{name}", value))


def settings_table(
    recipe_args: RecipeArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    tinylora_args: TinyLoraArguments,
    steps: int,
) -> dict[str, object]:
    """Returns the settings that the card shows: those of the adapter, and the training ones that change the result."""
    return asdict(tinylora_args) | {
        "dtype of the base": model_args.dtype,
        "learning rate": f"{training_args.learning_rate:g}, {training_args.lr_scheduler_type.value}",
        "steps": steps,
        "completions a step": training_args.generation_batch_size,
        "completions a problem": training_args.num_generations,
        "most tokens in a completion": training_args.max_completion_length,
        "temperature": training_args.temperature,
        "KL coefficient (beta)": training_args.beta,
        "loss": training_args.loss_type,
        "gradient clipping": training_args.max_grad_norm,
        "problems generated at once when scoring": recipe_args.score_batch_size,
        "seed": training_args.seed,
    }


if __name__ == "__main__":
    try:
        main()
    except (RecipeError, TinyLoraError) as error:
        sys.exit(f"error: {error}")
