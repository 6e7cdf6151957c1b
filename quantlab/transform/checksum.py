"""Notice that a tensor changed, at the speed of memory; against accidents, not against forgers.

A cryptographic digest of the source would take a third of the time of quantizing it. Here every 8 bytes, with a key of
their place, go into two sums, whose order does not matter to the processor; SHA-256 takes the sums, once per slab.

Source: the products are those of NH in UMAC (J. Black and others, 1999), as in XXH3 (xxHash, Y. Collet).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numba import njit

_KEY, _STEP = np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x9E3779B185EBCA87)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@njit(cache=True, nogil=True)
def _sums(words):
    """Sum uint64 words with their keys, and the products of their halves."""
    products, sums = np.uint64(0), np.uint64(0)
    for i in range(words.size):
        keyed = words[i] ^ (np.uint64(i) * _STEP + _KEY)
        products += (keyed & _LOW) * (keyed >> _HALF)
        sums += keyed
    return products, sums


def mixed(piece: np.ndarray) -> bytes:
    """Return what a checksum takes of an array: its sums, its size, the bytes that fill no word."""
    raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
    whole = raw.size // 8 * 8
    words = raw[:whole]
    if words.ctypes.data % 8:
        words = words.copy()
    return np.array([*_sums(words.view(np.uint64)), raw.size], np.uint64).tobytes() + raw[whole:].tobytes()


class Checksum:
    """A checksum that is fed piece by piece; the cuts between the pieces count.

    Examples
    --------
    >>> one, other = Checksum(), Checksum()
    >>> one.update(np.arange(100)), other.update(np.arange(101))
    (None, None)
    >>> one.hexdigest() == other.hexdigest()
    False
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, piece: np.ndarray) -> None:
        """Take the bytes of an array."""
        self.add(mixed(piece))

    def add(self, piece: bytes) -> None:
        """Take what `mixed` made of an array, perhaps in another thread."""
        self._sha.update(piece)

    def hexdigest(self) -> str:
        """Return the checksum of all pieces as 64 hexadecimal digits."""
        return self._sha.hexdigest()
