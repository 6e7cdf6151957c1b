"""File to file: convert, choose types, plan, quantize."""
