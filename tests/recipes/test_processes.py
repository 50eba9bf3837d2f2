"""The recipes in two processes, by each file of accelerate_configs for several GPUs, against one process.

ZeRO-3 runs on a CPU by the file as it is, where DeepSpeed is: `make test-zero3`. DDP does everywhere. FSDP2 runs where
accelerate takes the processes for ones with GPUs; see watched.py.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from peft import PeftConfig, get_peft_model
from recipes.runs import Run, in_fork, in_new_process
from safetensors.torch import load_file
from support import IS_TORCH_2_6, free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_tinylora  # noqa: F401  registers the tuner
from trl_recipes.rewards import exact_match_reward


pytestmark = pytest.mark.recipe
LEARNING_RATE = 0.5  # of SGD, whose step is the gradient itself: Adam's first is its sign
TEMPERATURE = 2.0  # of completions, so that they end in one process sooner than in the other
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
# What the files need in order to run on a CPU: options of the launcher, the device of watched.py, options of the recipe.
ON_A_CPU = {
    "cpu": ((), "given", ()),
    "multi_gpu": (("--mixed_precision", "no"), "given", ()),
    "fsdp2": ((), "cpu-for-gpu", ("--use_cpu", "false")),
    "zero3": ((), "given", ("--use_cpu", "false", "--ddp_backend", "gloo")),
}
WAYS = [
    "multi_gpu",
    pytest.param("fsdp2", marks=pytest.mark.skipif(IS_TORCH_2_6, reason="torch 2.6 has no FSDP2 on a CPU")),
    pytest.param("zero3", marks=pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed: make test-zero3")),
]


@dataclass
class WatchedRun(Run):
    """A run, and what each of its processes knew."""

    processes: tuple[dict, ...] = ()


def in_forks(of_launcher: Sequence[str], script: Sequence[str]) -> list[subprocess.CompletedProcess]:
    """Runs a script in as many processes as accelerate would launch, with what it would tell each of them."""
    options = launch.launch_command_parser().parse_args([*of_launcher, script[0]])
    options = launch._validate_launch_command(options)[0]
    if options.num_processes == 1:
        return [in_fork(*script, more=launch.prepare_simple_launcher_cmd_env(options)[1])]
    told = launch.prepare_multi_gpu_env(options)
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(options.num_processes)}
    ranks = [told | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(options.num_processes)]
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda rank: in_fork(*script, more=rank), ranks))


@pytest.fixture(scope="module")
def launch_recipe(tiny_model_dir, tmp_path_factory) -> Iterator[Callable[..., WatchedRun]]:
    """Runs a recipe by one of the files, options added; see watched.py for what each process leaves."""

    def launch_recipe(way: str, recipe: str, *options: str) -> WatchedRun:
        folder = tmp_path_factory.mktemp(f"{way}_{recipe}")
        of_launcher, device, of_recipe = ON_A_CPU[way]
        of_launcher = (*of_launcher, "--config_file", f"trl_recipes/accelerate_configs/{way}.yaml")
        script = [
            *("tests/recipes/watched.py", str(folder), device, f"trl_recipes/{recipe}.py"),
            *("--config", f"trl_recipes/configs/embedded_{recipe}.yaml", "--output_dir", str(folder / "out")),
            *("--model_name_or_path", str(tiny_model_dir), "--seed", "3"),
            *("--optim", "sgd", "--learning_rate", str(LEARNING_RATE), "--lr_scheduler_type", "constant"),
            *(*of_recipe, *options),
        ]
        # One as a user starts it, and the one that is launched otherwise; the others as forks in the launcher's place.
        if (way, recipe) == ("multi_gpu", "grpo") or way == "zero3":
            launcher = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *of_launcher)
            finished = [in_new_process(*launcher, *script)]
        else:
            finished = in_forks(of_launcher, script)
        assert not any(process.returncode for process in finished), [process.stderr for process in finished]
        processes = tuple(torch.load(file) for file in sorted(folder.glob("rank_*.pt")))
        return WatchedRun(folder / "out", script, finished[0].stdout, finished[0].stderr, processes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield launch_recipe


@pytest.fixture(scope="module")
def solved_files(problem_files, tmp_path_factory) -> tuple[str, str]:
    """60 problems to train on and 39 held out, a number that two processes cannot share evenly, all with completions."""
    folder = tmp_path_factory.mktemp("solved")
    for file, most in zip(problem_files, (60, 39), strict=True):
        rows = [json.loads(line) for line in file.read_text().splitlines()[:most]]
        solved = [row | {"completion": f" #### {row['answer']}"} for row in rows]
        (folder / file.name).write_text("".join(json.dumps(row) + "\n" for row in solved))
    return str(folder / problem_files[0].name), str(folder / problem_files[1].name)


@pytest.fixture(scope="module")
def sft(launch_recipe, solved_files) -> Callable[[str], WatchedRun]:
    """Three steps of SFT, 30 examples each, an epoch being two; evaluated after the second."""

    @cache
    def sft(way: str) -> WatchedRun:
        examples = 30 if way == "cpu" else 15
        return launch_recipe(
            *(way, "sft", "--dataset_name", solved_files[0], "--eval_dataset_name", solved_files[1]),
            *("--per_device_train_batch_size", str(examples), "--max_steps", "3", "--max_completion_length", "6"),
            *("--score_batch_size", "16", "--eval_strategy", "steps", "--eval_steps", "2"),
        )

    return sft


@pytest.fixture(scope="module")
def grpo(launch_recipe, problem_files) -> Callable[[str], WatchedRun]:
    """Three steps of GRPO: three groups of eight, of which the second has completions in both processes. Saved in bf16."""

    @cache
    def grpo(way: str) -> WatchedRun:
        return launch_recipe(
            *(way, "grpo", "--dataset_name", str(problem_files[0]), "--temperature", str(TEMPERATURE)),
            *("--per_device_train_batch_size", "12", "--num_generations", "8", "--max_steps", "3"),
            *("--max_completion_length", "24", "--tinylora_save_dtype", "bfloat16"),
        )

    return grpo


def expected_gradient(
    base_folder: Path, adapter_folder: Path, batches: list[dict], temperature: float
) -> torch.Tensor:
    """Of GRPO's loss at v = 0 over the batches of all processes: each token counts the same. Shape (4,)."""
    config = PeftConfig.from_pretrained(adapter_folder)
    config.inference_mode = False
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    loss = 0.0
    for batch, advantages in zip(batches, expected_advantages(base_folder, batches), strict=True):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        first = batch["prompt_ids"].shape[1]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, first - 1 : -1] / temperature
        log_probabilities = logits.log_softmax(-1).gather(-1, ids[:, first:, None]).squeeze(-1)
        loss -= (log_probabilities * advantages[:, None] * mask[:, first:]).sum()
    (loss / sum(batch["completion_mask"].sum() for batch in batches)).backward()
    return torch.cat([v.grad for v in model.tinylora_v["default"].values()])


