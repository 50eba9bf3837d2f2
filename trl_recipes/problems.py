"""Raw rows -> problems: {"prompt", "answer"}, the two columns that the trainer, the reward and the score read.

Enters: a dataset id, a local file or a mixture; the names of the columns that hold question and answer; a template.
Leaves: a `datasets.Dataset` (or a stream) with "prompt" (a string, or a list of chat messages) and "answer" (the bare
true answer as a string, also where the row holds a whole GSM8K solution).
"""

from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from trl import DatasetMixtureConfig, get_dataset

from trl_recipes.arguments import ProblemArguments, RecipeArguments, RecipeError
from trl_recipes.rewards import gold_answer


QUESTION = "{question}"
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_rows(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Loads the raw rows of a local JSON, JSONL or Parquet file, or of one split of a dataset.

    Args:
        name (`str`):
            A file (told by its ending), or anything that [`~datasets.load_dataset`] takes: a Hub id, a folder.
        config (`str`, *optional*):
            The dataset's configuration, such as `main` for `openai/gsm8k`. A file has none.
        split (`str`, *optional*, defaults to `"train"`):
            The split to read. A file is one split, so this is ignored for it.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.

    Raises:
        RecipeError: if the file, the dataset, its configuration or its split does not exist.
    """
    file_format = FILE_FORMATS.get(Path(name).suffix)
    if file_format is not None:
        if not Path(name).is_file():
            raise RecipeError(f"no dataset file {name!r} (looked from {Path.cwd()}): check the path.")
        return load_dataset(file_format, data_files=name, split="train", streaming=streaming)
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise RecipeError(f"cannot load split {split!r} of dataset {name!r}: {first_line(error)}") from error


def load_train_and_held_out(
    recipe_args: RecipeArguments, mixture_args: DatasetMixtureConfig
) -> tuple[Dataset | IterableDataset, Dataset]:
    """
    Loads the rows to train on and the rows to score on, which are never the same ones.

    Args:
        recipe_args ([`RecipeArguments`]):
            `dataset_name`, its configuration and splits, and `eval_dataset_name`.
        mixture_args ([`~trl.DatasetMixtureConfig`]):
            `datasets`, a mixture, in place of `dataset_name`.

    Raises:
        RecipeError: if there is nothing to train on, nothing to score on, or it cannot be loaded.
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

    if recipe_args.eval_dataset_name is not None:
        return train, load_rows(recipe_args.eval_dataset_name, split=recipe_args.dataset_test_split)
    if held_out is not None:
        return train, held_out
    if mixture_args.datasets or Path(name).suffix in FILE_FORMATS:
        raise RecipeError("no held-out problems: set eval_dataset_name (or test_split_size, for a mixture).")
    return train, load_rows(name, config, recipe_args.dataset_test_split)


def dataset_names(recipe_args: RecipeArguments, mixture_args: DatasetMixtureConfig) -> list[str]:
    """Returns the ids and files that are trained on, for the card."""
    if not mixture_args.datasets:
        return [recipe_args.dataset_name]
    names = []
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
        RecipeError: if a column is missing, or `chat` is asked of a tokenizer without a chat template.
    """
    columns = rows.column_names or list(next(iter(rows)))
    for option, column in [("question_column", arguments.question_column), ("answer_column", arguments.answer_column)]:
        if column not in columns:
            raise RecipeError(f"the dataset has no column {column!r}, only {columns}: set {option} to one of them.")
    if arguments.chat and not has_chat_template:
        raise RecipeError("chat: true needs a tokenizer with a chat template, and this one has none: set chat: false.")

    def to_problem(row: dict) -> dict:
        return {
            "prompt": build_prompt(row["raw_question"], arguments.prompt_template, arguments.chat),
            "answer": gold_answer(row["raw_answer"]),
        }

    # New names, because map keeps the type of a column that keeps its name, and an integer would stay one.
    raw = {arguments.question_column: "raw_question", arguments.answer_column: "raw_answer"}
    return rows.select_columns(list(raw)).rename_columns(raw).map(to_problem, remove_columns=list(raw.values()))


def build_prompt(question: str | list[dict], template: str, chat: bool) -> str | list[dict]:
    """Puts the question into the template and, for a chat model, into a user message; messages stay as they are."""
    if not isinstance(question, str):
        if template != QUESTION:
            raise RecipeError("prompt_template wants questions that are strings, and these are lists of messages.")
        return question
    # Not str.format: templates for MATH hold LaTeX braces.
    text = template.replace(QUESTION, question)
    return [{"role": "user", "content": text}] if chat else text


def first_line(error: Exception) -> str:
    """Returns an error's first line, or its class where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
