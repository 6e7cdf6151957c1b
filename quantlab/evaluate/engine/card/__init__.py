"""The engine for graphics cards; only `engine.torch` imports it, if torch is installed."""
