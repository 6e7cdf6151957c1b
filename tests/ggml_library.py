"""The mark for tests that need ggml's own library, whose bytes ours must equal."""

import pytest

from quantlab.lab.ggml_library import dequantize, library, quantize

__all__ = ["dequantize", "library", "needs_libggml", "quantize"]

needs_libggml = pytest.mark.skipif(library() is None, reason="libggml-python is not installed")
