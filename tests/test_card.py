"""card.py: the metadata that the Hub reads, what a reader needs, and nothing that must not be published."""

import ast
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries

from peft_tinylora import TinyLoraConfig
from peft_tinylora.card import (
    FACTS_FILE,
    LOADING,
    Evaluation,
    Facts,
    Training,
    eval_result_files,
    is_empty_form,
    is_hub_id,
    make_card,
    read_facts,
    use_lines,
    write_card,
)
from peft_tinylora.describe import Description
from peft_tinylora.errors import AdapterFileError
from peft_tinylora.hub import is_of_adapter


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
    score_options="--dataset openai/gsm8k",
)
PLACE = "user/qwen-gsm8k-13"


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


def card(
    adapter: Description | None = None,
    place: str = PLACE,
    base: str | None = None,
    revision: str | None = None,
    **facts,
) -> ModelCard:
    facts = Facts(**{"training": TRAINING, "evaluation": EVALUATION, "date": "2026-11-27"} | facts)
    return ModelCard(str(make_card(adapter or description(), place, facts, base, revision)))


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


def test_the_greedy_result_on_a_whole_dataset_is_a_file_that_the_hubs_parser_reads() -> None:
    [(name, text)] = eval_result_files(Facts(TRAINING, EVALUATION, date="2026-11-27")).items()
    assert name == ".eval_results/peft_tinylora_openai--gsm8k--main--test.yaml"
    [entry] = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value, entry.date) == ("openai/gsm8k", "main", 91.23, "2026-11-27")


def test_datasets_configs_and_splits_have_files_of_their_own() -> None:
    measured = [
        Evaluation(dataset, 500, {"greedy": 0.1}, {"greedy": 0.2}, config, split)
        for dataset, config, split in [
            *[("a/MATH", None, "test"), ("b/MATH", None, "test")],
            *[("a/MATH", "algebra/1", "test"), ("a/MATH", None, "train")],
        ]
    ]
    names = eval_result_files(Facts(more=measured)).keys()
    assert len(names) == 4 and all(is_of_adapter(name) for name in names)


@pytest.mark.parametrize(
    "dataset", ["openai/gsm8k", "a part of the training problems", "data/*.jsonl", "https://a.b/c"]
)
def test_a_part_of_a_dataset_or_no_dataset_of_the_hub_is_in_no_leaderboard(dataset: str) -> None:
    is_whole = dataset != "openai/gsm8k"
    part = Evaluation(dataset, 100, {"greedy": 0.4}, {"greedy": 0.5}, split="test", is_whole=is_whole)
    assert eval_result_files(Facts(evaluation=part)) == {} == eval_result_files(Facts())
    [result] = card(evaluation=part).data.eval_results
    assert result.dataset_type == ("custom" if is_whole else "openai/gsm8k") and result.dataset_name == dataset


def test_later_measurements_stand_beside_the_first_and_replace_one_on_the_same_problems() -> None:
    later = Evaluation("a/math", 500, {"greedy": 0.4}, {"greedy": 0.5}, split="test", table="| mine |")
    again = Evaluation("openai/gsm8k", 1319, {"greedy": 0.4}, {"greedy": 0.95}, "main", "test")
    facts = Facts(evaluation=EVALUATION, more=[later, again])
    made = make_card(description(), PLACE, facts)
    results = {(result.dataset_type, result.metric_name): result.metric_value for result in made.data.eval_results}
    assert results == {("openai/gsm8k", "accuracy, greedy"): 0.95, ("a/math", "accuracy, greedy"): 0.5}
    assert "| mine |" in made.text and "| greedy | 40.0% | 95.0% |" in made.text and "None" not in made.text
    files = eval_result_files(facts)
    values = {name: yaml.safe_load(text)[0]["value"] for name, text in files.items()}
    assert values == {
        ".eval_results/peft_tinylora_openai--gsm8k--main--test.yaml": 95.0,
        ".eval_results/peft_tinylora_a--math--default--test.yaml": 50.0,
    }


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
    assert eval_result_files(Facts(evaluation=evaluation)) == {}


def test_the_body_holds_what_was_measured_and_trained() -> None:
    text = card().text
    assert "| greedy | 40.0% | 91.2% |" in text and "| sampled | 30.0% | 60.0% |" in text
    assert "+0.500000 -0.250000 +0.007812" in text
    assert "3 trained numbers on top of `Qwen/Qwen2.5-7B-Instruct`" in text
    assert "python trl_recipes/grpo.py --config some.yaml" in text and "recipe.yaml" in text
    assert "| learning rate | 0.01, constant |" in text and "| seed | 7 |" in text
    assert "Share of 1319 held-out problems" in text
    assert f"python trl_recipes/score.py --adapter {PLACE} --dataset openai/gsm8k\n" in text
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


