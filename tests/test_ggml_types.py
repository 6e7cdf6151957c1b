"""A type is one record: sizes are ggml's, kernels exist and are imported late, lists follow from the records."""

import subprocess
import sys
from dataclasses import fields

import gguf
import numpy as np
import pytest

from quantlab import quants
from quantlab.quants import ggml_types
from quantlab.quants.ggml_types import FAMILIES, GGML_TYPES, GgmlType

KERNELS = [field.name for field in fields(GgmlType) if field.name.endswith("coder")]


def test_sizes_and_numbers_are_those_of_the_gguf_package():
    for number, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        record = GGML_TYPES[number.name]
        theirs = (32, 36) if number.name == "Q8_1" else (block, nbytes)  # gguf has ggml's old layout of 40 bytes
        assert (record.number, record.block, record.nbytes) == (number, *theirs)


def test_records_are_complete():
    assert len({record.number for record in GGML_TYPES.values()}) == len(GGML_TYPES)
    for record in GGML_TYPES.values():
        assert record.family in FAMILIES, record.name
        assert not record.fallback or GGML_TYPES[record.fallback].block < record.block, record.name
        assert len(record.levels) == (1 << sum(place.width for place in record.codes) if record.codes else 0)
        for name in filter(None, [getattr(record, kernel) for kernel in KERNELS] + [record.validator]):
            assert callable(ggml_types.load(name)), name


def test_the_lists_of_today():
    plain = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    k = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    assert set(ggml_types.WRITABLE) >= {"F32", "F16", "BF16", *plain, *k}
    assert set(ggml_types.WEIGHTED) >= {*plain, *k} - {"Q8_0"}
    assert not {"Q8_1", "Q8_K"} & set(ggml_types.WRITABLE)
    assert {*ggml_types.CANDIDATES} == {*ggml_types.WRITABLE} - {"F32", "F16", "BF16"}
    assert [qtype for qtype in ggml_types.CANDIDATES if qtype in {*k, "Q8_0"}] == [*k, "Q8_0"]


def test_the_records_import_no_numba_and_no_other_room():
    code = (
        "import sys, quantlab.quants.ggml_types as types\n"
        "heavy = ('numba', 'llvmlite', 'pandas', 'gguf', 'quantlab.files')\n"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('quantlab.')}\n"
        "print(sorted(rooms), [m for m in heavy if m in sys.modules], types.row_bytes('Q4_K', 512))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['quants', 'result'] [] 288"


def test_bad_input():
    for function in (quants.block_size, quants.block_bytes, ggml_types.ggml_type, ggml_types.can_decode):
        with pytest.raises(ValueError, match=r"^qtype='Q9_K', must be a ggml type\. See quantlab\.quants\.types\(\)"):
            function("Q9_K")


def test_names_are_understood_in_any_case():
    x = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    data = quants.quantize(x, "q4_k")
    np.testing.assert_array_equal(data, quants.quantize(x, "Q4_K"))
    assert (quants.block_size("q4_k"), quants.row_bytes("q4_k", 256)) == (256, 144)
    np.testing.assert_array_equal(quants.dequantize(data, "q4_k", x.shape), quants.roundtrip(x, "Q4_k"))
    np.testing.assert_array_equal(quants.codes(data, "q4_k"), quants.codes(data, "Q4_K"))
    np.testing.assert_array_equal(quants.grid(data, "q4_k"), quants.grid(data, "Q4_K"))
    assert quants.code_histogram(data, "q4_k").sum() == x.size
    assert quants.errors(x, "q4_k").qtype == "Q4_K"


@pytest.mark.parametrize(("name", "base"), [("Q4_K_M", "Q4_K"), ("q3_k_s", "Q3_K"), ("MXFP4_MOE", "MXFP4")])
def test_the_name_of_a_mixture_is_answered_with_its_type(name, base):
    message = f"^qtype='{name}', must be a ggml type. That is a mixture of types for a whole file: name {base} here"
    with pytest.raises(ValueError, match=message):
        quants.quantize(np.ones((1, 256), np.float32), name)
