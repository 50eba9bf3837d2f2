"""A model, its targets and a config -> what each target gets: group, rank, basis, projection.

Everything that can fail, for every target, before the first module is replaced.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from .basis import Basis, compute_basis
from .build import Request, build_bases
from .config import TinyLoraConfig, conventions_of
from .errors import BasisError, ConfigError
from .experts import wrapper_of_parameter
from .layer import TinyLoraLayer
from .projection import draw_projection, seed_of_target
from .source import WeightSource
from .targets import Target, find_targets
from .tying import group_modules, group_modules_by_ratio
from .weight import (
    check_parameter,
    check_supported,
    dense_matrix,
    matrix_shape,
    parameter_matrix,
    parameter_shape,
    quantization_backend,
)


# Of all modules together, 1.1 GB in fp32. The paper's largest, u=512 on 196 modules, has 401,408.
MOST_PROJECTION_NUMBERS = 2**28


class Assignment(NamedTuple):
    """What one target, a module or a parameter, gets."""

    matrix_names: tuple[str, ...]  # one, or one for each expert
    groups: tuple[str, ...]  # of each of them
    r: int
    basis: Basis | None  # None: to be loaded
    make_basis: Callable[[TinyLoraLayer], Basis]  # for one that is not loaded after all
    projection: torch.Tensor  # (u, r, r), or (experts, u, r, r)
    backend: QuantizationBackend | None  # None: the weight is a floating point one


def assign(
    model: nn.Module, targets: list[Target], config: PeftConfig, twin: str | None = None
) -> dict[str, Assignment]:
    """Settle what each target gets.

    Args:
        model (`nn.Module`): the base model, or one with adapters. Not changed.
        targets (`list[Target]`): in model order.
        config (`PeftConfig`): the adapter's.
        twin (`str`, *optional*): name of an adapter whose factors the new one takes, even if they came from a file.

    Returns:
        `dict[str, Assignment]`: by the target's key.

    Raises:
        UnsupportedModuleError, BasisError, TyingError: name the target.
    """
    conventions = conventions_of(config)
    groups = groups_of(targets, config)
    if not read_from_file(config):
        warn_if_overparametrised(config, groups)

    weights = {target.key: TargetWeight(model, target.key, target.parameter_name) for target in targets}
    ranks = {key: bounded_rank(config, weight.matrix_shape(), key) for key, weight in weights.items()}
    check_size_of_projections(config, sum(len(target.names) * ranks[target.key] ** 2 for target in targets))
    source = WeightSource(model, config, weights.values())
    assignments, requests = {}, []
    for index, (key, own_names, _) in enumerate(targets):
        weight = weights[key]
        r = ranks[key]
        basis = None
        if twin is not None and weight.adapted is not None and twin in weight.adapted.tinylora_A:
            basis, projection = weight.adapted.copy_of_factors(twin)
        else:
            projection = projection_of(config, own_names, index, r, stacked=len(weight.matrix_shape()) == 3)
            if not read_from_file(config):
                requests.append(request_of(source, key, weight, r))

        make_basis = functools.partial(
            basis_of_layer,
            source=source,
            r=r,
            sigma=conventions.sigma,
            canonical=conventions.from_paper,
            name=key,
        )
        own_groups = tuple(str(groups[name]) for name in own_names)
        assignments[key] = Assignment(
            tuple(own_names), own_groups, r, basis, make_basis, projection, weight.quantization_backend
        )
    bases = build_bases(requests, source, sigma=conventions.sigma, canonical=conventions.from_paper)
    return {key: given._replace(basis=bases.get(key, given.basis)) for key, given in assignments.items()}


def groups_of(targets: Sequence[Target], config: PeftConfig) -> dict[str, int]:
    """Which v each matrix reads: its name -> group, in model order."""
    conventions = conventions_of(config)
    names = [name for target in targets for name in target.names]
    if conventions.tie is not None:
        return group_modules(names, conventions.tie, conventions.n_tie)
    return group_modules_by_ratio(names, config.weight_tying)


def requests_of(model: nn.Module, config: PeftConfig) -> tuple[list[Request], WeightSource]:
    """The bases that a config needs of a base model, for building them without an adapter.

    Args:
        model (`nn.Module`): the base model.
        config (`PeftConfig`): its `target_modules` and `r`.

    Raises:
        UnsupportedModuleError, BasisError: name the target.
    """
    weights = {
        target.key: TargetWeight(model, target.key, target.parameter_name) for target in find_targets(model, config)
    }
    source = WeightSource(model, config, weights.values())
    requests = [
        request_of(source, key, weight, bounded_rank(config, weight.matrix_shape(), key))
        for key, weight in weights.items()
    ]
    return requests, source


def request_of(source: WeightSource, name: str, weight: "TargetWeight | TinyLoraLayer", r: int) -> Request:
    """What [`build_bases`] needs to know of a target, or of an adapted layer."""
    return Request(name, weight.matrix_shape(), r, functools.partial(read_weight, source, name, weight))


def projection_of(config: PeftConfig, names: Sequence[str], index: int, r: int, stacked: bool) -> torch.Tensor:
    """P of one target, from the seed of its config.

    Args:
        config (`PeftConfig`): the adapter's.
        names (`Sequence[str]`): of its matrices, one for each expert.
        index (`int`): which target it is, in model order; PEFT's seeds depend on it.
        r (`int`): rank.
        stacked (`bool`): whether the weight is a stack of experts.

    Returns:
        `torch.Tensor`: shape (u, r, r), or (experts, u, r, r); float32, on the CPU.
    """
    from_paper = conventions_of(config).from_paper
    seeds = [seed_of_target(config.projection_seed, name, index, from_paper) for name in names]
    draws = torch.stack([draw_projection(config.u, r, seed) for seed in seeds])
    return draws if stacked else draws[0]


def read_weight(source: WeightSource, name: str, weight: "TargetWeight | TinyLoraLayer") -> torch.Tensor:
    """W of a target or of an adapted layer, from the model or from its checkpoint, as the config says."""
    original = source.read_original(name, weight.get_base_layer(), weight.quantization_backend, weight.matrix_shape())
    return weight.unmerged_matrix() if original is None else original


def basis_of_layer(
    layer: TinyLoraLayer, *, source: WeightSource, r: int, sigma: str, canonical: bool, name: str
) -> Basis:
    """The basis of one adapted layer, computed; see [`compute_basis`]."""
    return compute_basis(read_weight(source, name, layer), r, sigma, canonical, name)


class TargetWeight:
    """The weight of a target, whose module may be adapted already.

    Args:
        model (`nn.Module`): the model.
        key (`str`): name of the module, or of the parameter.
        parameter_name (`str`, *optional*): the last part of `key`, where it names a parameter.

    Raises:
        UnsupportedModuleError: if no basis can be taken from it; names it.
    """

    def __init__(self, model: nn.Module, key: str, parameter_name: str | None) -> None:
        module = model.get_submodule(key if parameter_name is None else key.rpartition(".")[0])
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        self.adapted: TinyLoraLayer | None = None
        self.quantization_backend = None
        if parameter_name is None:
            if isinstance(module, TinyLoraLayer):
                self.adapted = module
                self.quantization_backend = module.quantization_backend
            else:
                self.quantization_backend = quantization_backend(layer, model)
                check_supported(layer, key, self.quantization_backend)
            self._shape: tuple[int, ...] = matrix_shape(layer)
        else:
            check_parameter(getattr(layer, parameter_name), key)
            self.adapted = wrapper_of_parameter(module, parameter_name)
            self._shape = parameter_shape(layer, parameter_name)
        self._layer, self._parameter_name = layer, parameter_name

    def get_base_layer(self) -> nn.Module:
        """The module whose weight it is, without a tuner's layer around it."""
        return self._layer

    def matrix_shape(self) -> tuple[int, ...]:
        """Shape (out, in), or (experts, out, in)."""
        return self._shape

    def unmerged_matrix(self) -> torch.Tensor:
        """W (out, in), or (experts, out, in), in fp32 or better."""
        if self.adapted is not None:
            return self.adapted.unmerged_matrix()
        if self._parameter_name is not None:
            return parameter_matrix(self._layer, self._parameter_name)
        return dense_matrix(self._layer, self.quantization_backend)


