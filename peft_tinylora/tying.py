"""Names of the target modules, in model order -> which trained vector v each of them reads.

The paper's two ways (section 4; figure 4 pins the definitions): *tiled*, where neighbours in model order share whatever
their type, and *structured*, where neighbours of the same type share. Tiled is the better one in the paper.
"""

import re
from collections.abc import Mapping, Sequence

from .errors import TyingError


def group_modules(names: Sequence[str], tie: str | Mapping[str, str], n_tie: int | None) -> dict[str, int]:
    """Assign every module to a group; the modules of a group share one v.

    Args:
        names (`Sequence[str]`): full names of the target modules in model order.
        tie (`str` or `Mapping[str, str]`): `"none"`, `"full"`, `"tiled"`, `"structured"`, or a mapping of group name
            to a regular expression that the whole module name must match.
        n_tie (`int`, *optional*): how many modules share a v. With `"tiled"` there are ceil(len(names) / n_tie)
            groups; with `"structured"`, and with a mapping, that many for each type or each name of the mapping.
            `None` with a mapping: one group for each name.

    Returns:
        `dict[str, int]`: module name -> group, in model order, the groups numbered as they are first met.

    Raises:
        TyingError: if a module matches no pattern or several, or a pattern matches no module.
    """
    if tie == "none":
        return {name: index for index, name in enumerate(names)}
    if tie == "full":
        return dict.fromkeys(names, 0)
    if isinstance(tie, Mapping):
        families = _by_pattern(names, tie)
    else:
        families = {"": list(names)} if tie == "tiled" else _by_type(names)

    runs = {}
    for family, members in families.items():
        size = n_tie or len(members)
        runs.update({name: (family, index // size) for index, name in enumerate(members)})
    numbers = {run: number for number, run in enumerate(dict.fromkeys(runs[name] for name in names))}
    return {name: numbers[runs[name]] for name in names}


def group_modules_by_ratio(names: Sequence[str], weight_tying: float) -> dict[str, int]:
    """PEFT's own rule for `weight_tying`, kept as it is so that its configs mean what they mean there.

    The remainder all lands in the last group: 28 modules at 0.4 give 16 groups of one and one of 12.

    Args:
        names (`Sequence[str]`): full names of the target modules in model order.
        weight_tying (`float`): from 0.0, a v for each module, to 1.0, one v for all.

    Returns:
        `dict[str, int]`: module name -> group.
    """
    count = max(1, round(len(names) * (1.0 - weight_tying)))
    size = max(1, len(names) // count)
    return {name: min(index // size, count - 1) for index, name in enumerate(names)}


def _by_type(names: Sequence[str]) -> dict[str, list[str]]:
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.rpartition(".")[2], []).append(name)
    return families


def _by_pattern(names: Sequence[str], patterns: Mapping[str, str]) -> dict[str, list[str]]:
    families: dict[str, list[str]] = {group: [] for group in patterns}
    for name in names:
        matches = [group for group, pattern in patterns.items() if re.fullmatch(pattern, name)]
        if len(matches) != 1:
            found = f"matches {matches}" if matches else "matches none"
            raise TyingError(
                f"tie={dict(patterns)!r}: target module {name!r} {found} of the groups; each must match exactly one. "
                "Change the patterns, or name the module in `exclude_modules`."
            )
        families[matches[0]].append(name)
    empty = [group for group, members in families.items() if not members]
    if empty:
        raise TyingError(
            f"tie={dict(patterns)!r}: no target module matches the pattern of {empty}. Remove or mend it."
        )
    return families
