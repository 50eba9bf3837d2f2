"""benchmark_sets.py: each benchmark read from a file with its columns, as the Hub's rows are."""

import json
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id

from trl_recipes.arguments import RecipeError
from trl_recipes.benchmark_sets import BENCHMARKS, fill_in_benchmark, load_benchmark_rows
from trl_recipes.problems import to_problems
from trl_recipes.score_arguments import ScoreArguments


NAMES = "gsm8k math500 minerva olympiadbench aime24 amc23 gaokao2023en collegemath embedded".split()
# A row of each as its dataset has it: with columns beside, and answers of other types.
ROWS = {
    "gsm8k": ({"question": "Q?", "answer": "48 + 24 = <<48+24=72>>72\n#### 72"}, "72"),
    "math500": ({"problem": "Q?", "answer": r"\frac{1}{2}", "solution": r"\boxed{3}", "level": 2}, r"\frac{1}{2}"),
    "minerva": ({"question": "Q?", "answer": "4.5e33"}, "4.5e33"),
    "olympiadbench": ({"question": "Q?", "final_answer": ["$3$", r"$\sqrt{2}$"], "unit": None}, r"3, \sqrt{2}"),
    "aime24": ({"problem": "Q?", "answer": "033", "solution": "long", "year": "2024"}, "033"),
    "amc23": ({"question": "Q?", "answer": 27.0, "url": "https://a"}, "27.0"),
    "gaokao2023en": ({"question": "Q?", "answer": "$(1,2)$"}, "$(1,2)$"),
    "collegemath": ({"question": "Q?", "answer": "$x=2$", "data_topic": "algebra"}, "$x=2$"),
    "embedded": ({"prompt": "Q?", "answer": "7"}, "7"),
}


def problems_of(arguments: ScoreArguments) -> list[dict]:
    fill_in_benchmark(arguments)
    return list(to_problems(load_benchmark_rows(arguments), arguments, has_chat_template=False))


def test_every_benchmark_of_the_paper_is_there() -> None:
    assert list(BENCHMARKS) == NAMES == list(ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_a_local_copy_is_read_by_the_benchmarks_columns_and_prompt(name: str, tmp_path: Path) -> None:
    row, answer = ROWS[name]
    path = tmp_path / "copy.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [problem] = problems_of(ScoreArguments(benchmark=name, dataset=str(path)))
    wanted = {
        "gsm8k": 'Q? Let\'s think step by step and output the final answer after "####".',
        "embedded": "Q?",
    }.get(name, "Q?\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert problem == {"prompt": wanted, "answer": answer}


@pytest.mark.parametrize("name", NAMES)
def test_each_names_a_dataset_its_length_and_where_it_is_from(name: str) -> None:
    benchmark = BENCHMARKS[name]
    if name != "embedded":
        validate_repo_id(benchmark.dataset)
    assert benchmark.problems > 0 and benchmark.licence and benchmark.source
    arguments = ScoreArguments(benchmark=name)
    fill_in_benchmark(arguments)
    assert arguments.dataset == benchmark.dataset and arguments.dataset_split == benchmark.split
    assert arguments.max_completion_length == {"gsm8k": 4096, "embedded": 40}.get(name, 3072)


def test_the_embedded_benchmark_is_whole() -> None:
    problems = problems_of(ScoreArguments(benchmark="embedded"))
    assert len(problems) == BENCHMARKS["embedded"].problems
    assert problems[0]["prompt"].startswith("Problem: ") and problems[0]["answer"].isdigit()


def test_what_the_user_gives_wins_over_the_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "copy.jsonl"
    path.write_text(json.dumps({"q": "Q?", "final": r"thus \boxed{5}"}) + "\n")
    given = {"question_column": "q", "answer_column": "final", "prompt_template": "{question} =", "chat": True}
    arguments = ScoreArguments(benchmark="minerva", dataset=str(path), max_completion_length=9, **given)
    fill_in_benchmark(arguments)
    [problem] = to_problems(load_benchmark_rows(arguments), arguments, has_chat_template=True)
    assert problem == {"prompt": [{"role": "user", "content": "Q? ="}], "answer": "5"}
    assert arguments.max_completion_length == 9


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="benchmark='math': there are gsm8k, math500, .*embedded"):
        fill_in_benchmark(ScoreArguments(benchmark="math"))


def test_what_cannot_be_loaded_says_how_to_read_a_copy(tmp_path: Path) -> None:
    arguments = ScoreArguments(benchmark="aime24", dataset=str(tmp_path / "missing.jsonl"))
    fill_in_benchmark(arguments)
    with pytest.raises(RecipeError, match="no dataset file .* A copy .* is read by dataset=FILE"):
        load_benchmark_rows(arguments)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"samples": -1}, "samples=-1"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_problems": 0}, "max_problems=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        ScoreArguments(**options)
