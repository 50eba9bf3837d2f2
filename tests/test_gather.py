"""Weights that are elsewhere: offloaded by accelerate, or partitioned by DeepSpeed ZeRO-3. FSDP2 is in test_distributed."""

import importlib.util
import os

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from support import fill_vectors, free_port, make_tiny_llama, run_python_process

from peft_tinylora import TinyLoraConfig


TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


def offloaded(way: str, folder: os.PathLike) -> torch.nn.Module:
    model = make_tiny_llama()
    if way == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_basis_of_an_offloaded_base_is_that_of_one_in_memory(tokens, tmp_path, way: str) -> None:
    plain = get_peft_model(make_tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(plain, 0.5)
    model = get_peft_model(offloaded(way, tmp_path), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.5)
    assert all(parameter.is_meta for name, parameter in model.named_parameters() if "base_layer" in name)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits)
    onto_offloaded = PeftModel.from_pretrained(offloaded(way, tmp_path), tmp_path / "adapter")
    torch.testing.assert_close(onto_offloaded(tokens).logits, plain(tokens).logits)


# Two processes, each with half of every parameter. Arguments: the config, a port.
ZERO3 = """
    import copy, os, subprocess, sys
    from ast import literal_eval
    import torch
    rank = int(os.environ.get("RANK", 0))
    if "RANK" not in os.environ:  # the parent: itself rank 0, and a child for rank 1
        os.environ.update(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", os.environ["SCRIPT"], *sys.argv[1:]])
        os.environ.update(RANK="0", LOCAL_RANK="0")
    import deepspeed
    deepspeed.init_distributed(dist_backend="gloo")
    from support import make_tiny_llama
    from peft import get_peft_model
    from peft_tinylora import TinyLoraConfig, TinyLoraLayer
    config = literal_eval(sys.argv[1])
    plain = get_peft_model(make_tiny_llama(), TinyLoraConfig(**config))
    base = make_tiny_llama()
    deepspeed.zero.Init(module=base, config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}})
    assert base.model.layers[0].mlp.up_proj.weight.numel() == 0
    model = get_peft_model(base, TinyLoraConfig(**config))
    assert base.model.layers[0].mlp.up_proj.base_layer.weight.numel() == 0
    pairs = [[m for m in each.modules() if isinstance(m, TinyLoraLayer)] for each in (plain, model)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a.tinylora_A["default"], b.tinylora_A["default"])
        torch.testing.assert_close(a.tinylora_B["default"], b.tinylora_B["default"])
    if rank == 0:
        assert child.wait() == 0
        print("same basis")
    torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-zero3")
def test_basis_of_a_zero3_base_is_that_of_a_whole_one(monkeypatch) -> None:
    import textwrap

    monkeypatch.setenv("SCRIPT", textwrap.dedent(ZERO3))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "same basis" in run_python_process(ZERO3, TILED, free_port())
