"""The weights of all adapted modules -> their bases: from the cache, from the Hub, or computed, one module at a time.

A basis that was not computed here is believed only after [`residual`] says that it is one of the weight at hand, which
costs one pass over that weight. Where one is missing or does not pass, it is computed and the cache written anew.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from . import basis_cache
from .basis import Basis, compute_basis, place_sigma, residual
from .basis_hub import fetch
from .source import WeightSource


logger = logging.getLogger(__name__)

# `basis.residual` of kept factors in fp32, a few times what rounding gives. The same weights rounded to bf16 give 1e-3.
KEPT_TOLERANCE = 2e-5
SECONDS_UNTIL_PROGRESS = 3
SECONDS_BETWEEN_WRITES = 60  # of the cache while modules are computed


class Request(NamedTuple):
    """A module that needs a basis.

    Args:
        key (`str`): its name in the base model.
        shape (`tuple[int, ...]`): of its weight W, (out, in) or (experts, out, in).
        r (`int`): rank.
        read (`Callable`): gives W, whole, in fp32 or better. Called once for each request, in order, on every process.
    """

    key: str
    shape: tuple[int, ...]
    r: int
    read: Callable[[], torch.Tensor]


def build_bases(requests: Sequence[Request], source: WeightSource, *, sigma: str, canonical: bool) -> dict[str, Basis]:
    """The bases of modules of one base model.

    Args:
        requests (`Sequence[Request]`): in model order.
        source ([`WeightSource`]): the base model, the form of its weights, and the repository of basis files that is
            asked where the cache has none. A model without a name is not cached.
        sigma (`str`): where the singular values go; the cache holds bases for both.
        canonical (`bool`): as in [`compute_basis`].

    Returns:
        `dict[str, Basis]`: by key, on the device that the weight was read to.

    Raises:
        BasisError: names the module.
    """
    if not requests:
        return {}
    name = file_name(requests, source, canonical)
    path = basis_cache.place(source.base, name)
    kept = {} if path is None else basis_cache.read(path)
    fetched = None
    if not kept and source.repository is not None:
        fetched = fetch(source.repository, name)
        kept = {} if fetched is None else basis_cache.read(fetched)
    bases, computed, wrong, written = {}, 0, 0, time.monotonic()
    for request in tqdm(requests, desc="Basis", unit="module", delay=SECONDS_UNTIL_PROGRESS, leave=False):
        W = request.read()
        basis = verified(kept.get(request.key), W, request)
        if basis is None:
            basis = compute_basis(W, request.r, "left", canonical, request.key)
            computed += 1
            wrong += request.key in kept
        bases[request.key] = basis
        del W  # before the next one is read
        is_due = computed and time.monotonic() - written > SECONDS_BETWEEN_WRITES
        if is_due and path is not None and not basis.A.is_meta:
            # So that a kill costs the modules since the last time.
            basis_cache.write(path, kept | bases, source.base, source.form)
            written = time.monotonic()
    if wrong:
        logger.warning(
            "%d of %d modules have other weights than the kept basis %s: computed anew.",
            wrong,
            len(requests),
            path if fetched is None else f"{name} of {source.repository}",
        )
    if path is not None and (computed or fetched is not None) and not any(basis.A.is_meta for basis in bases.values()):
        basis_cache.write(path, bases, source.base, source.form)
    return {key: place_sigma(basis, sigma) for key, basis in bases.items()}


def file_name(requests: Sequence[Request], source: WeightSource, canonical: bool = True) -> str:
    """The name of the file that the bases of these modules are kept in, here and on the Hub."""
    return basis_cache.file_name(source.form, canonical, ((q.key, q.shape, q.r) for q in requests))


def verified(basis: Basis | None, W: torch.Tensor, request: Request) -> Basis | None:
    """A kept basis, singular values on the left, on the device of the weight; `None` if it is not one of that weight."""
    if basis is None or W.is_meta:
        return None
    *experts, rows, columns = request.shape
    if basis.A.shape != (*experts, request.r, columns) or basis.B.shape != (*experts, rows, request.r):
        return None
    basis = Basis(basis.A.to(W), basis.B.to(W), basis.angle)
    return basis if residual(W, basis.A, basis.B) <= KEPT_TOLERANCE else None
