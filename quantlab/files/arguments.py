"""Checks of argument types for functions that are called from Python.

Each raises a TypeError that names the first wrong argument.
"""

import os
from numbers import Integral, Real

__all__ = ["check_number", "check_path", "check_whole"]


def check_whole(**values: object) -> None:
    """Refuse arguments that are not whole numbers; None is left to the caller.

    Examples
    --------
    >>> check_whole(n_ctx=512, chunks=None)
    """
    _check(values, lambda value: isinstance(value, Integral), "must be a whole number. Give one such as 512")


def check_number(**values: object) -> None:
    """Refuse arguments that are not numbers; None is left to the caller."""
    _check(values, lambda value: isinstance(value, Real), "must be a number. Give one such as 4.5")


def check_path(**values: object) -> None:
    """Refuse arguments that are not paths or names, None included."""
    for name, value in values.items():
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"{name}={value!r:.80}, must be a path or a name. Give a str or a Path.")


def _check(values: dict[str, object], fits, rule: str) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not fits(value)):
            raise TypeError(f"{name}={value!r:.80}, {rule}.")
