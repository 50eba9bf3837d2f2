"""card.py: the metadata that the Hub reads, what a reader needs, and nothing that must not be published."""

from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries

from peft_tinylora import TinyLoraConfig
from peft_tinylora.card import (
    LOADING,
    Evaluation,
    Training,
    command_line,
    eval_result_files,
    is_made_here,
    is_nobodys,
    is_secret,
    make_card,
    relative,
    use_lines,
    with_place,
    write_card,
)
from peft_tinylora.describe import Description


TRAINING = Training(
    method="GRPO",
    datasets=["openai/gsm8k"],
    curve="reward",
    settings={"learning rate": "0.01, constant", "seed": 7},
    command="python trl_recipes/grpo.py --config some.yaml",
    has_config_file=True,
)
EVALUATION = Evaluation(
    dataset="openai/gsm8k",
    config="main",
    split="test",
    problems=1319,
    before={"greedy": 0.4, "sampled": 0.3},
    after={"greedy": 0.9123456, "sampled": 0.6},
    score_again="python trl_recipes/score.py --adapter here",
    date="2026-11-27",
)


def description(
    base: str | None = "Qwen/Qwen2.5-7B-Instruct", numbers=(0.5, -0.25, 0.0078125), **fields
) -> Description:
    config = TinyLoraConfig(u=1, tie="tiled", n_tie=16, task_type=fields.pop("task_type", "CAUSAL_LM"))
    config.base_model_name_or_path = base
    values = {
        "config": config,
        "is_compact": True,
        "weights": "float",
        "vectors": torch.tensor(numbers)[:, None],
        "modules": 196,
        "others": [],
        "sizes_bytes": {"adapter_config.json": 1600, "adapter_model.safetensors": 146},
        "basis": "",
    }
    return Description(**values | fields)


def card(adapter: Description | None = None, **changes) -> ModelCard:
    values = {"place": "user/qwen-gsm8k-13", "training": TRAINING, "evaluation": EVALUATION} | changes
    made = make_card(adapter or description(), **values)
    return ModelCard(str(made))


def test_the_metadata_is_what_the_hub_reads() -> None:
    metadata = yaml.safe_load(card().content.split("---\n")[1])
    index = metadata.pop("model-index")
    assert metadata == {
        "base_model": "Qwen/Qwen2.5-7B-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": ["openai/gsm8k"],
        "tags": [
            "base_model:adapter:Qwen/Qwen2.5-7B-Instruct",
            "transformers",
            "tinylora",
            "peft_tinylora",
            "trl",
            "grpo",
        ],
    }
    [result] = index[0]["results"]
    assert result["dataset"] == {"name": "openai/gsm8k", "type": "openai/gsm8k", "config": "main", "split": "test"}
    assert [(metric["name"], metric["value"]) for metric in result["metrics"]] == [
        ("accuracy, greedy", 0.9123),
        ("accuracy, sampled", 0.6),
    ]
    assert card().data.eval_results[0].metric_value == 0.9123


