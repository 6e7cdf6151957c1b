"""Write the README of a trained model from what its training recorded: ``python tools/card.py FOLDER MODEL``.

FOLDER is where `corpus.py` and `train.py` left corpus.json and history.json; README.md goes into MODEL.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor

from export import load
from model import Llama
from quantlab.files.output import replacing
from sample import SEED, sample_ids

_TEXT = """# A tiny Llama to try quantization on

A Llama of {weights:.2f} million weights in BF16, trained for this project on technical English. Every measurement of
the workbench takes seconds on it, and quantization hurts it as it hurts large models. It continues text in the manner
of technical documentation; it knows nothing and answers nothing.

{n_layer} layers, n_embd {n_embd}, n_ff {n_ff}, {n_head} heads of {head_dim} that share {n_head_kv} key and value heads,
n_ctx {n_ctx}, a SentencePiece vocabulary of {n_vocab} with byte fallback, embedding and output matrix not tied.

## Licence

The weights and the tokenizer are under the licence of this project (MIT, `LICENSE` in this folder). They were learned
from the packages below, each under its own permissive licence; their text is not part of this repository.

## What it writes

Three texts of {length} tokens, begun from nothing, each token drawn with the probability that the model gives it
(temperature 1, seed {drawn_by}; `tools/card.py` draws them).

{samples}

## Training

{steps} steps of {batch} windows of {n_ctx} tokens, {seen:.1f} million tokens ({passes:.2f} passes over {tokens:,}),
in {minutes:.1f} minutes, compiling included, on one {machine} with torch {torch}. Matrix products in bfloat16,
weights and moments in float32. Muon (momentum 0.95, weight decay {weight_decay}) for the matrices of the layers, AdamW
(betas 0.9 and 0.95) for embedding, output and norms, gradient norm at most {clip:g}. Learning rates go up over
{warmup} steps to {lr_inner:g} and {lr:g}, then straight down to zero as the time runs out; seed {seed}.

```
python tools/corpus.py FOLDER
python tools/tokenizer.py FOLDER --tokenizer data/models/tiny/tokenizer.model
python tools/train.py FOLDER --device cuda --minutes {minutes:.2f} --batch {batch}
python tools/card.py FOLDER data/models/tiny
```
{note}
| step | million tokens | minutes | learning rate, share of the highest | loss | held-out loss |
|---:|---:|---:|---:|---:|---:|
{history}

Losses in nats per token. Held out is one document in 200, {heldout_tokens} tokens.

{measured}
## Corpus

`tools/corpus.py` downloads and cleans these packages: prose alone, each paragraph once. Paragraphs that share 50
characters with `primer.md` are left out. Bytes and SHA-256 are those of the extracted text, which stands in the corpus
as often as *times* says. Together {total:.1f} MB, with repetitions {repeated:.1f} MB.

| package | version | licence | times | bytes | SHA-256 |
|---|---|---|---:|---:|---|
{sources}
"""
_LENGTH = 160  # tokens of a sample


def card(model: Path, record: dict, ledger: list[dict]) -> str:
    """Return the README of a trained model.

    Parameters
    ----------
    model : Path
        Its folder, as `export` writes it.
    record : dict
        What `train.py` wrote to history.json. `note` and `measured`, Markdown, may be added by hand.
    ledger : list of dict
        The corpus, as `corpus.build` returns it.

    Returns
    -------
    str
        Markdown.
    """
    llama, history = load(model), record["history"]
    last = history[-1]
    return _TEXT.format(
        **vars(llama.shape),
        **{key: value for key, value in record["settings"].items() if key not in ("minutes", "steps")},
        head_dim=llama.shape.head_dim,
        weights=sum(weight.numel() for weight in llama.parameters()) / 1e6,
        length=_LENGTH,
        drawn_by=SEED,
        samples=_samples(llama, model / "tokenizer.model"),
        steps=last["step"],
        seen=last["tokens"] / 1e6,
        passes=last["tokens"] / record["tokens"],
        tokens=record["tokens"],
        minutes=last["minutes"],
        machine=record["machine"],
        torch=record["torch"],
        heldout_tokens=f"{record['heldout_tokens']:,}",
        note=record.get("note", ""),
        measured=record.get("measured", ""),
        total=sum(row["bytes"] for row in ledger if row["version"]) / 1e6,
        repeated=sum(row["bytes"] * row["repeat"] for row in ledger) / 1e6,
        history=_rows(map(_line, history)),
        sources=_rows(
            (r["package"], r["version"], r["licence"], str(r["repeat"]), str(r["bytes"]), f"`{r['sha256']}`")
            for r in ledger
        ),
    )


def _samples(llama: Llama, tokenizer: Path) -> str:
    """Three texts that the model writes, as quotations."""
    pieces = SentencePieceProcessor(model_file=str(tokenizer))
    ids = sample_ids(llama, 3, _LENGTH, torch.Generator().manual_seed(SEED))
    texts = (pieces.decode(row[1:]).replace("\ufffd", "").strip() for row in ids.tolist())
    return "\n\n---\n\n".join("> " + text.replace("\n", "\n> ") + " …" for text in texts)


def _line(row: dict) -> tuple[str, ...]:
    """The cells of a line of the history; the last step of a run has no mean loss of its own at times."""
    loss = f"{row['loss']:.3f}" if row["loss"] else ""
    numbers = (f"{row['tokens'] / 1e6:.2f}", f"{row['minutes']:.2f}", f"{row['schedule']:.2f}")
    return (f"{row['step']}", *numbers, loss, f"{row['heldout']:.3f}")


def _rows(cells: Iterable[Iterable[str]]) -> str:
    """Lines of a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main() -> None:
    """Read the command line, write the README."""
    parser = argparse.ArgumentParser(description="Write the README of a trained model.")
    parser.add_argument("folder", type=Path, help="folder with history.json and corpus.json")
    parser.add_argument("model", type=Path, help="folder of the model, which gets the README.md")
    args = parser.parse_args()
    record, ledger = (json.loads((args.folder / name).read_text()) for name in ("history.json", "corpus.json"))
    with replacing(args.model / "README.md", overwrite=True) as part:
        part.write_text(card(args.model, record, ledger), encoding="utf-8")


if __name__ == "__main__":
    main()
