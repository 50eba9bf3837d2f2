"""card.py: the metadata that the Hub reads, and what a reader needs."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from trl_recipes.card import command_line, relative, write_card


def card(folder: Path, **changes) -> ModelCard:
    values = {
        "name": "qwen-gsm8k-13",
        "base_model": "Qwen/Qwen2.5-7B-Instruct",
        "datasets": ["openai/gsm8k"],
        "eval_dataset": "openai/gsm8k",
        "method": "GRPO",
        "curve": "reward",
        "vector": [0.5, -0.25, 0.0078125],
        "before": {"greedy": 0.4, "sampled": 0.3},
        "after": {"greedy": 0.9123456, "sampled": 0.6},
        "problems": 1319,
        "settings": {"learning rate": "0.01, constant", "seed": 7},
        "command": "python trl_recipes/grpo.py --config some.yaml",
        "try_it": "import peft_tinylora",
        "score_again": "python trl_recipes/score.py --adapter here",
    }
    write_card(folder / "README.md", **values | changes)
    return ModelCard.load(folder / "README.md")


def test_the_metadata_of_a_card_for_the_hub(tmp_path):
    text = card(tmp_path).content
    metadata = yaml.safe_load(text.split("---\n")[1])
    index = metadata.pop("model-index")
    assert metadata == {
        "base_model": "Qwen/Qwen2.5-7B-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": ["openai/gsm8k"],
        "tags": ["base_model:adapter:Qwen/Qwen2.5-7B-Instruct", "tinylora", "peft_tinylora", "trl", "grpo"],
    }
    [result] = index[0]["results"]
    assert result["dataset"] == {"name": "openai/gsm8k", "type": "openai/gsm8k"}
    assert [(metric["name"], metric["value"]) for metric in result["metrics"]] == [
        ("accuracy, greedy", 0.9123),
        ("accuracy, sampled", 0.6),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_local_folders_and_files_stay_out_of_the_metadata(tmp_path):
    base, data = tmp_path / "base", tmp_path / "train.jsonl"
    base.mkdir()
    data.touch()
    local = card(tmp_path, base_model=str(base), datasets=[str(data), "openai/gsm8k"], eval_dataset=str(data))
    assert str(tmp_path) not in local.content
    metadata = yaml.safe_load(local.content.split("---\n")[1])
    assert "base_model" not in metadata and "base_model_relation" not in metadata
    assert metadata["datasets"] == ["openai/gsm8k"]
    assert not any("base_model" in tag for tag in metadata["tags"])
    assert "`base`" in local.text and "`train.jsonl`, `openai/gsm8k`" in local.text


def test_the_body_holds_the_numbers_measured_and_trained(tmp_path):
    text = card(tmp_path).text
    assert "| greedy | 40.0% | 91.2% |" in text
    assert "| sampled | 30.0% | 60.0% |" in text
    assert "+0.500000 -0.250000 +0.007812" in text
    assert "3 trained numbers on top of `Qwen/Qwen2.5-7B-Instruct`" in text
    assert "python trl_recipes/grpo.py --config some.yaml" in text
    assert "| learning rate | 0.01, constant |" in text and "| seed | 7 |" in text
    assert "1319 held-out problems" in text
    assert "python trl_recipes/score.py --adapter here" in text
    assert "Measure it again" not in card(tmp_path, score_again=None).text
    assert "{{" not in text and "{%" not in text


@pytest.mark.parametrize(("size", "expected"), [(1, "1 trained number on"), (100, "There are 100, in `adapter_model")])
def test_one_number_and_many(tmp_path, size, expected):
    assert expected in card(tmp_path, vector=[0.5] * size).text


def test_a_run_that_was_not_scored(tmp_path):
    given = {"before": None, "after": None, "problems": 0, "eval_dataset": None, "score_again": None}
    unscored = card(tmp_path, **given, method="SFT", curve="loss")
    assert "model-index" not in unscored.content
    assert "Nothing: there were no held-out problems." in unscored.text
    assert "`loss_curve.csv`" in unscored.text and "trained with SFT" in unscored.text
    assert "The accuracy is that" not in unscored.text and "None" not in unscored.text
    scored = card(tmp_path).text
    assert "`reward_curve.csv`" in scored and "The accuracy is that" in scored and "Nothing:" not in scored


def test_relative(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert relative(str(tmp_path / "data")) == "data"
    assert relative("openai/gsm8k") == "openai/gsm8k"
    monkeypatch.chdir(tmp_path / "data")
    assert relative(str(tmp_path)) == tmp_path.name


def test_the_command_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr("sys.argv", ["trl_recipes/grpo.py", "--prompt_template", "{question} Think."])
    assert command_line(1) == "python trl_recipes/grpo.py --prompt_template '{question} Think.'"
    assert command_line(4).startswith("accelerate launch --num_processes 4 trl_recipes/grpo.py")
