"""What GRPO and SFT have in common, as a user runs them."""

import sys

import pytest
from datasets import Dataset
from recipes.runs import in_fork, in_new_process, launch_tiny, logged_v, score_again

from trl_recipes import grpo, sft
from trl_recipes.arguments import RecipeError


RECIPES = {"grpo": grpo, "sft": sft}
pytestmark = pytest.mark.recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_gsm8k_columns_in_parquet_on_a_bf16_base(recipe, tiny_model_dir, sums, tmp_path):
    """Worked solutions in the answer column, in mixed precision: v stays in fp32, the score is that of another process."""
    rows = [{"question": row["prompt"], "answer": f"Adding up.\n#### {row['answer']}"} for row in sums]
    files = tmp_path / "train.parquet", tmp_path / "test.parquet"
    Dataset.from_list(rows[::2]).to_parquet(files[0])
    Dataset.from_list(rows[1::2]).to_parquet(files[1])
    run = launch_tiny(
        *(recipe, tiny_model_dir, tmp_path / "out"),
        *("--dataset_name", str(files[0]), "--eval_dataset_name", str(files[1]), "--question_column", "question"),
        *("--dtype", "bfloat16", "--bf16", "true", "--gradient_checkpointing", "true", "--tinylora_tie", "full"),
        *("--tinylora_n_tie", "none", "--tinylora_u", "3"),
    )
    assert (run.result["trained_parameters"], run.result["problems"]) == (3, 50)
    logged_v(run, 3)
    again = score_again(run)
    assert again["greedy"] == run.result["greedy_after"]
    assert again["sampled"] == run.result["sampled_after"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_finished_adapter_is_not_overwritten_unasked(recipe, monkeypatch, tmp_path, tiny_model_dir):
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"finished")
    options = ("--output_dir", str(tmp_path), "--model_name_or_path", str(tiny_model_dir))
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", "--use_cpu", "true", "--bf16", "false", *options])
    with pytest.raises(RecipeError, match="already holds a finished adapter: .*overwrite_output_dir"):
        RECIPES[recipe].main()
    assert weights.read_bytes() == b"finished"


@pytest.mark.parametrize(
    ("recipe", "start"), [("grpo", lambda *it: in_new_process(sys.executable, *it)), ("sft", in_fork)]
)
def test_a_mistake_in_the_script_is_one_line_without_a_traceback(recipe, start, tmp_path):
    finished = start(f"trl_recipes/{recipe}.py", "--config", str(tmp_path / "nowhere.yaml"))
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: no config file") and len(finished.stderr.splitlines()) == 1
