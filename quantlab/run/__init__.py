"""Run models with llama.cpp itself, through xllamacpp: memory, chat, generation and a server."""
