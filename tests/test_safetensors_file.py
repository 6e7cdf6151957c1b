"""files/safetensors_file.py: positions of tensors, from headers that may lie."""

import json
import struct

import numpy as np
import pytest
from checkpoints import DTYPES, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlab.files.safetensors_file import read_safetensors


def test_tensors_come_back_sorted_by_name(tmp_path, rng):
    weights = {name: rng.standard_normal((3, 4), np.float32).astype(DTYPES[name]) for name in DTYPES}
    write_safetensors(tmp_path / "a.safetensors", weights)
    found = read_safetensors(tmp_path / "a.safetensors")
    assert list(found) == sorted(weights)
    for name, value in weights.items():
        assert found[name].dtype == name and np.array_equal(found[name].rows(1, 3), value[1:3])


def test_the_librarys_files_are_read(tmp_path, rng):
    from safetensors.numpy import save_file

    weights = {"a": rng.standard_normal((2, 3)), "b": np.arange(4), "c": np.array(7, np.float32)}
    save_file(weights, tmp_path / "a.safetensors")
    found = read_safetensors(tmp_path / "a.safetensors")
    assert all(
        np.array_equal(found[name].rows(0, found[name].nrows).reshape(v.shape), v) for name, v in weights.items()
    )


def lying(**changes) -> dict:
    return {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes}


BAD = {
    "empty": (b"", "first bytes are b''"),
    "torch": (b"PK\x03\x04" + bytes(60), "This looks like a torch file"),
    "header length": (
        struct.pack("<Q", 1 << 60) + b'{"a": 1}' + bytes(20),
        "header length 1152921504606846976, need at",
    ),
    "no JSON": (b'{"x": ', "the header is not valid JSON"),
    "deep JSON": (b'{"x": ' + b"[" * 100_000, "the header is not valid JSON"),
    "same name": (b'{"x": {}, "x": {}}', r"the header is not valid JSON \(a name occurs twice\)"),
    "broken name": ({"a\nb": 7}, r"tensor name 'a\\nb', need at most 256 printable characters"),
    "no entry": ({"x": 7}, "x: must have dtype, shape and data_offsets"),
    "dtype": (lying(dtype="F8_E8M0"), "x: dtype='F8_E8M0', need one of F32 F16 BF16"),
    "negative": (lying(shape=[-2, -2]), r"x: shape=\[-2, -2\], .* need whole numbers"),
    "fractions": (lying(data_offsets=[0, 16.0]), "need whole numbers"),
    "sizes": (lying(shape=[2, 3]), r"x: data_offsets=\[0, 16\] span 16 bytes, need 24"),
    "overflow": (lying(shape=[1 << 40, 1 << 40]), "span 16 bytes, need"),
    "backwards": (lying(data_offsets=[16, 0]), "span -16 bytes, need 16"),
    "nothing": (lying(shape=[0], data_offsets=[0, 0]), "'x' without any values"),
    "outside": (lying(data_offsets=[100, 116]), "x: ends at byte .*, the file has"),
    "overlap": (lying() | {"y": lying()["x"] | {"data_offsets": [8, 24]}}, "y: overlaps x"),
}


@pytest.mark.parametrize(("name", "case"), BAD.items(), ids=BAD)
def test_bad_headers_get_one_line(tmp_path, name, case):
    path = tmp_path / "a.safetensors"
    content = case[0]
    if isinstance(content, dict):
        content = json.dumps(content).encode()
    if content[:1] == b"{":
        content = struct.pack("<Q", len(content)) + content + bytes(24)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=case[1]) as caught:
        read_safetensors(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_missing_file_gets_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.safetensors: no such file"):
        read_safetensors(tmp_path / "no.safetensors")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_in_one_line_or_does_no_harm(tmp_path, data):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.ones((2, 3), np.float32), "y": np.ones(4, np.float16)})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 8))
        raw[at : at + 4] = data.draw(st.binary(max_size=6))
    path.write_bytes(raw)
    try:
        read_safetensors(path)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))
