"""Two processes with gloo: DDP, and FSDP2 with a shard for each layer, against one process."""

import json

import pytest
import torch
from peft import get_peft_model
from support import fill_vectors, run_python_process

from peft_tinylora import TinyLoraConfig


TILED = {"u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}

# Prints the gradients of v, by DDP and by FSDP2, of a batch split over two processes. Arguments: the config, a port.
TWO_PROCESSES = """
    import json, os, sys
    from ast import literal_eval
    import torch
    import torch.distributed as dist
    from support import fill_vectors, make_tiny_llama
    from peft import get_peft_model
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from peft_tinylora import TinyLoraConfig

    def adapted():
        model = get_peft_model(make_tiny_llama(), TinyLoraConfig(**literal_eval(sys.argv[1])))
        fill_vectors(model, 0.3)
        return model

    def gradients(model):
        return [v.grad for v in model.tinylora_v["default"].values()]

    rank = int(os.environ.get("RANK", 0))
    if "RANK" not in os.environ:  # the parent: itself rank 0, and a child for rank 1
        import subprocess
        os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", os.environ["SCRIPT"], *sys.argv[1:]])
        os.environ["RANK"] = "0"
    dist.init_process_group("gloo")
    tokens = torch.randint(1, 48, (4, 10), generator=torch.Generator().manual_seed(1)).chunk(2)[rank]
    printed = {}

    model = adapted()
    replica = DistributedDataParallel(model)
    replica(input_ids=tokens, labels=tokens).loss.backward()
    printed["ddp"] = [g.tolist() for g in gradients(model)]

    model = adapted()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(input_ids=tokens, labels=tokens).loss.backward()
    printed["fsdp2"] = [g.full_tensor().tolist() for g in gradients(model)]

    if rank == 0:
        print(json.dumps(printed))
        assert child.wait() == 0
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def by_two_processes() -> dict[str, torch.Tensor]:
    import os
    import socket
    import textwrap

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["SCRIPT"] = textwrap.dedent(TWO_PROCESSES)
    try:
        printed = json.loads(run_python_process(TWO_PROCESSES, TILED, port).splitlines()[-1])
    finally:
        del os.environ["SCRIPT"]
    return {name: torch.tensor(gradient) for name, gradient in printed.items()}


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_gradient_of_two_processes_is_that_of_one(tiny_llama, by_two_processes, way: str) -> None:
    model = get_peft_model(tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.3)
    tokens = torch.randint(1, 48, (4, 10), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    expected = torch.stack([v.grad for v in model.tinylora_v["default"].values()])
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(by_two_processes[way], expected, rtol=1e-4, atol=1e-7)
