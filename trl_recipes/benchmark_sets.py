r"""The benchmarks that score.py knows by name: where their problems are, and the prompt that the paper gave with them.

What was checked, and what was not: no Hub can be reached from where this was written. The rows of GSM8K were read from a
copy, and the embedded task is here. Of the others, ids, splits and columns are those that public code loads them by
(AIME24's, and the number of OlympiadBench's, also their pages on the Hub); none of the files was read. `College_Math_Test`
is the least certain: its page shows one file of JSON lines, without its columns. Where a copy differs, give it by
`--dataset FILE` and name its columns; a number of problems other than `problems` is reported.

The paper evaluated with the harness of Qwen2.5-Math and the files in it (https://github.com/QwenLM/Qwen2.5-Math,
evaluation/data), which `--dataset` reads too. There OlympiadBench has 675 problems, Minerva's answer is in the box of
`solution`, and 0.3333 passes for 1/3; here it does not. Chat models were given the system prompt "You are a helpful
assistant." as well; here it is the one of the tokenizer's template.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from datasets import Dataset

from trl_recipes.arguments import ProblemArguments
from trl_recipes.errors import RecipeError, shown
from trl_recipes.problems import load_rows
from trl_recipes.score_arguments import ScoreArguments


MARKED = '{question} Let\'s think step by step and output the final answer after "####".'  # verl's for GSM8K
BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."  # 'qwen-boxed'
EMBEDDED = Path(__file__).parent / "embedded" / "data" / "held_out.jsonl"
LOOSE = "of its source"  # a licence that the copy on the Hub does not state


@dataclass(frozen=True)
class Benchmark:
    """Where the problems of a benchmark are, and how they are put.

    Args:
        dataset (`str`): id on the Hub, or file.
        split (`str`): its split.
        question, answer (`str`): its columns. The answer may be a list, of which all are wanted.
        problems (`int`): how many there are.
        max_completion_length (`int`): most tokens in an answer, as the paper trained with.
        licence, source (`str`): of the problems.
        config (`str`, *optional*): the dataset's configuration.
        prompt_template (`str`): what the model reads.
    """

    dataset: str
    split: str
    question: str
    answer: str
    problems: int
    max_completion_length: int
    licence: str
    source: str
    config: str | None = None
    prompt_template: str = BOXED


BENCHMARKS = {
    "gsm8k": Benchmark(
        *("openai/gsm8k", "test", "question", "answer", 1319, 4096, "MIT"),
        source="https://github.com/openai/grade-school-math",
        config="main",
        prompt_template=MARKED,
    ),
    "math500": Benchmark(
        *("HuggingFaceH4/MATH-500", "test", "problem", "answer", 500, 3072, "MIT"),
        source="https://github.com/openai/prm800k",
    ),
    "minerva": Benchmark(
        *("math-ai/minervamath", "test", "question", "answer", 272, 3072, LOOSE),
        source="https://arxiv.org/abs/2206.14858 (MIT OpenCourseWare)",
    ),
    "olympiadbench": Benchmark(
        *("Hothan/OlympiadBench", "train", "question", "final_answer", 674, 3072, "Apache-2.0"),
        source="https://github.com/OpenBMB/OlympiadBench",
        config="OE_TO_maths_en_COMP",
    ),
    "aime24": Benchmark(
        *("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30, 3072, LOOSE),
        source="https://artofproblemsolving.com/wiki/index.php/2024_AIME_I",
    ),
    "amc23": Benchmark(
        *("math-ai/amc23", "test", "question", "answer", 40, 3072, LOOSE),
        source="https://artofproblemsolving.com/wiki/index.php/2023_AMC_12A",
    ),
    "gaokao2023en": Benchmark(
        *("MARIO-Math-Reasoning/Gaokao2023-Math-En", "train", "question", "answer", 385, 3072, LOOSE),
        source="https://arxiv.org/abs/2401.08190",
    ),
    "collegemath": Benchmark(
        *("qq8933/College_Math_Test", "test", "question", "answer", 2818, 3072, LOOSE),
        source="https://arxiv.org/abs/2403.02884",
    ),
    "embedded": Benchmark(
        *(str(EMBEDDED), "train", "prompt", "answer", 1024, 40, "Apache-2.0"),
        source="trl_recipes/embedded",
        prompt_template="{question}",
    ),
}


def fill_in_benchmark(arguments: ScoreArguments) -> None:
    """
    Sets what `arguments.benchmark` says and the user did not: dataset, columns, prompt and longest answer.

    Args:
        arguments ([`ScoreArguments`]):
            Changed in place. With `dataset`, that is read in place of the benchmark's.

    Raises:
        RecipeError: if there is no such benchmark.
    """
    benchmark = BENCHMARKS.get(cast(str, arguments.benchmark))
    if benchmark is None:
        raise RecipeError(f"benchmark={shown(arguments.benchmark)}: there are {', '.join(BENCHMARKS)}.")
    if arguments.dataset is None:
        arguments.dataset, arguments.dataset_config = benchmark.dataset, benchmark.config
        arguments.dataset_split = benchmark.split
    named = {
        "question_column": benchmark.question,
        "answer_column": benchmark.answer,
        "prompt_template": benchmark.prompt_template,
    }
    for name, value in named.items():
        if getattr(arguments, name) == getattr(ProblemArguments, name):
            setattr(arguments, name, value)
    if arguments.max_completion_length is None:
        arguments.max_completion_length = benchmark.max_completion_length


def load_benchmark_rows(arguments: ScoreArguments) -> Dataset:
    """
    Loads the rows of what [`fill_in_benchmark`] named, with an answer of several parts as one.

    Raises:
        RecipeError: if they cannot be loaded, with the way to read a local copy.
    """
    try:
        rows = load_rows(cast(str, arguments.dataset), arguments.dataset_config, arguments.dataset_split)
    except RecipeError as error:
        source = BENCHMARKS[cast(str, arguments.benchmark)].source
        raise RecipeError(f"{error} A copy (source: {source}) is read by dataset=FILE beside benchmark.") from error
    column = arguments.answer_column
    if column not in rows.column_names or not any(isinstance(answer, list) for answer in rows[column]):
        return rows
    joined = [
        ", ".join(str(part).strip().strip("$") for part in (answer if isinstance(answer, list) else [answer]))
        for answer in rows[column]
    ]
    return rows.remove_columns(column).add_column(column, joined)
