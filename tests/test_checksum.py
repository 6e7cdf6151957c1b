"""Checksums of tensors, against the same rounds in whole numbers."""

import hashlib

import numpy as np

from quantlab.transform.checksum import Checksum

M = (1 << 64) - 1


def naive(pieces):
    """The definition, in Python's integers."""
    sha = hashlib.sha256()
    for piece in pieces:
        raw, lanes = piece.tobytes(), [1, 2, 3, 4]
        whole = len(raw) // 32 * 32
        for i in range(0, whole, 8):
            lane = (lanes[i // 8 % 4] + int.from_bytes(raw[i : i + 8], "little") * 0xC2B2AE3D27D4EB4F) & M
            lanes[i // 8 % 4] = (((lane << 31) | (lane >> 33)) & M) * 0x9E3779B185EBCA87 & M
        ends = b"".join(lane.to_bytes(8, "little") for lane in lanes)
        sha.update(ends + raw[whole:] + len(raw).to_bytes(8, "little"))
    return sha.hexdigest()


def checksum(pieces):
    total = Checksum()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def test_checksum_equals_its_definition(rng):
    for n in (0, 1, 31, 32, 33, 1000):
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
