"""sharding.py, as far as one process can show it; two are in test_processes.py."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from trl_recipes import sharding
from trl_recipes.arguments import RecipeError
from trl_recipes.sharding import gathered_parameters, partitioned_in, refuse_mixed_precision_where_sharded


def trainer(by: str | None, mixed_precision: str) -> SimpleNamespace:
    return SimpleNamespace(
        is_fsdp_enabled=by == "fsdp",
        is_deepspeed_enabled=by == "deepspeed",
        accelerator=SimpleNamespace(mixed_precision=mixed_precision),
    )


@pytest.mark.parametrize("by", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_mixed_precision_that_would_round_v_is_refused_with_the_remedy(by: str, mixed_precision: str) -> None:
    with pytest.raises(RecipeError, match=rf"mixed precision \({mixed_precision}\).*set bf16: false") as error:
        refuse_mixed_precision_where_sharded(trainer(by, mixed_precision))
    assert "\n" not in str(error.value)
    refuse_mixed_precision_where_sharded(trainer(by, "no"))
    refuse_mixed_precision_where_sharded(trainer(None, mixed_precision))


@pytest.mark.parametrize(("set_to", "expected"), [(None, False), (True, True), (False, False)])
def test_ddp_does_not_send_the_factors_at_each_step_unless_told_to(tmp_path, set_to, expected: bool) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, ddp_broadcast_buffers=set_to)
    sharding.send_gradients_only(arguments)
    assert arguments.ddp_broadcast_buffers is expected


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float32", None])
def test_zero3_partitions_the_base_in_its_dtype_and_forgets_it_after_a_failure(monkeypatch, dtype) -> None:
    config = {"bf16": {"enabled": False}}
    monkeypatch.setattr(sharding, "deepspeed_config", lambda: config)
    with pytest.raises(OSError, match="no such model"), partitioned_in(dtype):
        assert config["bf16"]["enabled"] is (dtype in ("bfloat16", torch.bfloat16))
        raise OSError("no such model")
    assert config == {"bf16": {"enabled": False}}


def test_without_zero3_nothing_is_gathered() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    with gathered_parameters([parameter]), torch.no_grad():
        parameter.mul_(2)
    assert parameter.tolist() == [2, 2]