def expected_advantages(base_folder: Path, batches: list[dict]) -> tuple[torch.Tensor, ...]:
    """Of each process's completions, from what they say: by how much they are better than their group of eight."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    rewards = []
    for batch in batches:
        prompts = tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        ids = [ids[mask.bool()] for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
        sums = [str(sum(int(number) for number in prompt.split() if number.isdigit())) for prompt in prompts]
        rewards += exact_match_reward(prompts, tokenizer.batch_decode(ids, skip_special_tokens=True), sums)
    groups = torch.tensor(rewards).view(-1, 8)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.flatten().chunk(len(batches))


@pytest.mark.parametrize("recipe", ["sft", "grpo"])
@pytest.mark.parametrize("way", WAYS)
def test_both_processes_and_the_file_have_the_same_v(request, way: str, recipe: str) -> None:
    run = request.getfixturevalue(recipe)(way)
    first, second = (process["v"] for process in run.processes)
    assert len(first) == len(second) == 3
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32
    assert all((v != 0).all() for v in first)
    assert run.processes[0]["kind"] == {"multi_gpu": "Parameter", "fsdp2": "DTensor", "zero3": "Parameter"}[way]
    [saved] = load_file(run.folder / "adapter_model.safetensors").values()
    assert saved.dtype == (torch.bfloat16 if recipe == "grpo" else torch.float32)  # as the two fixtures ask for
    assert torch.equal(saved.flatten(), first[-1].to(saved.dtype))
    logged = [[float(row[f"v_{i}"]) for i in range(4)] for row in run.curve]
    torch.testing.assert_close(torch.tensor(logged), torch.stack(first), rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_sft_in_two_processes_is_that_in_one_with_as_many_examples_a_step(sft, way: str) -> None:
    one, two = sft("cpu"), sft(way)
    [alone] = one.processes
    for expected, v in zip(alone["v"], two.processes[0]["v"], strict=True):
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-6)
    assert one.result["trained_parameters"] == two.result["trained_parameters"] == 4
    for when in ("greedy_before", "sampled_before", "greedy_answers_sha256"):
        assert two.result[when] == one.result[when]


@pytest.mark.parametrize("way", WAYS)
def test_the_first_step_of_grpo_in_two_processes_is_along_the_gradient_of_all_completions(
    grpo, tiny_model_dir, way: str
) -> None:
    run = grpo(way)
    batches = [process["batches"][0] for process in run.processes]
    for batch, advantages in zip(batches, expected_advantages(tiny_model_dir, batches), strict=True):
        torch.testing.assert_close(batch["advantages"], advantages, rtol=1e-4, atol=1e-5)
    gradient = expected_gradient(tiny_model_dir, run.folder, batches, TEMPERATURE)
    assert 1e-2 < gradient.norm() < 1  # else it would have been clipped
    torch.testing.assert_close(run.processes[0]["v"][0], -LEARNING_RATE * gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_processes_whose_completions_end_at_other_times_wait_for_each_other(grpo, way: str) -> None:
    first, second = ([batch["completion_ids"].shape[1] for batch in p["batches"]] for p in grpo(way).processes)
    assert first != second, "the completions are equally long: the test shows nothing"
