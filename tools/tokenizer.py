"""The SentencePiece tokenizer of the bundled model, with Llama's settings: ``python tools/tokenizer.py FOLDER``."""

import argparse
from pathlib import Path
from shutil import copyfile

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
    with open(corpus, encoding="utf-8") as file, open(out, "wb") as model:
        spm.SentencePieceTrainer.train(
            # not `input` and `model_prefix`: sentencepiece would store those paths in the model
            sentence_iterator=(line.rstrip("\n") for line in file),
            model_writer=model,
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


def main() -> None:
    """Read the command line, write the tokenizer and the ids of the corpus."""
    parser = argparse.ArgumentParser(description="Learn the tokenizer of a corpus and encode the corpus.")
    parser.add_argument("folder", type=Path, help="folder of corpus.txt; tokenizer.model and the .ids files go there")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="use this one (default: learn a new one)")
    parser.add_argument("--n-vocab", type=int, default=2048, help="pieces to learn (default: %(default)s)")
    args = parser.parse_args()
    corpus, tokenizer = args.folder / "corpus.txt", args.folder / "tokenizer.model"
    if args.tokenizer:
        copyfile(args.tokenizer, tokenizer)
    else:
        train_tokenizer(corpus, tokenizer, args.n_vocab)
    for path in (corpus, corpus.with_suffix(".heldout.txt")):
        print(path.name, encode_file(tokenizer, path, path.with_suffix(".ids")), "tokens")


if __name__ == "__main__":
    main()
