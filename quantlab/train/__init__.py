"""How the bundled model came to be: corpus, tokenizer, training, sampling. Needs the extra `train`."""
