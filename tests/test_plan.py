"""Budgets -> u and n_tie, against the paper's table 2."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from peft_tinylora import ConfigError, plan


@pytest.fixture(scope="module")
def qwen_shaped() -> torch.nn.Module:
    """28 layers of 7 modules, as Qwen2.5-7B, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Qwen2Config(num_hidden_layers=28, hidden_size=64, vocab_size=32))


@pytest.mark.parametrize(
    ("budget", "u", "n_tie"),
    [(13, 1, 16), (49, 1, 4), (196, 1, 1), (392, 2, 1), (6_272, 32, 1), (100_352, 512, 1), (1, 1, 196), (195, 1, 2)],
)
def test_budget_of_the_paper(qwen_shaped: torch.nn.Module, budget: int, u: int, n_tie: int) -> None:
    config = plan(qwen_shaped, budget)
    assert (config.u, config.n_tie, config.tie) == (u, n_tie, "tiled")


def test_never_over_budget(qwen_shaped: torch.nn.Module) -> None:
    for budget in range(1, 500, 7):
        config = plan(qwen_shaped, budget)
        assert config.u * -(-196 // config.n_tie) <= budget


def test_other_fields_reach_the_config(qwen_shaped: torch.nn.Module) -> None:
    config = plan(qwen_shaped, 14, target_modules=["q_proj", "v_proj"], r=4, sigma="split")
    assert (config.n_tie, config.r, config.sigma) == (4, 4, "split")


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, None])
def test_bad_budget_is_refused(qwen_shaped: torch.nn.Module, budget: object) -> None:
    with pytest.raises(ConfigError, match="`budget` should be a positive integer"):
        plan(qwen_shaped, budget)


def test_no_matching_module_and_chosen_fields_are_refused(qwen_shaped: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"target_modules=\['nope'\]: no module of the model matches"):
        plan(qwen_shaped, 13, target_modules=["nope"])
    with pytest.raises(ConfigError, match=r"chooses n_tie, u from the budget"):
        plan(qwen_shaped, 13, u=2, n_tie=3)
