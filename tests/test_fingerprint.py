"""Sketches: how well they estimate a distance, the signs they settle, and texts that are none."""

import pytest
import torch

from peft_tinylora.basis import Basis, compute_basis
from peft_tinylora.errors import AdapterFileError
from peft_tinylora.fingerprint import (
    align,
    decode,
    digest_of_tensor,
    encode,
    factor_distance,
    projection_distance,
    sketch,
)


def factors(seed: int = 0, r: int = 2) -> tuple[Basis, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return compute_basis(torch.randn(40, 30, generator=generator), r, "left"), torch.randn(
        3, r, r, generator=generator
    )


def test_distance_is_about_the_relative_error_of_the_factors() -> None:
    estimates = []
    for seed in range(50):
        basis, P = factors(seed)
        noise = [torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)) for t in (basis.A, basis.B)]
        other = Basis(*(t + 0.1 * n * t.norm() / n.norm() for t, n in zip(basis[:2], noise, strict=True)))
        estimates.append(factor_distance(basis, sketch(other, P)))
    assert 0.05 < sum(estimates) / 50 < 0.2
    assert min(estimates) > 0.02


def test_distance_of_the_same_factors_is_that_of_bfloat16() -> None:
    basis, P = factors()
    [saved] = decode(encode([sketch(basis, P)]), [2])
    assert max(factor_distance(basis, saved), projection_distance(P, saved)) < 0.02
    assert projection_distance(factors(1)[1], saved) > 0.02  # another seed


def test_signs_are_those_of_the_sketch() -> None:
    for seed in range(20):
        basis, P = factors(seed, r=3)
        signs = torch.tensor([1.0, -1.0, 1.0 if seed % 2 else -1.0])
        flipped = Basis(basis.A * signs[:, None], basis.B * signs)
        aligned = align(basis, sketch(flipped, P))
        assert torch.equal(aligned.A, flipped.A) and torch.equal(aligned.B, flipped.B)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_signs_and_distances_of_small_and_large_factors(scale: float) -> None:
    basis, P = factors()
    basis = Basis(basis.A, basis.B * scale)
    flipped = Basis(-basis.A, -basis.B)
    assert torch.equal(align(basis, sketch(flipped, P)).A, flipped.A)
    assert factor_distance(basis, sketch(Basis(basis.A, 1.1 * basis.B), P)) > 0.02


def test_experts_and_zero_factors() -> None:
    zero = Basis(torch.zeros(2, 30), torch.zeros(40, 2))
    P = torch.randn(1, 2, 2)
    assert factor_distance(zero, sketch(zero, P)) == 0.0
    stacked = Basis(torch.randn(5, 2, 30), torch.randn(5, 40, 2))
    P = torch.randn(5, 1, 2, 2)
    assert sketch(stacked, P).shape == (5,)
    saved = sketch(stacked, P)
    assert max(factor_distance(stacked, saved), projection_distance(P, saved)) < 1e-6
    assert factor_distance(Basis(torch.randn(5, 2, 30), stacked.B), saved) > 0.02


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not base64!", "is no base64"),
        ("ä", "is no base64"),
        ("AAAA", "has 1 numbers, and the 2 modules that the adapter has on this model need 10"),
        (encode([torch.full((10,), float("nan"))]), "holds NaN or Inf"),
        (None, "is no base64"),
    ],
)
def test_texts_that_are_no_sketch_are_refused(text: str, message: str) -> None:
    with pytest.raises(AdapterFileError, match=message):
        decode(text, [2, 2])


def test_digest_depends_on_every_bit_and_on_the_shape() -> None:
    v = torch.arange(6.0)
    assert len({digest_of_tensor(t) for t in (v, v.view(2, 3), v.bfloat16(), v + 1e-6)}) == 4
