"""numba's njit, with a cache that is never used for a changed kernel.

To see whether a compiled kernel is still good, numba looks at the file that the kernel is in. But its machine code
holds that of the kernels it calls, and its types are classes of this package: after an update that changed only those,
numba would run what is out of date, or fail to read it. Here a kernel is good as long as no file with kernels changed.
"""

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import numba.core.config
from numba.extending import intrinsic as numba_intrinsic

config: Any = numba.core.config  # numba sets its names from the environment, so that no checker of types sees them


@cache
def sources_digest() -> str:
    """Return a digest of all files that kernels may come from: those of quants, and others that name what makes one."""
    package = Path(__file__).parents[1]
    sources = [path.read_bytes() for path in sorted((package / "quants").rglob("*.py"))]
    others = [path.read_bytes() for path in sorted((package / "evaluate").rglob("*.py"))]
    sources += [text for text in others if b"njit" in text or b"intrinsic" in text]
    return sha256(b"".join(sources)).hexdigest()


def njit(function: Callable | None = None, /, **options) -> Any:
    """Compile a function as `numba.njit` does; `cache` keeps it for later processes.

    Examples
    --------
    >>> @njit(nogil=True)
    ... def twice(x):
    ...     return x + x
    >>> twice(2)
    4
    """
    if function is None:
        return lambda function: njit(function, **options)
    kernel = numba.njit(**options)(function)
    if options.get("cache") and not config.DISABLE_JIT:
        index = kernel._cache._cache_file  # pyright: ignore[reportAttributeAccessIssue]
        index._version = f"{index._version} {sources_digest()}"  # looked at before anything else in the file is read
    return kernel


def intrinsic(function: Callable) -> Any:
    """Make a function that builds LLVM code callable from kernels: `numba.extending.intrinsic`.

    Kernels call it without the first parameter, which is numba's own.
    """
    return numba_intrinsic(function)
