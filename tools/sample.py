"""Write text with a trained model, at temperature 1: ``python tools/sample.py FOLDER OUT``."""

import argparse
from pathlib import Path

import sentencepiece as spm
import torch

from export import load
from model import Llama
from quantlab.files.output import replacing

BOS, EOS = 1, 2
SEED = 1
BATCH = 32  # texts written side by side


@torch.no_grad()
def sample_ids(model: Llama, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Draw texts from the model's own distribution.

    Parameters
    ----------
    model : Llama
        The model.
    count, length : int
        Number of texts, and of tokens in each, BOS included; length <= n_ctx.
    generator : torch.Generator
        The source of chance.

    Returns
    -------
    torch.Tensor [shape=(count, length), dtype=int64]
        Token ids; each text begins with BOS.
    """
    ids = torch.full((count, 1), BOS)
    past = model.keys_and_values(count)
    while ids.shape[1] < length:
        logits = model(ids[:, -1:], past, ids.shape[1] - 1)[:, -1].float()
        logits[:, : EOS + 1] = -torch.inf  # text only
        drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        ids = torch.cat((ids, drawn), dim=1)
    return ids


def sample_text(folder: Path, n_bytes: int, *, seed: int = SEED) -> str:
    """Return at least `n_bytes` bytes of text that a model wrote.

    Parameters
    ----------
    folder : Path
        A Hugging Face folder, as `export` writes it.
    n_bytes : int
        Least length of the text in UTF-8, bytes.
    seed : int
        Of the drawing of the first texts; further ones take the numbers after it.

    Returns
    -------
    str
        Texts of n_ctx tokens each, set apart by an empty line; bytes that are not UTF-8 are left out.
    """
    model = load(folder)
    processor = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = ""
    while len(text.encode()) < n_bytes:
        generator = torch.Generator().manual_seed(seed)  # its own for each batch: each can be drawn again by itself
        for ids in sample_ids(model, BATCH, model.shape.n_ctx, generator).tolist():
            text += processor.decode(ids[1:]).replace("\ufffd", "").strip() + "\n\n"
        seed += 1
    return text


def main() -> None:
    """Read the command line, write the file."""
    parser = argparse.ArgumentParser(description="Write text with a trained model, at temperature 1.")
    parser.add_argument(
        "folder", type=Path, help="folder of the model: config.json, model.safetensors, tokenizer.model"
    )
    parser.add_argument("out", type=Path, help="text file to write; one that exists is replaced")
    parser.add_argument(
        "--bytes", type=int, default=1 << 18, help="least length of the text, bytes (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of the drawing (default %(default)s)")
    args = parser.parse_args()
    text = sample_text(args.folder, args.bytes, seed=args.seed)
    with replacing(args.out, overwrite=True) as part:
        part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
