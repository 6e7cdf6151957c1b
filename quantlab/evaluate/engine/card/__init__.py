"""What computes on a graphics card. Only `engine.torch` imports from here, and only where torch is installed."""
