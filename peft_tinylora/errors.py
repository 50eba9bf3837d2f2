"""The errors that this package raises, each also the standard error that it specialises.

A script that catches `ValueError` or `TypeError`, as PEFT's own checks raise, goes on working; a script that wants to
tell an adapter file from a setting can catch the class.
"""


class TinyLoraError(Exception):
    """Base of all errors raised by `peft_tinylora`."""


class ConfigError(TinyLoraError, ValueError):
    """A field of [`TinyLoraConfig`] has a value that cannot be meant: names the field, the value and what is allowed."""


class TyingError(ConfigError):
    """A tying mapping does not fit the modules of the model: names the pattern or the module."""


class UnsupportedModuleError(TinyLoraError, TypeError):
    """A targeted module is of a type, or has a weight, that cannot be adapted: names the module."""


class BasisError(TinyLoraError, ValueError):
    """No basis can be taken from a weight (NaN, Inf, too few rows or columns): names the module."""


class AdapterFileError(TinyLoraError, ValueError):
    """An adapter file lacks tensors, has too many, or has tensors of the wrong shape or value: names them."""


class BasisMismatchError(AdapterFileError):
    """An adapter file holds a basis of other weights than those that it is loaded onto: names the module."""


class MergeError(TinyLoraError, TypeError):
    """Adapters cannot be merged into weights that are stored like this: names the module and what to do instead."""


class HubError(TinyLoraError, OSError):
    """The Hub refused, or could not be reached: says for which repository, why, and what to do."""


class DiskError(TinyLoraError, OSError):
    """A disk is full or read-only: names the folder, and what to do."""


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
