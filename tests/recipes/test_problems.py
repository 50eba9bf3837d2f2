"""problems.py: raw rows as datasets come, and what is made of them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig

from trl_recipes.arguments import ProblemArguments, RecipeArguments, RecipeError, SFTArguments
from trl_recipes.problems import dataset_names, load_rows, load_train_and_held_out, to_examples, to_problems


GSM8K_ROW = {
    "question": "Natalia sold 48 clips in April, and half as many in May. How many altogether?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72.\n#### 72",
}
GSM8K_TRAIN = Path("/work/shared/data/gsm8k/train.jsonl")
NO_MIXTURE = DatasetMixtureConfig()


def problems(rows: list[dict], has_chat_template: bool = False, **arguments) -> list[dict]:
    return list(to_problems(Dataset.from_list(rows), ProblemArguments(**arguments), has_chat_template))


def test_prompt_and_answer_go_through_and_other_columns_are_dropped():
    rows = [{"prompt": "2 + 2 =", "answer": "4", "topic": "sums"}]
    assert problems(rows) == [{"prompt": "2 + 2 =", "answer": "4"}]


def test_gsm8ks_columns_and_solution_become_a_prompt_and_a_bare_answer():
    assert problems([GSM8K_ROW], question_column="question") == [{"prompt": GSM8K_ROW["question"], "answer": "72"}]


def test_numbers_become_strings():
    rows = [{"prompt": "a", "answer": 72}, {"prompt": "b", "answer": -3}]
    assert [row["answer"] for row in problems(rows)] == ["72", "-3"]


def test_a_boxed_solution_gives_its_answer():
    rows = [{"problem": "1/4 + 1/4", "solution": r"This is $\boxed{\frac{1}{2}}$."}]
    [row] = problems(rows, question_column="problem", answer_column="solution")
    assert row == {"prompt": "1/4 + 1/4", "answer": r"\frac{1}{2}"}


def test_a_template_may_hold_latex_braces():
    [row] = problems([{"prompt": "2 + 2?", "answer": "4"}], prompt_template=r"Q: {question} Put it in \boxed{}.")
    assert row["prompt"] == r"Q: 2 + 2? Put it in \boxed{}."


def test_a_template_without_the_question_is_refused():
    with pytest.raises(RecipeError, match=r"prompt_template must contain \{question\}"):
        ProblemArguments(prompt_template="Solve this.")


def test_chat_makes_a_user_message():
    [row] = problems([{"prompt": "2 + 2?", "answer": "4"}], True, chat=True, prompt_template="{question} Think.")
    assert row["prompt"] == [{"role": "user", "content": "2 + 2? Think."}]


def test_chat_without_a_chat_template_is_refused():
    with pytest.raises(RecipeError, match="chat: true needs a tokenizer with a chat template"):
        problems([{"prompt": "2 + 2?", "answer": "4"}], False, chat=True)


def test_messages_stay_as_they_are():
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 2?"}]
    [row] = problems([{"prompt": messages, "answer": "4"}], True)
    assert row["prompt"] == messages


def test_messages_with_a_template_are_refused():
    rows = [{"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4"}]
    with pytest.raises(RecipeError, match="prompt_template wants questions that are strings"):
        problems(rows, True, prompt_template="{question} Think.")


@pytest.mark.parametrize(
    "row", [{"prompt": None, "answer": "4"}, {"prompt": 5, "answer": "4"}, {"prompt": ["a"], "answer": "4"}]
)
def test_a_question_that_is_none_is_refused(row):
    with pytest.raises(RecipeError, match="a question is .*, and neither a text nor a list of messages: drop such"):
        problems([{"prompt": "2 + 2?", "answer": "4"}, row] if row["prompt"] is None else [row])


def test_a_missing_answer_or_completion_is_refused():
    rows = Dataset.from_list([{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "2 + 3?", "answer": None}])
    with pytest.raises(RecipeError, match="a true answer is missing .*: drop such rows"):
        to_problems(rows, ProblemArguments(), False)
    with pytest.raises(RecipeError, match="a completion is missing .*: drop such rows"):
        to_examples(rows, SFTArguments(completion_column="answer"), "text", False)


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(RecipeError, match=r"no column 'prompt', only \['question', 'answer'\]: set question_column"):
        problems([GSM8K_ROW])
    with pytest.raises(RecipeError, match=r"no column 'solution'.* set answer_column"):
        problems([GSM8K_ROW], question_column="question", answer_column="solution")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_json_jsonl_and_parquet_files_hold_the_same_rows_streamed_or_not(tmp_path, name):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    file = tmp_path / name
    if name.endswith("parquet"):
        Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(load_rows(str(file))) == rows
    streamed = to_problems(load_rows(str(file), streaming=True), ProblemArguments(), False)
    assert list(streamed) == rows


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"null", 1), (b'{"prompt": "a"}\n\n null\n', 3), (b"\xef\xbb\xbfnull\n{}", 1), (b"[1]\nnull", None)],
)
def test_null_for_a_row_is_refused_with_its_line(tmp_path, content, line):
    """Some of these would end the process: pyarrow 26."""
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(
        RecipeError, match=f"cannot be read: line {line} is null and no row" if line else "cannot be read"
    ):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_a_text_in_parquet_that_is_no_utf8_is_refused(tmp_path):
    texts = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xb1")])
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "rows.parquet")
    with pytest.raises(RecipeError, match="rows.parquet' cannot be read: .*UTF8"):
        load_rows(str(tmp_path / "rows.parquet"))


def test_a_missing_file_is_named():
    with pytest.raises(RecipeError, match="no dataset file 'nowhere/rows.jsonl'"):
        load_rows("nowhere/rows.jsonl")


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(RecipeError, match="cannot load split 'train' of dataset") as error:
        load_rows(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


def test_one_file_of_a_dataset_on_the_hub_that_has_no_configurations(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        raise ConnectionError("Couldn't reach the Hub\nRetry")

    monkeypatch.setattr("trl_recipes.problems.load_dataset", load_dataset)
    with pytest.raises(RecipeError, match=r"dataset 'hf://datasets/a/b/hard/train.parquet': Couldn't reach the Hub$"):
        load_rows("hf://datasets/a/b/hard/train.parquet", split="test")
    # A file is one split, which datasets calls train.
    assert asked == [(("a/b",), {"data_files": "hard/train.parquet", "split": "train", "streaming": False})]


def test_training_and_held_out_files(problem_files):
    train_file, held_out_file = map(str, problem_files)
    arguments = RecipeArguments(dataset_name=train_file, eval_dataset_name=held_out_file)
    train, held_out = load_train_and_held_out(arguments, NO_MIXTURE)
    assert (len(train), len(held_out)) == (60, 40)
    assert not set(train["prompt"]) & set(held_out["prompt"])


def test_one_file_alone_is_not_scored_on_its_own_training_problems(problem_files):
    train, held_out = load_train_and_held_out(RecipeArguments(dataset_name=str(problem_files[0])), NO_MIXTURE)
    assert (len(train), held_out) == (60, None)


def test_held_out_problems_that_were_named_must_be_there(problem_files, tmp_path):
    arguments = RecipeArguments(dataset_name=str(problem_files[0]), eval_dataset_name="nowhere.jsonl")
    with pytest.raises(RecipeError, match="no dataset file 'nowhere.jsonl'"):
        load_train_and_held_out(arguments, NO_MIXTURE)
    (tmp_path / "train.jsonl").write_text(problem_files[0].read_text())
    train, held_out = load_train_and_held_out(RecipeArguments(dataset_name=str(tmp_path)), NO_MIXTURE)
    assert (len(train), held_out) == (60, None)  # nobody named the split "test"
    arguments = RecipeArguments(dataset_name=str(tmp_path), dataset_test_split="validation")
    with pytest.raises(RecipeError, match="cannot load split 'validation'"):
        load_train_and_held_out(arguments, NO_MIXTURE)


def test_the_first_so_many_held_out_problems(problem_files):
    train_file, held_out_file = map(str, problem_files)
    for most, expected in ((7, 7), (100, 40), (None, 40)):
        arguments = RecipeArguments(train_file, eval_dataset_name=held_out_file, max_eval_problems=most)
        assert len(load_train_and_held_out(arguments, NO_MIXTURE)[1]) == expected


def test_of_a_folder_with_splits_the_test_split_is_held_out(tmp_path):
    for split, answer in [("train", "1"), ("test", "2")]:
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": split, "answer": answer}) + "\n")
    train, held_out = load_train_and_held_out(RecipeArguments(dataset_name=str(tmp_path)), NO_MIXTURE)
    assert (list(train["prompt"]), list(held_out["prompt"])) == (["train"], ["test"])


def test_a_mixture_splits_off_its_held_out_part(problem_files):
    parts = [{"path": "json", "data_files": str(file)} for file in problem_files]
    mixture = DatasetMixtureConfig(datasets=parts, test_split_size=0.25)
    train, held_out = load_train_and_held_out(RecipeArguments(), mixture)
    assert (len(train), len(held_out)) == (75, 25)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert dataset_names(RecipeArguments(), mixture) == [str(file) for file in problem_files]


def test_of_a_mixture_without_a_test_part_nothing_is_held_out(problem_files):
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(problem_files[0])}])
    assert load_train_and_held_out(RecipeArguments(), mixture)[1] is None


def test_no_dataset_is_refused():
    with pytest.raises(RecipeError, match="no problems to train on: set dataset_name"):
        load_train_and_held_out(RecipeArguments(), NO_MIXTURE)


@pytest.mark.skipif(not GSM8K_TRAIN.exists(), reason=f"needs GSM8K at {GSM8K_TRAIN}")
def test_every_gsm8k_answer_is_a_number():
    rows = to_problems(load_rows(str(GSM8K_TRAIN)), ProblemArguments(question_column="question"), False)
    assert len(rows) == 7473
    assert all(answer.replace(",", "").lstrip("-$").replace(".", "", 1).isdigit() for answer in rows["answer"])