def read_from_file(config: PeftConfig) -> bool:
    """Whether a config was read from an adapter's folder, so that its factors are about to be loaded."""
    return isinstance(config, TinyLoraConfig) and config.is_from_file


def bounded_rank(config: PeftConfig, shape: tuple[int, ...], name: str) -> int:
    """`config.r`; the smallest side of the weight where a config of PEFT's asks for more, as PEFT does.

    Raises:
        BasisError: if `r` of one of this package's configs is larger than that; names the module.
    """
    smallest = min(shape[-2:])
    if config.r <= smallest:
        return config.r
    message = (
        f"r={config.r} is larger than the smallest side of module {name!r}, whose weight is "
        f"{' x '.join(map(str, shape))}"
    )
    from_peft = not isinstance(config, TinyLoraConfig) or (config.is_from_file and not config.uses_paper_conventions)
    if not from_peft:
        raise BasisError(f"{message}. Use r={smallest} or less, or name the module in `exclude_modules`.")
    if not config.inference_mode:
        warnings.warn(f"{message}: this module gets rank {smallest}.", stacklevel=2)
    return smallest


def check_size_of_projections(config: PeftConfig, entries_of_R: int) -> None:
    """Raise a [`ConfigError`] where r and u, which a downloaded config may set, ask for gigabytes of projections."""
    numbers = config.u * entries_of_R
    if numbers > MOST_PROJECTION_NUMBERS:
        raise ConfigError(
            f"r={config.r}, u={config.u}: the projections of all modules would take {numbers * 4 / 1e9:.3g} GB, and at "
            f"most {MOST_PROJECTION_NUMBERS * 4 / 1e9:.3g} GB are drawn. Use a smaller u or r."
        )


def warn_if_overparametrised(config: PeftConfig, groups: dict[str, int]) -> None:
    """Warn where even the v that most modules read has more numbers than the R of all of them have entries."""
    members = max(Counter(groups.values()).values(), default=1)
    most = config.r**2 * members
    if config.u > most:
        warnings.warn(
            f"u={config.u} numbers are trained for {members} module(s) with r={config.r}, which can tell only "
            f"{most} of them apart; the rest change nothing but the step size. Use u={most} or less.",
            stacklevel=2,
        )
