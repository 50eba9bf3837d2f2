"""rollouts.py: what is sent with each request, what TRL makes of the answers, and which options go together.

In the place of vLLM stands a second model, which is given nothing but the text of the adapter that was sent.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig

from peft_tinylora import TinyLoraConfig
from peft_tinylora.inline import name_of, parse_inline
from trl_recipes.arguments import GRPOArguments, RecipeError, TinyLoraArguments
from trl_recipes.rewards import exact_match_reward
from trl_recipes.rollouts import Rollouts, make_rollouts, served_rank, tokenize, weigh_by_importance, without_launcher
from trl_recipes.vllm_requests import Completion, Prompt


# TRL 1.16 sets gradient_checkpointing, which transformers 5.23 calls activation_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

CONFIG = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class AnotherModel:
    """Completes prompts with the base and the v of the text that it is sent, and remembers what it was asked."""

    def __init__(self, folder: Path, stale: bool = False) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder)
        self.model: PeftModel = get_peft_model(base, TinyLoraConfig(**CONFIG)).eval()
        self.asked: list[tuple[str, list[Prompt], dict]] = []
        self.stale = stale

    def set_vectors(self, text: str) -> None:
        v = parse_inline(text, 65536).v
        with torch.no_grad():
            for group, vector in self.model.base_model.tinylora_v["default"].items():
                vector.copy_(v[int(group)])

    @torch.no_grad()
    def generate(
        self, model: str, prompts: Sequence[Prompt], *, max_tokens: int, expected_model: str | None, **sampling: object
    ) -> list[list[Completion]]:
        assert expected_model == name_of(model)
        self.asked.append((model, list(prompts), sampling))
        self.set_vectors(self.asked[0][0] if self.stale else model)
        return [[self.complete(prompt.token_ids, max_tokens) for _ in range(prompt.n)] for prompt in prompts]

    def complete(self, prompt: list[int], max_tokens: int) -> Completion:
        tokens, logprobs = [], []
        while len(tokens) < max_tokens and (not tokens or tokens[-1] != 1):
            distribution = self.model(torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(distribution.exp().multinomial(1).item())
            logprobs.append(distribution[tokens[-1]].item())
        return Completion(tokens, logprobs)


@pytest.fixture
def make_trainer(tiny_model_dir, sums, tmp_path):
    def make_trainer(generator: AnotherModel, reward=exact_match_reward, **options: object) -> GRPOTrainer:
        rollouts = Rollouts(generator)
        arguments = {
            "max_steps": 3,
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 4,
            "learning_rate": 0.2,
            "beta": 0.0,
            "use_cpu": True,
            "bf16": False,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "vllm_importance_sampling_mode": "token_truncate",
        }
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_dir),
            reward_funcs=[reward],
            args=GRPOConfig(output_dir=str(tmp_path), **(arguments | options)),
            train_dataset=Dataset.from_list(sums),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left"),
            peft_config=TinyLoraConfig(**CONFIG),
            rollout_func=rollouts,
        )
        weigh_by_importance(trainer)
        return trainer

    return make_trainer


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_each_step_is_sampled_with_the_v_of_that_step(make_trainer, tiny_model_dir):
    vllm = AnotherModel(tiny_model_dir)
    trainer = make_trainer(vllm)
    trainer.train()
    vectors = [parse_inline(text, 65536).v for text, _, _ in vllm.asked]
    assert len(vectors) == 3 and not vectors[0].any()
    assert all(not torch.equal(a, b) for a, b in zip(vectors, vectors[1:], strict=False))
    # The trainer finds the same probabilities that the other model sampled with: nothing is stale and nothing rounded.
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4
    assert logged(trainer, "sampling/importance_sampling_ratio/mean") == pytest.approx([1, 1, 1], abs=1e-4)


def test_completions_of_an_old_v_are_weighed(make_trainer, tiny_model_dir):
    trainer = make_trainer(AnotherModel(tiny_model_dir, stale=True))
    trainer.train()
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    assert differences[0] < 1e-4 and min(differences[1:]) > 1e-3
    assert logged(trainer, "sampling/importance_sampling_ratio/max")[2] != pytest.approx(1, abs=1e-3)


def test_without_the_correction_trl_trains_as_if_it_had_sampled_itself(make_trainer, tiny_model_dir):
    trainer = make_trainer(AnotherModel(tiny_model_dir), vllm_importance_sampling_correction=False)
    trainer.train()
    assert not logged(trainer, "sampling/sampling_logp_difference/max")
    assert len(logged(trainer, "reward")) == 3


def test_rewards_are_told_how_old_v_was(make_trainer, tiny_model_dir):
    seen = []

    def reward(completions: list[str], v_version: list[int], **kwargs: object) -> list[float]:
        seen.append(v_version)
        return [float(len(completion) % 2) for completion in completions]

    make_trainer(AnotherModel(tiny_model_dir), reward).train()
    assert seen == [[0] * 16, [1] * 16, [2] * 16]


def test_a_prompt_is_sent_once_for_all_its_completions_and_answers_come_back_in_place(make_trainer, tiny_model_dir):
    class Numbered(AnotherModel):
        def generate(self, model: str, prompts: Sequence[Prompt], **options: object) -> list[list[Completion]]:
            super().generate(model, prompts, **options)
            return [[Completion([*p.token_ids, i], [0.0]) for i in range(p.n)] for p in prompts]

    vllm = Numbered(tiny_model_dir)
    trainer = make_trainer(vllm)
    given = ["3 + 4 =", "3 + 4 =", "1 + 1 =", "3 + 4 ="]
    answer = trainer.rollout_func(given, trainer)
    [(_, prompts, sampling)] = vllm.asked
    assert [prompt.n for prompt in prompts] == [3, 1]
    assert [ids[:-1] for ids in answer["completion_ids"]] == answer["prompt_ids"] == tokenize(trainer, given)
    assert [ids[-1] for ids in answer["completion_ids"]] == [0, 1, 0, 2]
    assert sampling == {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


def test_prompts_are_tokenized_as_trl_does_it(make_trainer, tiny_model_dir):
    trainer = make_trainer(AnotherModel(tiny_model_dir))
    strings = ["3 + 4 =", "1 + 1 ="]
    assert tokenize(trainer, strings) == trainer._tokenize_prompts(strings)[0]
    trainer.processing_class.chat_template = "{{ messages[0]['content'] }} ="
    messages = [[{"role": "user", "content": "3 + 4"}], [{"role": "user", "content": "1 + 1"}]]
    assert tokenize(trainer, messages) == trainer._tokenize_prompts(messages)[0] == tokenize(trainer, strings)


def test_the_question_at_the_start_is_one_token(make_trainer, tiny_model_dir):
    vllm = AnotherModel(tiny_model_dir)
    trainer = make_trainer(vllm)
    trainer.rollout_func.check(trainer)
    [(_, prompts, _)] = vllm.asked
    assert prompts == [Prompt([trainer.processing_class.eos_token_id], 1)]


def test_log_probabilities_before_the_temperature_are_refused(make_trainer, tiny_model_dir):
    class Raw(AnotherModel):
        def generate(self, model: str, prompts: Sequence[Prompt], **options: object) -> list[list[Completion]]:
            super().generate(model, prompts, **options)
            return [[Completion([3], [self.logprob])]]

    vllm = Raw(tiny_model_dir)
    vllm.logprob = -0.5
    trainer = make_trainer(vllm)
    trainer.rollout_func.check(trainer)  # at temperature 1 both are the same
    trainer.temperature = 0.7
    with pytest.raises(RecipeError, match="--logprobs-mode processed_logprobs"):
        trainer.rollout_func.check(trainer)
    vllm.logprob = 0.0
    trainer.rollout_func.check(trainer)
    assert [sampling["top_k"] for _, _, sampling in vllm.asked] == [-1, -1, 1, -1, 1]


@pytest.mark.parametrize(
    "rollout, options, parts",
    [
        ({"rollout": "sglang"}, {}, ["'sglang'", "'vllm-colocate'"]),
        ({"rollout": "vllm"}, {}, ["vllm_server_base_url"]),
        ({"rollout": "vllm"}, {"vllm_server_base_url": " , "}, ["at least one"]),
        ({"rollout": "vllm"}, {"vllm_server_base_url": "localhost:8000"}, ["'localhost:8000'", "http://host:8000"]),
        ({"rollout": "vllm"}, {"vllm_server_base_url": "http://a", "use_vllm": True}, ["use_vllm", "set one"]),
        ({"rollout": "vllm"}, {"vllm_server_base_url": "http://a", "loss_type": "vespo"}, ["vespo", "token_truncate"]),
        ({"rollout": "vllm", "load_in_4bit": True}, {"vllm_server_base_url": "http://a"}, ["full-precision"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(rollout, options, parts, tmp_path):
    quantized = {"load_in_4bit": rollout.pop("load_in_4bit", False)}
    arguments = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    with pytest.raises(RecipeError) as refused:
        make_rollouts(GRPOArguments(**rollout), arguments, ModelConfig(**quantized), TinyLoraArguments())
    assert all(part in str(refused.value) for part in parts), refused.value


def test_by_default_trl_generates(tmp_path):
    arguments = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert make_rollouts(GRPOArguments(), arguments, ModelConfig(), TinyLoraArguments()) is None


def test_vllm_is_started_without_the_launchers_variables(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with without_launcher():
        assert "RANK" not in os.environ and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
    assert os.environ["RANK"] == "0" and "MASTER_ADDR" not in os.environ


def test_the_served_rank_is_one_of_vllms():
    assert [served_rank(rank) for rank in (1, 2, 8, 9, 512)] == [8, 8, 8, 16, 512]
