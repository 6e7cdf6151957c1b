"""Regular expressions over tensor names, as `--tensor-type` takes them, in bounded time.

An expression such as `(.+)+x` can try ever more ways to fit a name, and Python's matching cannot be interrupted. What
could do so is matched in a process of its own, which is given up after `PATIENCE` seconds.
"""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable

PATIENCE = 5.0  # seconds
# a repeated group, four repetitions, or many choices
_COULD_TAKE_LONG = re.compile(r"\)[*+{]|([*+{?].*){4}|(\|.*){12}", re.DOTALL)
_MATCH = """
import json, re, sys
regex, names = json.load(sys.stdin)
print(*[int(re.search(regex, name) is not None) for name in names])
"""


def compile_expression(text: str, names: Iterable[str]) -> Callable[[str], bool]:
    """Compile an expression in lower case, as llama-quantize does.

    Parameters
    ----------
    text : str
        A regular expression in the ECMAScript form, as far as Python reads it alike.
    names : iterable of str
        All names that will be asked for.

    Returns
    -------
    callable
        Whether the expression is found in a name.

    Raises
    ------
    ValueError
        If `text` is not a regular expression, or takes too long.

    Examples
    --------
    >>> is_found = compile_expression(r"ATTN_(q|k)\\.", ["blk.0.attn_q.weight", "blk.0.attn_v.weight"])
    >>> is_found("blk.0.attn_q.weight"), is_found("blk.0.attn_v.weight")
    (True, False)
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # a class such as [[:digit:]] would fit something else
            regex = re.compile(text.lower())
    except (re.error, FutureWarning) as error:
        raise ValueError(f"tensor type: name={text}, must be a regular expression ({error}). Correct it.") from None
    if _COULD_TAKE_LONG.search(text):
        return _found_in_time(text, list(names)).__contains__
    return lambda name: regex.search(name) is not None


def _found_in_time(text: str, names: list[str]) -> set[str]:
    """Return the names that an expression matches, by matching in another process."""
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    question = json.dumps([text.lower(), names])
    try:
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"tensor type: name={text}, must be matched with every name within {PATIENCE:g} s. "
            "Write it without nested repetitions."
        ) from None
    return {name for name, is_found in zip(names, done.stdout.split(), strict=True) if is_found == "1"}
