"""trainer_setup.py: the cast that TRL makes, undone; the adapter's folder, whole at any moment."""

from types import SimpleNamespace

import pytest
import torch

from trl_recipes.trainer_setup import keep_vector_in_fp32, save_adapter, trained_numbers


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tinylora_v = torch.nn.ParameterDict({"0": torch.zeros(2), "1": torch.zeros(1)})
        self.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)


def test_what_trl_cast_is_cast_back_and_the_base_is_not():
    model = Model()
    trainer = SimpleNamespace(model=model)
    assert keep_vector_in_fp32(trainer) == 0
    for parameter in model.parameters():  # what TRL does to a quantized base
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert keep_vector_in_fp32(trainer) == 2
    assert {p.dtype for p in model.tinylora_v.values()} == {torch.float32}
    assert model.weight.dtype == torch.bfloat16


def test_a_small_adam_step_is_lost_in_bf16_and_kept_in_fp32():
    """Why it matters: from 0.03, a step of 1e-4 does nothing in bf16."""
    for dtype, moved in [(torch.bfloat16, False), (torch.float32, True)]:
        v = torch.nn.Parameter(torch.tensor([0.0308], dtype=dtype))
        start = v.detach().clone()
        optimizer = torch.optim.Adam([v], lr=5e-5)
        v.sum().backward()
        optimizer.step()
        assert (v != start).item() == moved


def test_trained_numbers_are_a_copy_in_order():
    model = Model()
    with torch.no_grad():
        model.tinylora_v["0"].copy_(torch.tensor([1.0, 2.0]))
        model.tinylora_v["1"].copy_(torch.tensor([3.0]))
    numbers = trained_numbers(model)
    assert numbers.tolist() == [1.0, 2.0, 3.0]
    numbers.zero_()
    assert model.tinylora_v["0"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("interrupted", [True, False])
def test_the_folder_holds_the_old_adapter_or_the_new_one(tmp_path, interrupted):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("old")

    class Trainer:
        def save_model(self, folder):
            (tmp_path / ".saving").mkdir(exist_ok=True)
            for name in ("adapter_config.json", "README.md", "adapter_model.safetensors"):
                if interrupted and name == "adapter_model.safetensors":
                    raise KeyboardInterrupt
                (tmp_path / ".saving" / name).write_text("new")

        def is_world_process_zero(self):
            return True

    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            save_adapter(Trainer(), tmp_path)
    else:
        save_adapter(Trainer(), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    text = "old" if interrupted else "new"
    assert (tmp_path / "adapter_config.json").read_text() == text
    assert (tmp_path / "adapter_model.safetensors").read_text() == text
