"""USE IT: what a model needs to run, and talking to it, with llama.cpp itself through xllamacpp."""
