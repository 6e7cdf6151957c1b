"""Resources of the machine and their use by this process, on every system."""

import sys


def physical_memory() -> int:
    """Return the bytes of memory that the machine has.

    Examples
    --------
    >>> physical_memory() > 2**28
    True
    """
    import psutil

    return psutil.virtual_memory().total


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
