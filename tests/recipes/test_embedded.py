"""The embedded model and task: it loads back exactly in a new process, and its splits never overlap."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import run_python_process
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trl_recipes.embedded import task


FOLDER = Path(task.__file__).parent
MODEL = FOLDER / "model"
DATA = FOLDER / "data"
FILES = {"grpo": DATA / "grpo_train.jsonl", "held_out": DATA / "held_out.jsonl", "tuning": DATA / "tuning.jsonl"}
PROBE = FILES["held_out"].read_text().splitlines()[:8]

IN_A_NEW_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompts = [json.loads(row)["prompt"] for row in json.loads(sys.argv[2])]
batch = tokenizer(prompts, return_tensors="pt", padding=True)
with torch.no_grad():
    logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
torch.save({"ids": batch["input_ids"], "logits": logits, "class": type(tokenizer).__name__}, sys.argv[3])
"""


def rows_of(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in FILES[split].read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture
def one_thread():
    """The new process computes with one thread; logits agree to the last bit only where this one does too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_new_process_gives_the_same_ids_and_logits(tmp_path, tokenizer, one_thread):
    saved = tmp_path / "probe.pt"
    run_python_process(IN_A_NEW_PROCESS, MODEL, json.dumps(PROBE), saved)
    theirs = torch.load(saved)

    # Built here from the files themselves, without the Auto classes.
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(MODEL)).eval()
    missing = model.load_state_dict(load_file(MODEL / "model.safetensors"), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys  # tied to the embeddings
    batch = tokenizer([json.loads(row)["prompt"] for row in PROBE], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert theirs["class"] == type(tokenizer).__name__
    assert torch.equal(theirs["ids"], batch["input_ids"])
    assert torch.equal(theirs["logits"], logits)


def test_token_ids_are_those_of_the_task(tokenizer):
    """Ids worked out from the task's own pattern, so that a wrong tokenizer class can't pass."""
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *task.vocabulary()]
    for row in rows_of("held_out")[:200]:
        text = row["prompt"] + f" 12 + 3 = 15. #### {row['answer']}"
        wanted = [tokens.index("<bos>"), *(tokens.index(t) for t in re.findall(task.TOKEN_PATTERN, text))]
        assert tokenizer(text)["input_ids"] == wanted
        assert tokenizer.decode(wanted, skip_special_tokens=True) == text
        assert task.answer_of(tokenizer.decode(wanted)) == row["answer"]


def test_special_tokens_are_those_of_the_model_and_padding_is_on_the_left(tokenizer, model):
    assert tokenizer.padding_side == "left"
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    for config in (model.config, model.generation_config):
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id


def test_49_linear_modules_of_7_types_in_7_layers(model):
    linear = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 49
    assert len(model.model.layers) == 7
    kinds = {name.rsplit(".", 1)[1] for name in linear}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert -(-len(linear) // 4) == 13


def test_at_most_8_megabytes():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 8_000_000


def test_rows_fall_in_their_split_and_share_no_prompt():
    grpo, held_out = rows_of("grpo"), rows_of("held_out")
    assert len(held_out) >= 1000
    for split, rows in (("grpo", grpo), ("held_out", held_out)):
        assert {task.split_of(row["prompt"]) for row in rows} == {split}
        assert len({row["prompt"] for row in rows}) == len(rows)
        assert all(set(row) == {"prompt", "answer"} and row["answer"].isdigit() for row in rows)
    assert not {row["prompt"] for row in grpo} & {row["prompt"] for row in held_out}


def test_splits_never_overlap():
    """The numbers of a story, in order, occur in one split only, so neither can the story."""
    numbers = {}
    for split in task.SPLITS:
        rng = random.Random(f"test {split}")
        texts = [task.draw_problem(rng, split).text for _ in range(1500)]
        assert {task.split_of(text) for text in texts} == {split}
        numbers[split] = {tuple(re.findall(r"\d+", text)) for text in texts}
    assert not numbers["pretraining"] & numbers["grpo"]
    assert not numbers["pretraining"] & numbers["held_out"]
    assert not numbers["grpo"] & numbers["held_out"]


def test_pretraining_documents_contain_no_problem_of_the_files():
    files = {tuple(re.findall(r"\d+", row["prompt"])) for split in FILES for row in rows_of(split)}
    rng = random.Random(0)
    for _ in range(5000):
        prompt, _ = task.draw_document(rng, task.HABITS)
        assert tuple(re.findall(r"\d+", prompt)) not in files
        assert task.split_of(prompt) == "pretraining"


def test_files_can_be_drawn_again():
    """Equal to what the pre-training script wrote from its default seed."""
    assert task.draw_rows(random.Random("0 grpo"), "grpo", 50) == rows_of("grpo")[:50]
    assert task.draw_rows(random.Random("0 held_out"), "held_out", 2048) == rows_of("tuning") + rows_of("held_out")


def test_each_habits_solution_has_the_right_or_the_intended_wrong_answer():
    rng = random.Random(3)
    for _ in range(500):
        problem = task.draw_problem(rng, "held_out")
        value = int(re.findall(r"\d+", problem.text)[0])
        for symbol, left, right, result in problem.steps:
            assert left == value
            value = {"+": left + right, "-": left - right, "*": left * right}[symbol]
            assert result == value and 1 <= value <= task.LARGEST
        assert task.answer_of(task.solution_of(problem, "careful", rng)) == str(value)
        assert task.answer_of(task.solution_of(problem, "early", rng)) == str(problem.steps[-2][3])
        assert task.answer_of(task.solution_of(problem, "unmarked", rng)) is None


def test_documents_mix_habits_as_stated():
    """About a third of the documents work every step and mark the answer."""
    rng = random.Random(7)
    documents = [task.draw_document(rng, task.HABITS) for _ in range(6000)]
    sourced = [prompt for prompt, _ in documents if prompt.startswith("Source: ")]
    assert len(sourced) / len(documents) == pytest.approx(task.HABITS.source_share, abs=0.03)
    careful = [c for p, c in documents if c.count("=") == story_steps(p) and "####" in c]
    assert len(careful) / len(documents) == pytest.approx(1 / 3, abs=0.04)


def story_steps(prompt: str) -> int:
    """How many steps a story has: one number less than it holds."""
    return len(re.findall(r"\d+", prompt)) - 1


def test_a_problem_to_solve_names_no_source():
    assert not any("Source" in row["prompt"] for split in FILES for row in rows_of(split))


def test_unknown_split_and_habit_are_refused_by_name():
    with pytest.raises(ValueError, match="split='test'"):
        task.draw_problem(random.Random(0), "test")
    problem = task.draw_problem(random.Random(0), "grpo")
    with pytest.raises(ValueError, match="habit='lazy'"):
        task.solution_of(problem, "lazy", random.Random(0))


def test_generates_without_a_warning(tokenizer, model, caplog):
    batch = tokenizer([json.loads(PROBE[0])["prompt"]], return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 1.0}):
        text = tokenizer.decode(model.generate(**inputs, max_new_tokens=48, **options)[0], skip_special_tokens=True)
        assert text.startswith(json.loads(PROBE[0])["prompt"])
    assert not caplog.records
