"""Checksums of tensors, against the same sums in whole numbers."""

import hashlib

import numpy as np

from quantlab.transform.checksum import Checksum

M = (1 << 64) - 1


def naive(pieces):
    """The definition, in Python's integers."""
    sha = hashlib.sha256()
    for piece in pieces:
        raw, products, sums = piece.tobytes(), 0, 0
        whole = len(raw) // 8 * 8
        for i in range(whole // 8):
            word = int.from_bytes(raw[8 * i : 8 * i + 8], "little")
            keyed = word ^ (i * 0x9E3779B185EBCA87 + 0xC2B2AE3D27D4EB4F & M)
            products, sums = products + (keyed & 0xFFFFFFFF) * (keyed >> 32) & M, sums + keyed & M
        sha.update(b"".join(n.to_bytes(8, "little") for n in (products, sums, len(raw))) + raw[whole:])
    return sha.hexdigest()


def checksum(pieces):
    total = Checksum()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def test_checksum_equals_its_definition(rng):
    for n in (0, 1, 7, 8, 33, 1000):
        pieces = [rng.integers(0, 256, n, np.uint8), rng.standard_normal((3, 5)).astype(np.float16)]
        assert checksum(pieces) == naive(pieces)
    odd = rng.integers(0, 256, 101, np.uint8)[1:]
    assert checksum([odd]) == naive([odd])


def test_every_bit_counts(rng):
    raw = rng.integers(0, 256, 200, np.uint8)
    changed = [raw.copy() for _ in range(raw.size)]
    for i, other in enumerate(changed):
        other[i] ^= 1 << (i % 8)
    assert len({checksum([other]) for other in [raw, *changed]}) == 201


def test_order_counts(rng):
    """The sums themselves have no order; the keys give them one."""
    words = rng.integers(0, 1 << 62, 64)
    swapped = [words.copy() for _ in range(63)]
    for i, other in enumerate(swapped):
        other[[i, i + 1]] = other[[i + 1, i]]
    assert len({checksum([other]) for other in [words, *swapped]}) == 64
    assert checksum([words[:32], words[32:]]) != checksum([words[32:], words[:32]])
