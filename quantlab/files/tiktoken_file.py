"""tiktoken's `tokenizer.model` of Meta's Llama 3: each line is a token's bytes in base64 and its rank.

The rank is the id, and the order of merging: of all neighbours that form a token, those of the lowest rank are merged
first. So every cut of a token into two tokens is a merge, in order of the ranks. The special tokens are in no file.

Source: `llama/tokenizer.py` of Meta's Llama 3 and 3.1 for the special tokens; TikTokenConverter of transformers for the
merges of the published tokenizer.json.
"""

import base64
import binascii
import re
from pathlib import Path

from quantlab.files.vocab import text_of_bytes

__all__ = ["is_tiktoken", "read_tiktoken", "special_tokens"]

MAX_TOKEN = 1024  # bytes; the longest of Llama 3 has 128
MAX_TOKENS = 1 << 20
N_SPECIAL = 256


def is_tiktoken(start: bytes) -> bool:
    """Tell whether a file with this beginning is tiktoken's."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\n", start) is not None


def read_tiktoken(path: Path, raw: bytes) -> tuple[list[str], list[str]]:
    """Return the tokens by id, and the merges in order, as byte-level BPE writes them.

    Raises
    ------
    ValueError
        If a line is not a token with its rank, a rank is not the line's number, or a byte has no token.
    """
    tokens: list[bytes] = []
    for line in raw.splitlines():
        tokens.append(_token(path, line, len(tokens)))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise ValueError(f"{path}: a token occurs twice, or one of the 256 bytes is missing. Download it again.")
    merges = []
    for token in tokens:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(ranks[left], ranks[right]) for left, right in cuts if left in ranks and right in ranks]
        merges += [f"{text_of_bytes(tokens[left])} {text_of_bytes(tokens[right])}" for left, right in sorted(known)]
    return [text_of_bytes(token) for token in tokens], merges


def _token(path: Path, line: bytes, rank: int) -> bytes:
    """Read one line."""
    text, _, number = line.partition(b" ")
    try:
        token = base64.b64decode(text, validate=True)
    except binascii.Error:
        token = b""
    if not 0 < len(token) <= MAX_TOKEN or rank >= MAX_TOKENS or number != b"%d" % rank:
        raise ValueError(
            f"{path}: line {rank + 1} is {line[:80]!r}, need a token in base64 and {rank}. Download it again."
        )
    return token


def special_tokens(*, is_3_1: bool) -> list[str]:
    """Return the 256 special tokens that follow the others; Llama 3.1 names more of them.

    Examples
    --------
    >>> special_tokens(is_3_1=False)[9], special_tokens(is_3_1=True)[8], special_tokens(is_3_1=True)[-1]
    ('<|eot_id|>', '<|eom_id|>', '<|reserved_special_token_247|>')
    """
    if is_3_1:
        names = "begin_of_text end_of_text r r finetune_right_pad_id r start_header_id end_header_id eom_id eot_id"
        names += " python_tag"
    else:
        names = "begin_of_text end_of_text r r r r start_header_id end_header_id r eot_id"
    tokens, n_reserved = [], 0
    for name in [*names.split(), *["r"] * N_SPECIAL][:N_SPECIAL]:
        tokens.append(f"<|reserved_special_token_{n_reserved}|>" if name == "r" else f"<|{name}|>")
        n_reserved += name == "r"
    return tokens
