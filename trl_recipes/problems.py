"""Raw rows -> problems {"prompt", "answer"} to score on, and the rows that each trainer reads.

Enters: a dataset id, a local file or a mixture; the names of the columns that hold question and answer; a template.
Leaves: a `datasets.Dataset` (or a stream) with "prompt" (a string, or a list of chat messages) and
- "answer", the bare true answer as a string, also where the row holds a whole GSM8K solution (`to_problems`);
- for GRPO with the user's own reward functions, all other columns, untouched, for those to read (`to_prompts`);
- for SFT "completion", or rows in one of TRL's own formats as they are (`to_examples`).
"""

import mmap
import re
from pathlib import Path
from typing import cast

from datasets import Dataset, IterableDataset, get_dataset_split_names, load_dataset
from trl import DatasetMixtureConfig, get_dataset

from peft_tinylora.errors import first_line
from trl_recipes.answers import gold_answer
from trl_recipes.arguments import ProblemArguments, RecipeArguments, SFTArguments
from trl_recipes.errors import RecipeError, in_one_line, shown


QUESTION = "{question}"
RAW = "raw_question"  # a name of its own, because map keeps the type of a column that keeps its name
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
HUB_FILE = re.compile(r"hf://datasets/([^/]+/[^/]+)/(.+)")
NULL_ROW = re.compile(rb"^[ \t\r\xef\xbb\xbf]*null", re.MULTILINE)  # after a byte order mark, or a part of one

NOT_SCORED = (
    "no held-out problems, so nothing is scored: set eval_dataset_name to rows with a question_column and an "
    "answer_column"
)
NOTHING_TO_EVALUATE = (
    "eval_strategy needs held-out rows, and there are none: set eval_dataset_name, or eval_strategy: no."
)


