"""Conversion, choice of types, planning and quantization of model files."""
