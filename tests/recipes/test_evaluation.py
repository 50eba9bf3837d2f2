"""evaluation.py: what is compared with what, and that an interruption changes nothing."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from recipes.adapters import BATCH, LENGTH, add_adapter
from transformers import AutoModelForCausalLM

from peft_tinylora import TinyLoraConfig
from trl_recipes.answer_log import FILE, Answer, AnswerLog
from trl_recipes.arguments import RecipeError
from trl_recipes.evaluation import Plan, evaluate, summarize
from trl_recipes.score import digest_of, score
from trl_recipes.score_arguments import ScoreArguments
from trl_recipes.variants import Sampling, Variant, check_base_model, variants_of_model


def arguments(**options) -> ScoreArguments:
    return ScoreArguments(max_completion_length=LENGTH, batch_size=BATCH, **options)


def test_variants_are_the_adapter_its_zero_and_the_base(model, tokenizer, sums, tiny_model_dir) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    variants = variants_of_model(model, tokenizer, arguments())
    log = AnswerLog(None, {})
    evaluate(variants, sums, Plan(), log)
    greedy = {
        variant.name: [log.answers[variant.name, "greedy", n, 0].completion for n in range(len(sums))]
        for variant in variants
    }
    options = {"batch_size": BATCH, "max_completion_length": LENGTH}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert greedy["adapter"] == score(model, tokenizer, sums, **options).completions
    assert greedy["base"] == score(base, tokenizer, sums, **options).completions == greedy["zero adapter"]
    assert greedy["adapter"] != greedy["base"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    summary = summarize([variant.name for variant in variants], sums, Plan(), log)
    assert summary["changed_by_zero_adapter"] == 0
    strict = {name: summary["variants"][name]["greedy"]["strict"]["mean"] for name in greedy}
    assert strict["adapter"] == score(model, tokenizer, sums, **options).fraction
    gain = summary["difference"]["greedy"]["strict"]
    assert gain["mean"] == pytest.approx(strict["adapter"] - strict["base"])
    assert gain["gained"] - gain["lost"] == round(len(sums) * gain["mean"])


def test_strict_and_lenient_stand_side_by_side() -> None:
    """Of three answers one is marked, one is said, and one is wrong."""
    texts = {"a": "#### 5", "b": "The answer is 5.", "c": "The answer is 6."}
    variant = Variant("model", lambda prompts, sampling: [texts[prompt] for prompt in prompts], nullcontext, 2)
    log = AnswerLog(None, {})
    problems = [{"prompt": prompt, "answer": "5"} for prompt in texts]
    evaluate([variant], problems, Plan(), log)
    measured = summarize(["model"], problems, Plan(), log)["variants"]["model"]["greedy"]
    assert measured["strict"]["mean"] == pytest.approx(1 / 3) and measured["lenient"]["mean"] == pytest.approx(2 / 3)


def test_a_difference_that_the_path_makes_is_counted(model, tokenizer, sums) -> None:
    variants = variants_of_model(model, tokenizer, arguments())
    log = AnswerLog(None, {})
    by_name = {variant.name: variant for variant in variants}
    evaluate([by_name["adapter"], by_name["base"]], sums, Plan(), log)
    answers = list(log.answers.values())
    log.add(
        type(answer)(**(vars(answer) | {"variant": "zero adapter"}))
        for answer in answers
        if answer.variant == "adapter"
    )
    changed = summarize(["adapter", "zero adapter", "base"], sums, Plan(), log)["changed_by_zero_adapter"]
    ours, theirs = ([a.completion for a in answers if a.variant == name] for name in ("adapter", "base"))
    assert changed == sum(a != b for a, b in zip(ours, theirs, strict=True)) > 0


@pytest.mark.parametrize(("use_dora", "has_zero"), [(False, True), (True, False)])
def test_a_plain_lora_has_a_zero_and_dora_none(tiny_model_dir, tokenizer, sums, tmp_path, use_dora, has_zero) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", use_dora=use_dora)
    folder = add_adapter(tiny_model_dir, config, tmp_path / "lora")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), folder)
    variants = variants_of_model(model, tokenizer, arguments())
    assert ("zero adapter" in [variant.name for variant in variants]) == has_zero
    log = AnswerLog(None, {})
    evaluate(variants, sums[:20], Plan(), log)
    summary = summarize([variant.name for variant in variants], sums[:20], Plan(), log)
    assert summary["changed_by_zero_adapter"] == (0 if has_zero else None)
    answers = {name: [log.answers[name, "greedy", n, 0].completion for n in range(20)] for name in ("adapter", "base")}
    assert answers["adapter"] != answers["base"]


def test_whole_saved_modules_are_the_bases_in_the_zero_adapter(tiny_model_dir, tokenizer, sums, tmp_path) -> None:
    config = TinyLoraConfig(task_type="CAUSAL_LM", tie="full", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
    head = model.base_model.model.lm_head.modules_to_save["default"]
    with torch.no_grad():
        head.weight.copy_(torch.roll(head.weight, 1, 0))
    log = AnswerLog(None, {})
    variants = variants_of_model(model, tokenizer, arguments())
    evaluate(variants, sums[:20], Plan(), log)
    assert summarize([variant.name for variant in variants], sums[:20], Plan(), log)["changed_by_zero_adapter"] == 0
    adapter, base = ([log.answers[name, "greedy", n, 0].completion for n in range(20)] for name in ("adapter", "base"))
    assert adapter != base and model.base_model.model.lm_head._disable_adapters is False


@pytest.mark.parametrize("controls", [True, False])
def test_a_lora_with_biases_has_no_base_to_switch_to(tiny_model_dir, tokenizer, controls) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", bias="all")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
    if controls:
        with pytest.raises(RecipeError, match="bias='all'.*controls: false"):
            variants_of_model(model, tokenizer, arguments())
    else:
        assert [v.name for v in variants_of_model(model, tokenizer, arguments(controls=False))] == ["adapter"]


def test_verdicts_are_those_of_the_rules_now(tmp_path) -> None:
    """What an interrupted run left on disk is judged with the rest of it."""
    log = AnswerLog(tmp_path, {})
    log.add([Answer("model", "greedy", 0, 0, "#### 5")])
    log.file.close()
    variant = Variant("model", lambda prompts, sampling: ["#### 6"] * len(prompts), nullcontext, 1)
    log = AnswerLog(tmp_path, {})
    problems = [{"prompt": "a", "answer": "5"}, {"prompt": "b", "answer": "5"}]
    evaluate([variant], problems, Plan(), log)
    assert summarize(["model"], problems, Plan(), log)["variants"]["model"]["greedy"]["strict"]["mean"] == 0.5
    assert "true" not in (tmp_path / FILE).read_text()


@pytest.mark.parametrize(("option", "value"), [("adapter", "a/b"), ("vllm_server_base_url", "http://localhost:1")])
def test_a_base_is_not_named_where_it_is_known(option: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"base_model='c/d' with .*{option.split('_')[0]}.*leave"):
        check_base_model(arguments(base_model="c/d", **{option: value}))


def test_sampled_is_what_training_measures_and_samples_have_seeds(model, tokenizer, sums) -> None:
    plan = Plan(sampled=True, samples=3, sampling=Sampling(0.8, 0.9), seed=4)
    [variant, *_] = variants_of_model(model, tokenizer, arguments(controls=False))
    logs = [AnswerLog(None, {}) for _ in range(3)]
    state = torch.get_rng_state()
    evaluate([variant], sums, plan, logs[0])
    assert torch.equal(torch.get_rng_state(), state)
    evaluate([variant], sums, plan, logs[1])
    assert logs[0].answers == logs[1].answers
    evaluate([variant], sums, Plan(samples=3, sampling=Sampling(0.8, 0.9), seed=5), logs[2])
    drawn = [{key: answer for key, answer in log.answers.items() if key[1] == "samples"} for log in logs]
    assert drawn[0] != drawn[2] and len(drawn[0]) == 300
    assert len({drawn[0]["adapter", "samples", 7, n].completion for n in range(3)}) > 1
    sampled = [logs[0].answers["adapter", "sampled", n, 0].completion for n in range(len(sums))]
    options = {"batch_size": BATCH, "max_completion_length": LENGTH, "sampled": True}
    assert sampled == score(model, tokenizer, sums, **options).completions


@pytest.mark.parametrize("stop_after", [1, 4, 9])
def test_a_run_that_was_broken_off_ends_as_one_that_was_not(model, tokenizer, sums, tmp_path, stop_after) -> None:
    plan = Plan(sampled=True, samples=2)
    variants = variants_of_model(model, tokenizer, arguments())
    whole = AnswerLog(None, {})
    evaluate(variants, sums[:40], plan, whole)

    calls = []

    def broken(prompts, sampling):
        calls.append(prompts)
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        return variants[0].complete(prompts, sampling)

    first = [type(variant)(**(vars(variant) | {"complete": broken})) for variant in variants]
    log = AnswerLog(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, sums[:40], plan, log)
    log.file.close()
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-30])  # and the last line is torn
    log = AnswerLog(tmp_path, {})
    there = len(log.answers)
    assert 0 < there < len(whole.answers)
    evaluate(variants, sums[:40], plan, log)
    assert log.answers == whole.answers
    assert len(path.read_text().splitlines()) == 1 + len(whole.answers)


def test_a_digest_tells_texts_apart() -> None:
    assert digest_of(["a", "b"]) != digest_of(["ab"]) and len(digest_of([])) == 16