@pytest.mark.parametrize("weights", ["float", *LOADING, "hqq"])
@pytest.mark.parametrize("is_compact", [True, False])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS", None])
@pytest.mark.parametrize("revision", [None, "more/steps"])
def test_the_lines_of_use_are_python_and_say_how_the_base_is_loaded(
    weights: str, is_compact: bool, task_type: str | None, revision: str | None
) -> None:
    made = card(description(weights=weights, is_compact=is_compact, task_type=task_type), revision=revision)
    code = use_lines(made)
    compile(code, "card", "exec")
    assert code.startswith("import peft_tinylora") and f'"{PLACE}"' in code
    generates = task_type == "CAUSAL_LM"
    assert (LOADING.get(weights, "never") in code) == (weights in LOADING and generates)
    assert ("must be quantized as it was in training" in made.text) == (weights != "float")
    assert ("stock PEFT refuses" in made.text) == is_compact
    export = f"peft-tinylora export {PLACE} qwen-gsm8k-13-lora --to lora"
    assert (f"{export} --revision more/steps\n" if revision else f"{export}\n") in made.text
    assert ('revision="more/steps"' in code) == (revision is not None)
    assert "score.py" not in made.text if revision else "score.py" in made.text
    assert made.data.pipeline_tag == {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}.get(task_type)


def test_a_base_of_a_revision_is_loaded_at_it() -> None:
    adapter = description()
    adapter.config.revision = "v2"
    code = use_lines(card(adapter))
    compile(code, "card", "exec")
    assert "AutoPeftModelForCausalLM" in code  # which reads it from the config
    assert 'AutoTokenizer.from_pretrained("Qwen/Qwen2.5-7B-Instruct", revision="v2")' in code


AWKWARD = [
    "```python\nx = 1\n```",
    "{{ 7 * 7 }} {% if %}",
    "say \"hi\" and 'bye' \\ ü 🙂",
    [{"role": "user", "content": "```"}],
]


@pytest.mark.parametrize("prompt", AWKWARD, ids=range(len(AWKWARD)))
@pytest.mark.parametrize("place", ["my outputs/x y", "C:\\new\\tmp", 'a"b', "outputs/ü"])
def test_any_prompt_and_any_folder_give_code_that_can_be_pasted(prompt, place: str) -> None:
    made = card(place=place, prompt=prompt)
    code = use_lines(made)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    constants = [
        ast.literal_eval(call.args[0])
        for call in calls
        if call.args and not isinstance(call.args[0], ast.Subscript | ast.Call)
    ]
    assert prompt in constants
    assert place in [arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)]
    [line] = [line for line in made.text.splitlines() if line.startswith("peft-tinylora export")]
    assert shlex.split(line)[2] == place


def test_what_else_is_in_the_file_is_said() -> None:
    text = card(description(others=["model.norm.weight"])).text
    assert "holds 1 other tensor besides: `model.norm.weight`" in text and "adds no knowledge" not in text
    assert "all that `adapter_model.safetensors` (146 bytes) holds" in card().text


def test_settings_do_not_break_their_table() -> None:
    training = Training("GRPO", ["a/b"], "reward", {"tie": {"a": "q|k"}}, "python grpo.py")
    assert "| tie | {'a': 'q\\|k'} |" in card(training=training).text


def written(folder: Path, **facts) -> Description:
    adapter = description(**facts)
    write_card(folder, adapter, str(folder), Facts(TRAINING, EVALUATION, [{"role": "user", "content": "2 + 2?"}], 9))
    return adapter


def test_a_card_can_be_made_again_for_another_place(tmp_path: Path) -> None:
    adapter = written(tmp_path)
    facts = read_facts(tmp_path, adapter)
    assert facts.training == TRAINING and facts.evaluation == EVALUATION and facts.max_new_tokens == 9
    assert str(make_card(adapter, str(tmp_path), facts)) == (tmp_path / "README.md").read_text()
    moved = str(make_card(adapter, "user/y", facts, base="user/base"))
    assert str(tmp_path) not in moved and "base_model: user/base" in moved and "on top of `user/base`" in moved


def test_a_card_that_was_edited_or_is_somebodys_own_is_not_made_again(tmp_path: Path) -> None:
    adapter = written(tmp_path)
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "And more.\n")
    assert read_facts(tmp_path, adapter) is None
    (tmp_path / "README.md").unlink()
    assert read_facts(tmp_path, adapter) is None
    written(tmp_path)
    (tmp_path / FACTS_FILE).write_text('{"facts": 3}')
    assert read_facts(tmp_path, adapter) is None


def test_a_card_of_other_numbers_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(AdapterFileError, match="README.md is of other numbers than the adapter beside it"):
        read_facts(tmp_path, description(numbers=(0.5, -0.25, 0.0)))


def test_which_readme_is_an_empty_form() -> None:
    form = "# Model Card for Model ID\n" + "- **Developed by:** [More Information Needed]\n" * 12
    assert is_empty_form(form)
    assert not is_empty_form("---\nlicense: mit\n---\n# Mine\n[More Information Needed]\n") and not is_empty_form(
        card().content
    )


def test_which_names_may_be_ids() -> None:
    assert all(map(is_hub_id, ("gpt2", "openai/gsm8k", "Qwen/Qwen2.5-7B-Instruct")))
    assert not any(map(is_hub_id, ("data/*.jsonl", "a/b/c", "../a", "/a/b", "https://a.b/c", "a part of it", "tests")))
