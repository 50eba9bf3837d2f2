"""Two processes with gloo: DDP, and FSDP2 with a shard for each layer, against one process."""

import json

import pytest
import torch
from peft import get_peft_model
from support import IS_TORCH_2_6, fill_vectors, free_port, run_python_process

from peft_tinylora import TinyLoraConfig, TinyLoraLayer


needs_fsdp2 = pytest.mark.skipif(IS_TORCH_2_6, reason="torch 2.6 has no FSDP2 on a CPU")
TILED = {"u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}

# Three parts of a script that prints the gradients of v, by DDP and by FSDP2, of a batch split over two processes.
# Arguments: the config, a port.
BY_DDP = """
    import json, os, sys
    from ast import literal_eval
    import torch
    import torch.distributed as dist
    from support import fill_vectors, make_tiny_llama
    from peft import get_peft_model
    from torch.nn.parallel import DistributedDataParallel
    from peft_tinylora import TinyLoraConfig

    def adapted():
        model = get_peft_model(make_tiny_llama(), TinyLoraConfig(**literal_eval(sys.argv[1])))
        fill_vectors(model, 0.3)
        return model

    def gradients(model):
        return [v.grad for v in model.tinylora_v["default"].values()]

    child = os.fork()
    rank = 0 if child else 1
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
    dist.init_process_group("gloo")
    tokens = torch.randint(1, 48, (4, 10), generator=torch.Generator().manual_seed(1)).chunk(2)[rank]
    printed = {}

    model = adapted()
    replica = DistributedDataParallel(model)
    replica(input_ids=tokens, labels=tokens).loss.backward()
    printed["ddp"] = [g.tolist() for g in gradients(model)]
"""
BY_FSDP2 = """
    from torch.distributed.fsdp import fully_shard

    model = adapted()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(input_ids=tokens, labels=tokens).loss.backward()
    printed["fsdp2"] = [g.full_tensor().tolist() for g in gradients(model)]
    # FSDP2 writes what it gathers into the same tensors, and leaves their version as it was.
    optimizer = torch.optim.SGD((v for v in model.parameters() if v.requires_grad), lr=100)
    optimizer.step()
    printed["loss after a step"] = model(input_ids=tokens, labels=tokens).loss.item()

    # A basis of weights of which each process has a piece. Rank 1 has a cache, rank 0 has none: both must gather alike.
    from peft_tinylora import TinyLoraLayer
    os.environ["PEFT_TINYLORA_CACHE"] = os.environ["PEFT_TINYLORA_CACHE"] if rank else "off"
    if rank:
        base = make_tiny_llama()
        base.name_or_path = "tiny"
        get_peft_model(base, TinyLoraConfig(**literal_eval(sys.argv[1])))
    base = make_tiny_llama()
    base.name_or_path = "tiny"
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(base)
    model = get_peft_model(base, TinyLoraConfig(**literal_eval(sys.argv[1])))
    factors = [(m.tinylora_A["default"], m.tinylora_B["default"]) for m in model.modules() if isinstance(m, TinyLoraLayer)]
    printed["sharded base"] = [[t.tolist() for t in pair] for pair in factors]
"""
THE_END = """
    dist.destroy_process_group()
    if rank == 1:
        os._exit(0)
    print(json.dumps(printed))
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def by_two_processes(tmp_path_factory) -> dict[str, list]:
    """What two processes computed, by name."""
    script = BY_DDP + ("" if IS_TORCH_2_6 else BY_FSDP2) + THE_END
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_TINYLORA_CACHE", str(tmp_path_factory.mktemp("basis")))
        return json.loads(run_python_process(script, TILED, free_port()).splitlines()[-1])


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_gradient_of_two_processes_is_that_of_one(tiny_llama, by_two_processes, way: str) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.3)
    tokens = torch.randint(1, 48, (4, 10), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    expected = torch.stack([v.grad for v in model.tinylora_v["default"].values()])
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(torch.tensor(by_two_processes[way]), expected, rtol=1e-4, atol=1e-7)


@needs_fsdp2
def test_a_step_under_fsdp2_is_noticed_by_the_next_forward(tiny_llama, by_two_processes) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.3)
    tokens = torch.randint(1, 48, (4, 10), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer = torch.optim.SGD((v for v in model.parameters() if v.requires_grad), lr=100)
    losses = []
    for _ in range(2):
        losses.append(model(input_ids=tokens[:2], labels=tokens[:2]).loss.item())
        optimizer.step()
    assert abs(losses[0] - losses[1]) > 1e-2
    assert by_two_processes["loss after a step"] == pytest.approx(losses[1], rel=1e-4)


@needs_fsdp2
def test_basis_of_a_sharded_base_is_that_of_a_whole_one(tiny_llama, by_two_processes) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    layers = [module for module in model.modules() if isinstance(module, TinyLoraLayer)]
    assert len(by_two_processes["sharded base"]) == len(layers) == 28
    for layer, (A, B) in zip(layers, by_two_processes["sharded base"], strict=True):
        torch.testing.assert_close(torch.tensor(A), layer.tinylora_A["default"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(B), layer.tinylora_B["default"], rtol=1e-5, atol=1e-6)
