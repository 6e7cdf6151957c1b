"""How good is it: the forward pass, perplexity and divergence; importance matrices."""
