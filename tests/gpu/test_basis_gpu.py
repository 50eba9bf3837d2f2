"""The basis of weights on a GPU: that of the same weights on the CPU, to rounding."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import fill_vectors, make_tiny_llama

from peft_tinylora import TinyLoraConfig
from peft_tinylora.basis import compute_basis, residual
from peft_tinylora.triplets import ANGLE


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICE = "cuda"


def weight(rows: int, columns: int) -> torch.Tensor:
    """With separated leading values, as in a trained weight."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, 4, generator=generator), torch.randn(columns, 4, generator=generator)
    return (
        0.02 * torch.randn(rows, columns, generator=generator)
        + left * torch.tensor([0.04, 0.03, 0.02, 0.01]) @ right.T
    )


@pytest.mark.parametrize("shape", [(64, 48), (600, 400), (400, 900)])
@pytest.mark.parametrize("precision", ["highest", "medium"])  # medium allows TF32 to others
def test_same_factors_as_on_the_cpu(shape: tuple[int, int], precision: str) -> None:
    W = weight(*shape)
    torch.set_float32_matmul_precision(precision)
    try:
        found = compute_basis(W.to(DEVICE), 2, "left")
        assert residual(W.to(DEVICE), found.A, found.B) < 5e-6
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = compute_basis(W, 2, "left")
    assert (found.A.cpu() - expected.A).norm(dim=1).max() < ANGLE  # of unit vectors, with their signs
    assert ((found.B.cpu() - expected.B).norm(dim=0) / expected.B.norm(dim=0)).max() < ANGLE


@pytest.mark.parametrize("devices", [("cpu", DEVICE), (DEVICE, "cpu")])
def test_an_adapter_of_one_device_is_that_of_the_other(tokens, tmp_path, devices: tuple[str, str]) -> None:
    saved_on, loaded_on = devices
    settings = TinyLoraConfig(u=1, tie="tiled", n_tie=4, target_modules="all-linear")
    model = get_peft_model(make_tiny_llama().to(saved_on), settings)
    fill_vectors(model, 0.5)
    model.save_pretrained(tmp_path)
    logits = model(tokens.to(saved_on)).logits.cpu()
    again = PeftModel.from_pretrained(make_tiny_llama().to(loaded_on), tmp_path)
    torch.testing.assert_close(again(tokens.to(loaded_on)).logits.cpu(), logits, rtol=1e-4, atol=1e-4)
