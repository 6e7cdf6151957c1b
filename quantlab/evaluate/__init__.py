"""Evaluation of models: forward pass, perplexity, divergence, importance matrices and refinement."""
