"""The SentencePiece tokenizer of the bundled model, with Llama's settings."""

from pathlib import Path

import numpy as np
import sentencepiece as spm

SEED = 1


def train_tokenizer(corpus: Path, out: Path, n_vocab: int) -> Path:
    """Learn a byte-pair vocabulary from a corpus.

    Parameters
    ----------
    corpus : Path
        Plain text.
    out : Path
        The tokenizer file to write, ``tokenizer.model``.
    n_vocab : int
        Number of pieces, of which 3 are special (``<unk> <s> </s>``) and 256 are single bytes.

    Returns
    -------
    Path
        `out`.
    """
    spm.set_random_generator_seed(SEED)
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(out.with_suffix("")),
        vocab_size=n_vocab,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9999,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        input_sentence_size=200_000,
        shuffle_input_sentence=True,
        num_threads=1,
        minloglevel=2,
    )
    out.with_suffix(".vocab").unlink()
    return out


def encode_file(tokenizer: Path, text: Path, out: Path) -> int:
    """Write a text's token ids (uint16, no BOS) to `out`; return their number."""
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer))
    count = 0
    with open(text, encoding="utf-8") as file, open(out, "wb") as ids:
        while part := file.read(1 << 20):
            part += file.readline()  # never end inside a word
            tokens = np.array(processor.encode(part), dtype=np.uint16)
            tokens.tofile(ids)
            count += tokens.size
    return count