def load_rows(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Loads the raw rows of a local JSON, JSONL or Parquet file, or of one split of a dataset.

    Args:
        name (`str`):
            A file (told by its ending), or anything that [`~datasets.load_dataset`] takes: a Hub id, a folder. One file
            of a dataset on the Hub, for one without configurations, is `hf://datasets/OWNER/NAME/PATH`.
        config (`str`, *optional*):
            The dataset's configuration, such as `main` for `openai/gsm8k`. A file has none.
        split (`str`, *optional*, defaults to `"train"`):
            The split to read. A file is one split, so this is ignored for it.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.

    Raises:
        RecipeError: if the file, the dataset, its configuration or its split does not exist, or a file cannot be read.
    """
    hub_file = HUB_FILE.fullmatch(name)
    file_format = FILE_FORMATS.get(Path(name).suffix)
    if file_format is not None and hub_file is None:
        if not Path(name).is_file():
            raise RecipeError(f"no dataset file {shown(name)} (looked from {Path.cwd()}): check the path.")
        try:
            if file_format == "json":
                refuse_null_rows(Path(name))
            rows = load_dataset(file_format, data_files=name, split="train", streaming=streaming)
            if not streaming:
                rows.data.validate(full=True)  # Parquet's texts may be bytes that are no characters
            return rows
        except StopIteration as error:  # what datasets has for an empty file
            raise RecipeError(f"the dataset file {shown(name)} has no rows.") from error
        except Exception as error:  # datasets and pyarrow have many for a file that is damaged
            raise RecipeError(f"the dataset file {shown(name)} cannot be read: {reason_of(error)}") from error
    try:
        if hub_file is not None:
            return load_dataset(hub_file[1], data_files=hub_file[2], split="train", streaming=streaming)
        return load_dataset(name, config, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise RecipeError(f"cannot load split {shown(split)} of dataset {shown(name)}: {first_line(error)}") from error


def refuse_null_rows(path: Path) -> None:
    """
    Raises `ValueError` where a line of a JSON file begins with null, unless the file is one array.

    pyarrow, which reads it for datasets, ends the process by a segmentation fault where null is the first row of a block.
    """
    if path.stat().st_size == 0:  # which cannot be mapped
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
        null = None if re.match(rb"\s*\[", lines) else NULL_ROW.search(lines)
        if null is not None:
            number = lines[: null.end()].count(b"\n") + 1
            raise ValueError(f"line {number} is null and no row: remove it")


def load_train_and_held_out(
    recipe_args: RecipeArguments, mixture_args: DatasetMixtureConfig
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """
    Loads the rows to train on and the rows held out, which are never the same ones; None where there are none.

    Args:
        recipe_args ([`RecipeArguments`]):
            `dataset_name`, its configuration and splits, `eval_dataset_name` and `max_eval_problems`.
        mixture_args ([`~trl.DatasetMixtureConfig`]):
            `datasets`, a mixture, in place of `dataset_name`.

    Raises:
        RecipeError: if there is nothing to train on, or what was named cannot be loaded.
    """
    name, config = recipe_args.dataset_name, recipe_args.dataset_config
    held_out = None
    if mixture_args.datasets:
        try:
            mixture = get_dataset(mixture_args)
        except (FileNotFoundError, ConnectionError, ValueError) as error:
            raise RecipeError(f"cannot load the mixture in datasets: {first_line(error)}") from error
        train, held_out = mixture["train"], mixture.get("test")
    elif name is not None:
        train = load_rows(name, config, recipe_args.dataset_train_split, recipe_args.dataset_streaming)
    else:
        raise RecipeError("no problems to train on: set dataset_name, or datasets for a mixture.")

    split = recipe_args.dataset_test_split
    if recipe_args.eval_dataset_name is not None:
        held_out = load_rows(recipe_args.eval_dataset_name, split=split)
    elif name is not None and not mixture_args.datasets and Path(name).suffix not in FILE_FORMATS:
        # A split that was named must be there; the default one may be missing, as many datasets have no test split.
        if split != RecipeArguments.dataset_test_split or split in get_dataset_split_names(name, config):
            held_out = load_rows(name, config, split)
    if held_out is not None:
        held_out = held_out.take(min(recipe_args.max_eval_problems or len(held_out), len(held_out)))
    return train, held_out


def dataset_names(recipe_args: RecipeArguments, mixture_args: DatasetMixtureConfig) -> list[str]:
    """Returns the ids and files that are trained on, for the card."""
    if not mixture_args.datasets:
        return [cast(str, recipe_args.dataset_name)]  # else nothing was loaded
    names: list[str] = []
    for part in mixture_args.datasets:
        files = part.data_files or part.path
        names += [files] if isinstance(files, str) else files.values() if isinstance(files, dict) else files
    return names


def to_problems(
    rows: Dataset | IterableDataset, arguments: ProblemArguments, has_chat_template: bool
) -> Dataset | IterableDataset:
    """
    Turns raw rows into problems.

    Args:
        rows (`Dataset` or `IterableDataset`):
            Rows with the columns that `arguments` names.
        arguments ([`ProblemArguments`]):
            Column names, template, and whether to make chat messages.
        has_chat_template (`bool`):
            Whether the model's tokenizer has a chat template, which `chat` needs.

    Returns:
        `Dataset` or `IterableDataset`: the columns "prompt" and "answer" only.

    Raises:
        RecipeError: if a column or a value is missing, or `chat` is asked of a tokenizer without a chat template.
    """
    check_columns(rows, question_column=arguments.question_column, answer_column=arguments.answer_column)
    check_chat(arguments, has_chat_template)

    def to_problem(row: dict) -> dict:
        return {
            "prompt": build_prompt(row[RAW], arguments.prompt_template, arguments.chat),
            "answer": gold_answer(row["raw_answer"]),
        }

    raw = {arguments.question_column: RAW, arguments.answer_column: "raw_answer"}  # an integer would stay one
    return rows.select_columns(list(raw)).rename_columns(raw).map(to_problem, remove_columns=list(raw.values()))


def held_out_problems(rows: Dataset | None, arguments: ProblemArguments, has_chat_template: bool) -> Dataset | None:
    """
    Turns held-out rows into problems; None where there is nothing to score: no rows, or no question and answer.

    A column of another name than the default was named by the user and must be there, see [`to_problems`].
    """
    if rows is None:
        return None
    missing = {arguments.question_column, arguments.answer_column} - set(rows.column_names)
    if missing and missing <= {ProblemArguments.question_column, ProblemArguments.answer_column}:
        return None
    return to_problems(rows, arguments, has_chat_template)


def to_prompts(
    rows: Dataset | IterableDataset, arguments: ProblemArguments, has_chat_template: bool
) -> Dataset | IterableDataset:
    """
    Turns raw rows into what GRPO reads with the user's own reward functions.

    Returns:
        `Dataset` or `IterableDataset`: "prompt", made from the question column, and every other column as it was.

    Raises:
        RecipeError: if the question column or a question is missing, or `chat` is asked of a tokenizer without a chat template.
    """
    check_columns(rows, question_column=arguments.question_column)
    check_chat(arguments, has_chat_template)
    question = arguments.question_column
    if question == "prompt":
        rows, question = rows.rename_column("prompt", RAW), RAW
    elif "prompt" in column_names(rows):
        rows = rows.remove_columns("prompt")
    rows = rows.map(lambda row: {"prompt": build_prompt(row[question], arguments.prompt_template, arguments.chat)})
    return rows.remove_columns(RAW) if question == RAW else rows


def to_examples(
    rows: Dataset | IterableDataset, arguments: SFTArguments, text_column: str, has_chat_template: bool
) -> Dataset | IterableDataset:
    """
    Turns raw rows into what SFT reads.

    Args:
        rows (`Dataset` or `IterableDataset`):
            Rows in one of TRL's own formats, or with a column of questions and one to learn from.
        arguments ([`SFTArguments`]):
            Column names, template, and whether to make chat messages.
        text_column (`str`):
            `dataset_text_field` of [`~trl.SFTConfig`].
        has_chat_template (`bool`):
            Whether the model's tokenizer has a chat template, which `chat` needs.

    Returns:
        `Dataset` or `IterableDataset`: the rows as they are, or the columns "prompt" and "completion" only.

    Raises:
        RecipeError: if a column or a value is missing, or `chat` is asked of a tokenizer without a chat template.
    """
    check_chat(arguments, has_chat_template)
    columns = set(column_names(rows))
    question, completion = arguments.question_column, arguments.completion_column
    if completion is None and (question == "prompt" or question not in columns):
        if {"prompt", "completion"} <= columns:
            if arguments.prompt_template == QUESTION and not arguments.chat:
                return rows
            question, completion = "prompt", "completion"
        elif {"messages", "conversations", text_column, "input_ids"} & columns:
            return rows
    if completion is None:
        check_columns(rows, question_column=question, answer_column=arguments.answer_column)
        completion = arguments.answer_column
    else:
        check_columns(rows, question_column=question, completion_column=completion)

    def to_example(row: dict) -> dict:
        prompt = build_prompt(row[RAW], arguments.prompt_template, arguments.chat)
        return {"prompt": prompt, "completion": build_completion(row["raw_completion"], not isinstance(prompt, str))}

    raw = {question: RAW, completion: "raw_completion"}
    return rows.select_columns(list(raw)).rename_columns(raw).map(to_example, remove_columns=list(raw.values()))


def build_prompt(question: str | list[dict], template: str, chat: bool) -> str | list[dict]:
    """Puts the question into the template and, for a chat model, into a user message; messages stay as they are."""
    if not isinstance(question, str):
        if not isinstance(question, list) or not all(isinstance(part, dict) and "role" in part for part in question):
            raise RecipeError(
                f"a question is {shown(question)}, and neither a text nor a list of messages: drop such rows."
            )
        if template != QUESTION:
            raise RecipeError("prompt_template wants questions that are strings, and these are lists of messages.")
        return question
    # Not str.format: templates for MATH hold LaTeX braces.
    text = template.replace(QUESTION, question)
    return [{"role": "user", "content": text}] if chat else text


def build_completion(completion: str | int | float | list[dict], chat: bool) -> str | list[dict]:
    """Returns a completion as text or, after a prompt of chat messages, as the assistant's message."""
    if completion is None:
        raise RecipeError("a completion is missing (None): drop such rows from the dataset.")
    if isinstance(completion, list):
        return completion
    return [{"role": "assistant", "content": str(completion)}] if chat else str(completion)


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """Returns the names of the columns, also of a stream that does not know them before its first row."""
    return rows.column_names or list(next(iter(rows)))


def check_columns(rows: Dataset | IterableDataset, **columns: str) -> None:
    """Raises [`RecipeError`] where a column is missing; the keyword is the option that names it."""
    there = column_names(rows)
    for option, column in columns.items():
        if column not in there:
            raise RecipeError(f"the dataset has no column {shown(column)}, only {there}: set {option} to one of them.")


def check_chat(arguments: ProblemArguments, has_chat_template: bool) -> None:
    """Raises [`RecipeError`] where `chat` is asked of a tokenizer without a chat template."""
    if arguments.chat and not has_chat_template:
        raise RecipeError("chat: true needs a tokenizer with a chat template, and this one has none: set chat: false.")


def reason_of(error: BaseException) -> str:
    """Returns what an error says, in one line; of one that only says that another one occurred, that one's."""
    while error.__cause__ is not None:
        error = error.__cause__
    return in_one_line(error)
