"""score.py on a model whose answers are known: the fraction, the decoding, and that nothing else is disturbed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import ModelConfig

from trl_recipes.arguments import RecipeError
from trl_recipes.score import score
from trl_recipes.score_arguments import ScoreArguments
from trl_recipes.variants import refuse_options_of_a_loaded_model


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def greedy_by_hand(model, tokenizer, prompt: str, most_tokens: int) -> str:
    """One problem at a time, no padding, no cache, no `generate`."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = []
    with torch.no_grad():
        for _ in range(most_tokens):
            new.append(model(input_ids=ids, use_cache=False).logits[0, -1].argmax().item())
            if new[-1] == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
    return tokenizer.decode(new, skip_special_tokens=True)


def test_greedy_answers_are_those_of_a_loop_written_by_hand(model, tokenizer, sums):
    some = sums[:30]
    expected = [greedy_by_hand(model.eval(), tokenizer, problem["prompt"], 6) for problem in some]
    result = score(model, tokenizer, some, batch_size=7, max_completion_length=6)
    assert result.completions == expected
    right = [float(text == f"#### {problem['answer']}") for text, problem in zip(expected, some, strict=True)]
    assert result.rewards == right
    assert result.fraction == sum(right) / 30
    assert 0 < result.fraction < 1


def test_prompts_of_different_lengths_are_padded_on_the_left(model, tokenizer):
    some = [{"prompt": "so so so so 3 + 3 =", "answer": "6"}, {"prompt": "3 + 3 =", "answer": "6"}]
    expected = [greedy_by_hand(model.eval(), tokenizer, problem["prompt"], 6) for problem in some]
    assert score(model, tokenizer, some, max_completion_length=6).completions == expected


def test_the_models_own_generation_config_has_no_say(model, tokenizer, sums):
    some = sums[:20]
    plain = score(model, tokenizer, some, max_completion_length=6)
    plain_samples = score(model, tokenizer, some, max_completion_length=6, sampled=True)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=1, top_p=0.1, repetition_penalty=5.0, num_beams=1, max_new_tokens=1
    )
    assert score(model, tokenizer, some, max_completion_length=6) == plain
    assert score(model, tokenizer, some, max_completion_length=6, sampled=True) == plain_samples


def test_every_end_token_ends_an_answer(model, tokenizer, sums):
    some = sums[:20]
    mark = tokenizer.convert_tokens_to_ids("####")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, mark]
    assert not any("####" in text for text in score(model, tokenizer, some, max_completion_length=6).completions)


def test_samples_repeat_with_the_seed_and_leave_the_random_state_alone(model, tokenizer, sums):
    some = sums
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = score(model, tokenizer, some, max_completion_length=6, sampled=True)
    assert torch.equal(torch.rand(3), expected)
    assert score(model, tokenizer, some, max_completion_length=6, sampled=True).completions == first.completions
    other = score(model, tokenizer, some, max_completion_length=6, sampled=True, seed=1)
    assert other.completions != first.completions


def test_sampling_is_at_temperature_one(model, tokenizer):
    """The share of samples that start with the mark is the model's own probability of it."""
    prompt = "2 + 3 ="
    mark = tokenizer.convert_tokens_to_ids("####")
    with torch.no_grad():
        logits = model.eval()(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    expected = logits.softmax(-1)[mark].item()
    assert 0.05 < expected < 0.95
    samples = [{"prompt": prompt, "answer": "5"}] * 2000
    result = score(model, tokenizer, samples, batch_size=2000, max_completion_length=1, sampled=True)
    share = sum(text == "####" for text in result.completions) / 2000
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5)


def test_the_model_is_left_as_it_was_found(model, tokenizer, sums):
    model.train()
    score(model, tokenizer, sums[:3], max_completion_length=2)
    assert model.training
    model.eval()
    score(model, tokenizer, sums[:3], max_completion_length=2)
    assert not model.training


def test_chat_problems_go_through_the_chat_template(model, tokenizer, tiny_model_dir, sums):
    chat_tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} ={% endif %}"
    )
    plain = sums[:10]
    chat = [
        {"prompt": [{"role": "user", "content": p["prompt"].removesuffix(" =")}], "answer": p["answer"]} for p in plain
    ]
    expected = score(model, tokenizer, plain, max_completion_length=6)
    assert score(model, chat_tokenizer, chat, max_completion_length=6) == expected


def test_nothing_to_score_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="at least one problem"):
        score(model, tokenizer, [])


def test_padding_on_the_right_is_an_error(model, tiny_model_dir, sums):
    right = AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="right")
    with pytest.raises(ValueError, match="padding_side='left'"):
        score(model, right, sums)


@pytest.mark.parametrize("options", [{"basis": "unchecked"}, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_servers_do_not_heed_the_options_of_a_loaded_model(options):
    [name] = options
    arguments = ScoreArguments(basis=options.pop("basis", None), vllm_server_base_url="http://localhost:1")
    with pytest.raises(RecipeError, match=f"{name} with vllm_server_base_url"):
        refuse_options_of_a_loaded_model(arguments, ModelConfig(**options))
