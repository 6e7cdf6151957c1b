"""files/torch_zip.py: torch files without torch; a pickle that asks for more than tensors is refused by name."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from checkpoints import DTYPES, write_torch, write_torch_legacy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlab.files.torch_zip import read_torch


def made(rng):
    return {
        f"x{i}": rng.standard_normal((3, 4 + i), np.float32).astype(dtype) for i, dtype in enumerate(DTYPES.values())
    }


@pytest.mark.parametrize("write", [write_torch, write_torch_legacy])
def test_tensors_come_back(tmp_path, rng, write):
    weights = made(rng)
    write(tmp_path / "a.pth", weights)
    found = read_torch(tmp_path / "a.pth")
    assert list(found) == list(weights)
    for name, value in weights.items():
        assert found[name].shape == value.shape
        assert np.array_equal(found[name].rows(0, 3), value) and np.array_equal(found[name].rows(1, 2), value[1:2])


def zipped(path, pickled: bytes, **entries: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(f"a/{name.replace('__', '/')}", content)
    return path


class Command:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(numel=4, offset=0, shape=(4,), stride=(1,), kind="FloatStorage") -> bytes:
    """Return the pickle of a table with one tensor on storage "0"."""

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    storage = text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + b"J" + struct.pack("<i", numel)
    view = b"J" + struct.pack("<i", offset) + numbers(shape) + numbers(stride) + b"\x89}"
    return b"\x80\x02}" + text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + view + b"tRs."


HOSTILE = {
    "os.system": (pickle.dumps({"x": Command(os.system, "touch pwned")}, 2), "pickle names '(posix|nt).system'"),
    "nested reduce": (
        pickle.dumps({"x": Command(getattr, Command(__import__, "os"), "system")}, 2),
        "pickle names '__builtin__.getattr', only tensors are read",
    ),
    "protocol 4": (pickle.dumps({"x": Command(os.system, "true")}, 4), "pickle names '(posix|nt).system'"),
    "missing memo": (b"\x80\x02}q\0h\7.", "pickle reads memo 7, which does not exist"),
    "instance": (b"\x80\x02(cos\nsystem\no.", "pickle names 'os.system'"),
    "extension": (b"\x80\x02\x82\1.", "pickle uses EXT1"),
    "called table": (b"\x80\x02})R.", "pickle calls a function that does not build tensors"),
    "open group": (b"\x80\x02]e.", "pickle closes a group that it did not open"),
    "empty stack": (b"\x80\x020.", "pickle uses POP"),
    "is truncated": (b"\x80\x02}X\xff\xff\xff\x7fabc", "broken pickle"),
    "no tensors": (pickle.dumps({"x": 1}, 2), "holds no tensors"),
    "a list": (pickle.dumps([1], 2), "holds a list, need a table of tensors"),
    "steps": (b"\x80\x02" + b"]" * 2_000_100 + b".", "pickle takes more than 2000000 steps"),
    "past the storage": (
        tensor(shape=(5,)),
        r"tensor of shape \(5,\), strides \(1,\), from element 0 in a storage of 4",
    ),
    "huge shape": (tensor(shape=(1 << 30,) * 3, stride=(1,) * 3), "in a storage of 4"),
    "negative offset": (tensor(offset=-1), "inconsistent"),
    "strides past the storage": (
        tensor(shape=(2, 2), stride=(3, 1)),
        r"strides \(3, 1\), from element 0 in a storage of 4",
    ),
    "repeated element": (tensor(shape=(1 << 30,), stride=(0,)), r"strides \(0,\), from element 0 in a storage of 4"),
    "strides of three axes": (
        tensor(shape=(1, 2, 2), stride=(4, 1, 2)),
        r"x: shape \(1, 2, 2\) has strides \(4, 1, 2\)",
    ),
    "unknown storage": (tensor(kind="QInt8Storage"), "pickle names 'torch.QInt8Storage'"),
}


@pytest.mark.parametrize(("name", "case"), HOSTILE.items(), ids=HOSTILE)
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, monkeypatch, name, case):
    monkeypatch.chdir(tmp_path)
    path = zipped(tmp_path / "a.pth", case[0], data__0=bytes(16))
    with pytest.raises(ValueError, match=case[1]) as caught:
        read_torch(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize(
    ("offset", "shape", "strides"), [(0, (3, 4), (1, 3)), (1, (2, 3), (4, 1)), (2, (5,), (2,)), (1, (2, 2), (6, 2))]
)
def test_strided_tensors_are_read_as_torch_shows_them(tmp_path, offset, shape, strides):
    storage = np.arange(12, dtype=np.float32)
    path = zipped(tmp_path / "a.pth", tensor(12, offset, shape, strides), data__0=storage.tobytes())
    expected = np.lib.stride_tricks.as_strided(storage[offset:], shape, [4 * stride for stride in strides])
    found = read_torch(path)["x"]
    assert found.shape == shape and np.array_equal(found.rows(0, found.nrows).reshape(shape), expected)
    for row in range(found.nrows):
        assert np.array_equal(found.rows(row, row + 1), np.atleast_2d(expected)[row : row + 1])


def test_bad_archives_get_one_line(tmp_path):
    good = tensor()
    assert list(read_torch(zipped(tmp_path / "a.pth", good, data__0=bytes(16)))) == ["x"]
    with pytest.raises(ValueError, match="'data/0': found nothing, need 16 bytes"):
        read_torch(zipped(tmp_path / "a.pth", good))
    with pytest.raises(ValueError, match="'data/0': found 12 bytes, need 16"):
        read_torch(zipped(tmp_path / "a.pth", good, data__0=bytes(12)))
    with pytest.raises(ValueError, match=r"'data/\\x00': found nothing"):
        read_torch(zipped(tmp_path / "a.pth", good.replace(text("0"), text("\0"))))
    with pytest.raises(ValueError, match="byte order is not little-endian"):
        read_torch(zipped(tmp_path / "a.pth", good, data__0=bytes(16), byteorder=b"big"))
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):  # a bomb: 100 MB of zeros in 100 kB
        with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
            archive.writestr("a/data.pkl", good, method)
            archive.writestr("a/data/0", bytes(100_000_000), zipfile.ZIP_DEFLATED)
        with pytest.raises(ValueError, match="is compressed, must be stored"):
            read_torch(tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        for name in ("/a/data.pkl", "../a/data.pkl"):  # names are looked up, no file of that name is touched
            archive.writestr(name, good)
    with pytest.raises(ValueError, match="2 entries called data.pkl, need one"):
        read_torch(tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("a/other", "x")
    with pytest.raises(ValueError, match="0 entries called data.pkl, need one"):
        read_torch(tmp_path / "b.pth")
    (tmp_path / "c.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:60])
    with pytest.raises(ValueError, match="broken torch file"):
        read_torch(tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(b"GGUF....")
    with pytest.raises(ValueError, match="first bytes are b'GGUF', need a torch file"):
        read_torch(tmp_path / "d.pth")
    (tmp_path / "e.pth").write_bytes(pickle.dumps({"x": 1}, 2))
    with pytest.raises(ValueError, match="is a pickle that torch did not write"):
        read_torch(tmp_path / "e.pth")
    with pytest.raises(FileNotFoundError, match="no.pth: no such file"):
        read_torch(tmp_path / "no.pth")


def test_a_truncated_legacy_file_gets_one_line(tmp_path, rng):
    write_torch_legacy(tmp_path / "a.pth", made(rng))
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-8])
    with pytest.raises(ValueError, match="storage '2': 18 elements, need 18 in"):
        read_torch(tmp_path / "a.pth")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), legacy=st.booleans())
def test_any_damage_is_refused_in_one_line_or_does_no_harm(tmp_path, data, legacy):
    path = tmp_path / "a.pth"
    weights = {"x": np.ones((2, 3), np.float32), "y": np.ones(4, np.float16)}
    (write_torch_legacy if legacy else write_torch)(path, weights)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 8))
        raw[at : at + 4] = data.draw(st.binary(max_size=6))
    path.write_bytes(raw)
    try:
        read_torch(path)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))
