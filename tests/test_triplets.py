"""Leading triplets against torch.linalg.svd in float64: the vectors, the certificate, and what cannot be determined."""

import math

import pytest
import torch
from support import run_python_process

from benchmarks.peak import PeakMemory
from peft_tinylora import build, triplets
from peft_tinylora.triplets import ANGLE, exact_products, leading_triplets


def trained_like(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Gaussian entries and a few larger directions, as in a trained weight."""
    generator = torch.Generator().manual_seed(seed)
    W = 0.02 * torch.randn(rows, columns, generator=generator)
    edge = 0.02 * (math.sqrt(rows) + math.sqrt(columns))
    U = torch.linalg.qr(torch.randn(rows, 4, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(columns, 4, generator=generator))[0]
    return W + (U * edge * torch.tensor([3.0, 2.2, 1.7, 1.3])) @ V.T


def sines(W: torch.Tensor, found) -> torch.Tensor:
    """Sine of the angle of each found vector to the exact one, left and right."""
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    r = len(found.S)
    pairs = [*zip(U.T[:r], found.U, strict=True), *zip(Vh[:r], found.V, strict=True)]
    return torch.stack([(vector - (vector @ exact) * exact).norm() for exact, vector in pairs])


SHAPES = [(40, 24), (24, 40), (16, 16), (1, 9), (9, 1), (600, 400), (400, 900), (512, 512)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["trained", "gaussian"])
def test_vectors_are_within_the_certificate_which_is_within_the_tolerance(shape, spectrum: str) -> None:
    W = trained_like(*shape) if spectrum == "trained" and min(shape) > 8 else torch.randn(shape)
    r = min(2, *shape)
    found = leading_triplets(W, r)
    assert found.angle <= ANGLE
    assert sines(W, found).max() <= max(found.angle, 1e-12)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(W.double())[:r], rtol=1e-9, atol=0)


@pytest.mark.parametrize("r", [1, 4, 64])
def test_other_ranks(r: int) -> None:
    W = torch.randn(300, 700, generator=torch.Generator().manual_seed(3))
    found = leading_triplets(W, r)
    assert found.angle <= ANGLE and sines(W, found).max() <= max(found.angle, 1e-12)


def test_the_gram_matrix_is_for_small_weights_and_equal_values(monkeypatch) -> None:
    monkeypatch.setattr(triplets, "gram_block", lambda *_: pytest.fail("the slow way was taken"))
    leading_triplets(trained_like(600, 400), 2)
    leading_triplets(torch.randn(600, 400), 2)
    with pytest.raises(pytest.fail.Exception):  # the guard can fail
        leading_triplets(orthogonal(400), 2)


def test_products_in_float64_finish_what_float32_cannot(monkeypatch) -> None:
    steps = []
    original = triplets.krylov_block
    monkeypatch.setattr(
        triplets, "krylov_block", lambda *a, is_exact=False: steps.append(is_exact) or original(*a, is_exact=is_exact)
    )
    spectrum = torch.cat([torch.tensor([2.0, 1.0, 0.999]), torch.linspace(0.9, 0, 397)])
    W = orthogonal(400, seed=1) * spectrum @ orthogonal(400).T
    found = leading_triplets(W, 2)
    assert steps == [False, True]
    assert found.angle <= ANGLE and sines(W, found).max() <= found.angle


@pytest.mark.parametrize("second", [0.02, 0.05, 0.1, 0.2, 0.3])
def test_far_apart_values_do_not_loosen_what_the_cache_checks(second: float) -> None:
    spectrum = torch.cat([torch.tensor([1.0]), torch.linspace(second, 0, 399)])
    found = leading_triplets(orthogonal(400, seed=1) * spectrum @ orthogonal(400).T, 1)
    assert found.residual < build.KEPT_TOLERANCE / 4


@pytest.mark.parametrize("spectrum", ["trained", "gaussian"])
def test_less_than_one_more_weight_is_in_memory(spectrum: str) -> None:
    W = trained_like(2000, 1500) if spectrum == "trained" else torch.randn(2000, 1500)
    with PeakMemory() as memory:
        leading_triplets(W, 2)
    assert memory.peak_bytes - memory.start_bytes < W.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_vectors_from_the_same_values_in_another_storage(dtype: torch.dtype) -> None:
    stored = trained_like(600, 400).to(dtype)
    first, second = leading_triplets(stored.float(), 2), leading_triplets(stored.double(), 2)
    torch.testing.assert_close(first.V.abs(), second.V.abs(), rtol=0, atol=1e-5)
    torch.testing.assert_close(first.U.abs(), second.U.abs(), rtol=0, atol=1e-5)


def test_same_vectors_with_one_thread_and_with_eight() -> None:
    script = """
        import sys, torch
        torch.set_num_threads(int(sys.argv[1]))
        from test_triplets import trained_like
        from peft_tinylora.basis import compute_basis
        bases = [compute_basis(trained_like(*shape), 2, "left") for shape in ((600, 400), (400, 900), (64, 48))]
        torch.save([(basis.A, basis.B) for basis in bases], sys.argv[2])
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for threads in (1, 8):
            run_python_process(script, threads, f"{folder}/{threads}")
        one, eight = (torch.load(f"{folder}/{threads}") for threads in (1, 8))
    for (A, B), (A8, B8) in zip(one, eight, strict=True):
        torch.testing.assert_close(A, A8, rtol=0, atol=2e-6)
        torch.testing.assert_close(B, B8, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    W = trained_like(600, 400)
    torch.testing.assert_close(
        leading_triplets(W * scale, 2).V.abs(), leading_triplets(W, 2).V.abs(), atol=1e-5, rtol=0
    )


def test_low_precision_that_is_allowed_elsewhere_does_not_matter() -> None:
    W = trained_like(600, 400)
    exact = leading_triplets(W, 2)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_products():
            found = leading_triplets(W, 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.V, exact.V)


def orthogonal(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize("n", [30, 300])
def test_equal_leading_values_are_said_to_determine_nothing(n: int) -> None:
    equal_pair = orthogonal(n) * torch.cat([torch.tensor([2.0, 2.0]), torch.linspace(1, 0, n - 2)]) @ orthogonal(n).T
    equal_at_the_cut = orthogonal(n) * torch.cat([torch.tensor([3.0, 2.0, 2.0]), torch.zeros(n - 3)]) @ orthogonal(n).T
    for W in (torch.eye(n), orthogonal(n), equal_pair, equal_at_the_cut):
        assert leading_triplets(W, 2).angle == math.inf


def test_zero_and_rank_one_weights_have_pairs_of_zero() -> None:
    found = leading_triplets(torch.zeros(30, 20), 2)
    assert not found.V.any() and not found.U.any() and found.angle == 0.0
    for rows, columns in ((30, 20), (400, 600)):
        u, v = torch.randn(rows), torch.randn(columns)
        found = leading_triplets(torch.outer(u, v), 2)
        assert found.angle <= ANGLE
        torch.testing.assert_close(found.S, torch.tensor([u.norm() * v.norm(), 0.0]).double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.V[0].abs(), (v / v.norm()).abs().double(), rtol=1e-5, atol=1e-6)
        assert not found.V[1].any() and not found.U[1].any()


def test_a_steep_spectrum_is_resolved() -> None:
    n = 300
    S = torch.cat([torch.tensor([1.0, 1e-5, 5e-6]), torch.full((n - 3,), 1e-8)]).double()
    W = orthogonal(n).double() * S @ orthogonal(n).double().T
    found = leading_triplets(W, 2)
    assert found.angle <= ANGLE and sines(W, found).max() < 1e-6


def test_without_an_accelerator_torch_is_not_asked_which(monkeypatch) -> None:
    def raises() -> None:  # as torch 2.6 does
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", raises)
    with exact_products():
        assert torch.get_float32_matmul_precision() == "highest"
