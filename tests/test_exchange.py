"""How benchmarks/exchange.py counts: what comes in by TCP and nothing else. Its table needs two processes."""

import os
import socket

import pytest
import torch

from benchmarks.exchange import MODEL, TINYLORA, bytes_received, model_with


pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads Linux's /proc and TCP_INFO")


def test_bytes_that_came_in_are_counted_and_those_that_went_out_are_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as here:
            there, _ = server.accept()
            with there:
                before, descriptors = bytes_received(), len(os.listdir("/proc/self/fd"))
                here.sendall(b"x" * 12345)
                assert there.recv(12345, socket.MSG_WAITALL) == b"x" * 12345
                assert bytes_received() - before == 12345
                assert len(os.listdir("/proc/self/fd")) == descriptors  # none is left open


def test_the_model_is_the_same_in_every_process_and_the_papers_thirteen_are_trained() -> None:
    first, second = model_with(TINYLORA), model_with(TINYLORA)
    assert sum(p.numel() for p in first.parameters() if p.requires_grad) == 13
    assert MODEL.num_hidden_layers * 7 == 49
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b)
