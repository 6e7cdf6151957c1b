"""Files on disk: lazy tensors in, streamed tensors out."""