def test_the_results_are_a_file_for_each_way_of_decoding_that_the_hubs_parser_reads() -> None:
    files = eval_result_files(EVALUATION)
    assert list(files) == [".eval_results/gsm8k.yaml", ".eval_results/gsm8k_sampled.yaml"]
    [entry] = parse_eval_result_entries(yaml.safe_load(files[".eval_results/gsm8k.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value, entry.date) == ("openai/gsm8k", "main", 91.23, "2026-11-27")
    assert "first" not in entry.notes
    part = Evaluation("openai/gsm8k", 100, {"greedy": 0.4}, {"greedy": 0.5}, split="test", is_whole=False)
    [entry] = parse_eval_result_entries(yaml.safe_load(eval_result_files(part)[".eval_results/gsm8k.yaml"]))
    assert entry.task_id == "default" and "the first 100 problems" in entry.notes


def test_local_folders_and_files_stay_out_of_the_metadata(tmp_path) -> None:
    base, data = tmp_path / "base", tmp_path / "train.jsonl"
    base.mkdir()
    data.touch()
    training = Training("GRPO", [str(data), "openai/gsm8k"], "reward", {}, "python grpo.py")
    evaluation = Evaluation(str(data), 9, {"greedy": 0.4}, {"greedy": 0.5})
    local = card(description(str(base)), training=training, evaluation=evaluation)
    assert str(tmp_path) not in local.content
    metadata = yaml.safe_load(local.content.split("---\n")[1])
    assert "base_model" not in metadata and "base_model_relation" not in metadata
    assert metadata["datasets"] == ["openai/gsm8k"]
    assert not any("base_model" in tag for tag in metadata["tags"])
    assert "`base`" in local.text and "`train.jsonl`, `openai/gsm8k`" in local.text
    assert eval_result_files(evaluation) == {}


def test_the_body_holds_what_was_measured_and_trained() -> None:
    text = card().text
    assert "| greedy | 40.0% | 91.2% |" in text and "| sampled | 30.0% | 60.0% |" in text
    assert "+0.500000 -0.250000 +0.007812" in text
    assert "3 trained numbers on top of `Qwen/Qwen2.5-7B-Instruct`" in text
    assert "python trl_recipes/grpo.py --config some.yaml" in text and "recipe.yaml" in text
    assert "| learning rate | 0.01, constant |" in text and "| seed | 7 |" in text
    assert "Share of 1319 held-out problems" in text
    assert "python trl_recipes/score.py --adapter here" in text
    assert "196 modules of rank 2 share them: tiled, n_tie=16" in text
    assert "![reward during training](reward_curve.png)" in text
    assert "{{" not in text and "{%" not in text and "None" not in text


@pytest.mark.parametrize("count", [1, 64, 65, 1000])
def test_one_number_and_many(count: int) -> None:
    text = card(description(numbers=[0.5] * count)).text
    assert f"{count} trained number{'' if count == 1 else 's'} on" in text
    assert text.count("+0.500000") == (count if count <= 64 else 0)
    assert (f"There are {count}, in `adapter_model" in text) == (count > 64)


def test_a_run_that_was_not_scored() -> None:
    training = Training("SFT", ["a/b"], "loss", {}, "python sft.py")
    unscored = card(training=training, evaluation=None)
    assert "model-index" not in unscored.content
    assert "Nothing: there were no held-out problems." in unscored.text
    assert "`loss_curve.csv`" in unscored.text and "trained with SFT" in unscored.text
    assert "The accuracy is that" not in unscored.text and "recipe.yaml" not in unscored.text
    assert "The accuracy is that" in card().text


def test_a_card_of_files_alone_does_not_say_what_they_do_not() -> None:
    text = card(training=None, evaluation=None).text
    assert "made from the adapter's files, which do not say" in text
    for word in ("curve", "seed", "GRPO", "held-out"):
        assert word not in text


@pytest.mark.parametrize("weights", [None, *LOADING, "hqq"])
@pytest.mark.parametrize("is_compact", [True, False])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS", None])
def test_the_lines_of_use_are_python_and_say_how_the_base_is_loaded(weights, is_compact: bool, task_type) -> None:
    made = card(description(weights=weights or "float", is_compact=is_compact, task_type=task_type))
    code = use_lines(made)
    compile(code, "card", "exec")
    assert code.startswith("import peft_tinylora") and '"user/qwen-gsm8k-13"' in code
    assert (LOADING.get(weights, "never") in code) == (weights in LOADING and task_type == "CAUSAL_LM")
    assert ("must be quantized as it was in training" in made.text) == (weights is not None)
    assert ("stock PEFT refuses" in made.text) == is_compact
    assert "peft-tinylora export user/qwen-gsm8k-13 qwen-gsm8k-13-lora --to lora" in made.text
    assert made.data.pipeline_tag == {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}.get(task_type)


def test_what_else_was_trained_is_said() -> None:
    assert "1 other tensors" in card(description(others=["model.norm.weight"])).text
    assert "all that `adapter_model.safetensors` (146 bytes) holds" in card().text


def test_the_lines_of_use_follow_the_adapter_to_its_repository_and_nothing_else_changes() -> None:
    local = card(place="outputs/x", training=Training("GRPO", ["a/b"], "reward", {}, "grpo.py --output_dir outputs/x"))
    moved = with_place(local.content, "user/y")
    head, use, rest = (part for part in moved.partition("\n## Use\n"))
    assert "outputs/x" not in rest.partition("\n## ")[0] and rest.partition("\n## ")[0].count("user/y") == 2
    assert "grpo.py --output_dir outputs/x" in moved
    assert with_place(moved, "outputs/x") == local.content
    for place in ("x", "/tmp/a.b/x", "user/x"):
        assert with_place(card(place=place).content, "user/y").count("user/y") == 2
    assert with_place("# Mine\n", "user/y") == "# Mine\n"


def test_whose_card_it_is() -> None:
    assert is_made_here(card().content) and is_made_here(card(training=None, evaluation=None).content)
    assert not is_made_here("# Mine\n\n- peft_tinylora\n---\n")
    assert is_nobodys("Developed by: [More Information Needed]") and not is_nobodys(card().content)


def test_results_of_an_earlier_run_go_with_its_card(tmp_path: Path) -> None:
    write_card(tmp_path, card(), EVALUATION)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".eval_results", "README.md"]
    write_card(tmp_path, card(evaluation=None), None)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_relative(tmp_path, monkeypatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert relative(str(tmp_path / "data")) == "data"
    assert relative("openai/gsm8k") == "openai/gsm8k"
    monkeypatch.chdir(tmp_path / "data")
    assert relative(str(tmp_path)) == tmp_path.name


def test_the_command_can_be_pasted_into_a_shell(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["trl_recipes/grpo.py", "--prompt_template", "{question} Think."])
    assert command_line(1) == "python trl_recipes/grpo.py --prompt_template '{question} Think.'"
    assert command_line(4).startswith("accelerate launch --num_processes 4 trl_recipes/grpo.py")


@pytest.mark.parametrize("given", [["--hub_token", "hf_x"], ["--hub_token=hf_x"], ["--push_to_hub_token", "hf_x"]])
def test_a_token_on_the_command_line_is_hidden(monkeypatch, given: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["grpo.py", *given, "--eos_token", "<end>", "--max_new_tokens", "9"])
    shown = command_line(1)
    assert "hf_x" not in shown and "HIDDEN" in shown and given[0].partition("=")[0] in shown
    assert shown.endswith("--eos_token '<end>' --max_new_tokens 9")


def test_which_names_are_secrets() -> None:
    assert all(map(is_secret, ("hub_token", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "password")))
    assert not any(
        map(is_secret, ("eos_token", "pad_token", "max_new_tokens", "tokenizer", "trainable_token_indices"))
    )
