"""Vocabularies: text to token ids and back, from a GGUF file's metadata.

Two kinds: `spm` (SentencePiece BPE with byte fallback; `tokenizer.ggml.model` is `llama`) and `bpe` (byte-level BPE,
`gpt2`; or Gemma's, whose merges start from characters). The owners of the formats do the work, sentencepiece and
tokenizers; around them llama.cpp's rules for special tokens, the leading space and BOS/EOS hold.

Source: `llama-vocab.cpp` of llama.cpp for the rules; sentencepiece_model.proto for the model's encoding.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from quantlab.files.gguf_file import Strings
from quantlab.files.pretokenizers import pre_tokenizer
from quantlab.files.recognize import reason, short
from quantlab.files.sentencepiece_file import pack_sentencepiece

__all__ = ["BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "Vocab", "text_of_bytes"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

# what llama.cpp takes for a key; it refuses a file that has another type
_IDS = "bos eos eot eom unknown seperator padding mask prefix suffix middle"
_IDS += " fim_pre fim_suf fim_mid fim_pad fim_rep fim_sep"
_FLAGS = "add_bos_token add_eos_token add_sep_token add_space_prefix remove_extra_whitespaces"
_TYPES: dict[str, type] = {"model": str, "pre": str} | dict.fromkeys(_FLAGS.split(), bool)
_TYPES |= {f"{name}_token_id": np.uint32 for name in _IDS.split()}

_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair; in a token, a byte that is no UTF-8

# tokens that llama.cpp treats as control tokens despite their type: they end a generation or fill in the middle
_ALWAYS_CONTROL = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> "
    "[e~[ <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> "
    "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> "
    "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|> "
    "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> "
    "<|file_sep|>".split()
)
_HARMONY = frozenset("<|channel|> <|message|> <|start|> <|constrain|>".split())  # gpt-oss's; always user-defined


@dataclass(frozen=True, eq=False, repr=False)
class Vocab:
    """A vocabulary and its rules.

    Attributes
    ----------
    kind : str
        `"spm"` or `"bpe"`.
    tokens : tuple of str
        Text of every token as GGUF holds it.
    types : np.ndarray [shape=(n_vocab,), dtype=int32]
        1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    scores : np.ndarray [shape=(n_vocab,), dtype=float32]
        Merge priorities of an spm vocabulary; zeros otherwise.
    merges : tuple of str
        `"left right"` in order of priority, of a bpe vocabulary.
    pre : str
        Name of the pre-tokenizer of a bpe vocabulary.
    bos_id, eos_id, unk_id : int or None
    add_bos, add_eos : bool
        Whether `encode` puts these tokens around a text.
    add_space_prefix : bool
        Whether a text starts as if a space stood before it.
    source : str
        What the error texts start with: the file.
    """

    kind: str
    tokens: tuple[str, ...]
    types: np.ndarray
    scores: np.ndarray
    merges: tuple[str, ...]
    pre: str
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    source: str = "vocabulary"

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, source: str = "metadata") -> "Vocab":
        """Build the vocabulary that GGUF metadata, as `read_header` returns it, describes; `source` starts the errors.

        Raises
        ------
        ValueError
            If there is no vocabulary, or it contradicts itself, is of a kind that is not read, or llama.cpp refuses it.
        """
        model = metadata.get("tokenizer.ggml.model")
        if not isinstance(model, str) or model not in ("llama", "gpt2", "gemma4"):
            raise ValueError(
                f"{source}: tokenizer.ggml.model={short(model)}, need 'llama', 'gpt2' or 'gemma4'. "
                f"Use llama.cpp for its text."
            )
        spm = model == "llama"
        tokens = _strings(metadata, "tokenizer.ggml.tokens", source)
        tokens = tuple(token or f"[EMPTY_{i}]" for i, token in enumerate(tokens))
        n_vocab = len(tokens)
        if not n_vocab or len(set(tokens)) != n_vocab:
            raise ValueError(
                f"{source}: tokenizer.ggml.tokens has {n_vocab} tokens, need different ones. Convert again."
            )
        _check_types(metadata, source)
        types = _numbers(metadata, "tokenizer.ggml.token_type", n_vocab, (np.int32,), NORMAL, source)
        for i in np.flatnonzero(types == BYTE):
            if len(tokens[i].encode("utf-8", "surrogateescape")) < 3:
                raise ValueError(f"{source}: token {i} is a byte called {short(tokens[i])}, need <0x00> to <0xFF>.")
        pre = "gemma4" if model == "gemma4" else metadata.get("tokenizer.ggml.pre", "default")
        cut = None if spm else pre_tokenizer(pre, source=source)

        def token_id(name: str, default: int | None) -> int | None:
            value = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
            return next((int(i) for i in (value, default) if i is not None and i < n_vocab), None)

        return cls(
            kind="spm" if spm else "bpe",
            tokens=tokens,
            types=types,
            scores=_numbers(metadata, "tokenizer.ggml.scores", n_vocab, (np.float32, np.int32), 0, source),
            merges=() if spm else tuple(dict.fromkeys(_strings(metadata, "tokenizer.ggml.merges", source))),
            pre=pre,
            bos_id=token_id("bos", 1 if spm else None),
            eos_id=token_id("eos", 2 if spm else None),
            unk_id=token_id("unknown", 0 if spm else None),
            add_bos=not (spm or cut.of_bytes)  # llama.cpp overrides the key then  # pyright: ignore[reportOptionalMemberAccess]
            or metadata.get("tokenizer.ggml.add_bos_token", True if spm else cut.add_bos),  # pyright: ignore[reportOptionalMemberAccess]
            add_eos=metadata.get("tokenizer.ggml.add_eos_token", False),
            add_space_prefix=spm and metadata.get("tokenizer.ggml.add_space_prefix", True),
            source=source,
        )

    @property
    def n_vocab(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"Vocab({self.kind}: {self.n_vocab} tokens, add_bos={self.add_bos}, add_eos={self.add_eos})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that affects how a text is encoded."""
        rules = (self.kind, self.pre, self.bos_id, self.eos_id, self.add_bos, self.add_eos, self.add_space_prefix)
        sha = hashlib.sha256(repr((rules, self.tokens, self.merges)).encode("utf-8", "surrogateescape"))
        sha.update(self.types.tobytes() + self.scores.tobytes())
        return sha.hexdigest()

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> np.ndarray:
        """Convert text to token ids.

        Parameters
        ----------
        text : str
        add_special : bool
            Whether BOS and EOS are added where the vocabulary asks for them.
        parse_special : bool
            Whether the text of a control token stands for the token; otherwise it is text like any other.

        Returns
        -------
        np.ndarray [shape=(n_tokens,), dtype=int32]

        Raises
        ------
        ValueError
            If the text holds half a surrogate pair, or BOS or EOS is asked for and not there.

        Examples
        --------
        >>> tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁"]
        >>> keys = {"model": "llama", "tokens": tokens, "scores": np.array([0, 0, 0, -3, -4, -1, -2], np.float32)}
        >>> keys["token_type"] = np.array([2, 3, 3, 1, 1, 1, 1], np.int32)
        >>> vocab = Vocab.from_metadata({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
        >>> vocab.encode("ab b").tolist()
        [1, 6, 5, 6, 4]
        """
        half = _HALF.search(text)
        if half is not None:
            raise ValueError(
                f"text: character {half.start()} is {half[0]!r}, half a surrogate pair. Decode the text as UTF-8."
            )
        ids: list[int] = []
        if add_special and self.add_bos:
            ids.append(self._required(self.bos_id, "bos"))
        after_special = True
        for fragment in self._fragments(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids += self._encode_plain(" " + fragment if self.add_space_prefix and after_special else fragment)
            after_special = isinstance(fragment, int)
        if add_special and self.add_eos:
            ids.append(self._required(self.eos_id, "eos"))
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Convert token ids to text, without control tokens unless `special`.

        Bytes that do not form a character come out as U+FFFD.
        """
        ids = [int(i) for i in ids]
        raw = b"".join(self.pieces[i] for i in ids if special or self._kinds[i] not in (CONTROL, UNKNOWN))
        text = raw.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.add_space_prefix else text

    def _required(self, token_id: int | None, name: str) -> int:
        if token_id is None:
            raise ValueError(f"{self.source}: add_{name} is set and {name}_id is not. Pass add_special=False.")
        return token_id

    @cached_property
    def _kinds(self) -> list[int]:
        """The token types after llama.cpp's corrections."""
        pairs = zip(self.types.tolist(), self.tokens, strict=True)
        kinds = [
            CONTROL if token in _ALWAYS_CONTROL else USER_DEFINED if token in _HARMONY else kind
            for kind, token in pairs
        ]
        known = set(self.tokens)
        if "<|end|>" in known and (
            {"<|return|>", "<|call|>"} <= known or "<|flush|>" in known and known & {"<|call|>", "<|calls|>"}
        ):
            kinds[self.tokens.index("<|end|>")] = USER_DEFINED
        if {"</s>", "<|tool_response>"} <= known:
            kinds[self.tokens.index("</s>")] = NORMAL
        return kinds

    @cached_property
    def _special(self) -> dict[bool, list[tuple[str, int]]]:
        """Tokens that are matched in a text before all others, longest (in bytes) first, by `parse_special`."""
        wanted = {False: (USER_DEFINED,), True: (USER_DEFINED, CONTROL, UNKNOWN)}
        order = sorted(range(self.n_vocab), key=lambda i: -len(self.tokens[i].encode("utf-8", "surrogateescape")))
        return {key: [(self.tokens[i], i) for i in order if self._kinds[i] in kinds] for key, kinds in wanted.items()}

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut text at special tokens, longer ones first."""
        fragments: list[str | int] = [text] if text else []
        for token, token_id in self._special[parse_special]:
            if token not in text:
                continue
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    cut.append(fragment)
                    continue
                parts = fragment.split(token)
                cut += [item for part in parts for item in (part, token_id) if item != ""][:-1]
            fragments = cut
        return fragments

    def _encode_plain(self, text: str) -> list[int]:
        if self.kind == "spm":
            return self._processor.encode(text)
        if pre_tokenizer(self.pre).of_bytes:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for line in re.findall(r"[^\n]+|\n+", text.replace(" ", "▁")):
            token_id = self._tokenizer.token_to_id(line) if line[0] == "\n" else None
            ids += self._tokenizer.encode(line, add_special_tokens=False).ids if token_id is None else [token_id]
        return ids

    @cached_property
    def _processor(self) -> Any:
        """A sentencepiece processor with this vocabulary."""
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_proto=_sentencepiece_proto(self))
        except RuntimeError as error:  # a token with a zero byte, for one
            raise ValueError(
                f"{self.source}: sentencepiece refuses the tokens ({reason(error)}). Use llama.cpp for its text."
            ) from None

    @cached_property
    def _tokenizer(self) -> Any:
        """A tokenizer of the tokenizers library with this vocabulary, for text without special tokens."""
        from tokenizers import Tokenizer, models

        cut = pre_tokenizer(self.pre)
        ids = {token: i for i, token in enumerate(self.tokens) if not _HALF.search(token)}  # no text holds the others
        merges = []
        for merge in self.merges:
            head, _, right = merge[1:].partition(" ")  # a part may begin with a space
            left = merge[:1] + head
            if {left, right, left + right} <= ids.keys():
                merges.append((left, right))
            elif cut.of_bytes:  # Gemma's runs of spaces are tokens of their own, which no merge makes
                raise ValueError(
                    f"{self.source}: merge {short(merge)} names missing tokens. Convert the checkpoint again."
                )
        model = models.BPE(ids, merges, ignore_merges=cut.ignore_merges, byte_fallback=not cut.of_bytes)
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = cut.build()
        return tokenizer

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each token."""
        return [self._piece(token, kind) for token, kind in zip(self.tokens, self._kinds, strict=True)]

    def _piece(self, token: str, kind: int) -> bytes:
        if kind == BYTE:
            return bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else b""
        if kind == UNUSED:
            return b""
        if kind != NORMAL:
            return token.encode("utf-8", "surrogateescape")
        if self.kind == "spm" or not pre_tokenizer(self.pre).of_bytes:
            return token.replace("▁", " ").encode("utf-8", "surrogateescape")
        if all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        return token.encode("utf-8", "surrogateescape")


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's table: printable Latin-1 characters stand for themselves, other bytes for U+0100 and following."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
_CHAR_OF_BYTE = {byte: char for char, byte in _BYTE_OF_CHAR.items()}


def text_of_bytes(raw: bytes) -> str:
    """Return the text of the byte-level BPE token that stands for these bytes.

    Examples
    --------
    >>> text_of_bytes(b" the")
    'Ġthe'
    """
    return "".join(_CHAR_OF_BYTE[byte] for byte in raw)


def _strings(metadata: Mapping[str, Any], key: str, source: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list | Strings) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{source}: {key} is missing or is not a list of strings. Convert the checkpoint again.")
    return list(value)


def _check_types(metadata: Mapping[str, Any], source: str) -> None:
    """Refuse values whose type llama.cpp does not accept."""
    for name, wanted in _TYPES.items():
        value = metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and type(value) is not wanted:
            raise ValueError(
                f"{source}: tokenizer.ggml.{name}={short(value)} of type {type(value).__name__}, "
                f"need {wanted.__name__}: llama.cpp refuses the file. Convert the checkpoint again."
            )


def _numbers(
    metadata: Mapping[str, Any], key: str, count: int, dtypes: tuple[type, ...], default: int, source: str
) -> np.ndarray:
    """Return the first `count` numbers of an array as the first of `dtypes`."""
    value = metadata.get(key)
    if value is None:
        return np.full(count, default, dtypes[0])
    is_array = isinstance(value, np.ndarray) and value.dtype in dtypes
    if not is_array or len(value) < count or not np.isfinite(value).all():
        names = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"{source}: {key} needs {count} finite numbers of type {names}. Convert the checkpoint again.")
    return value[:count].astype(dtypes[0])


def _sentencepiece_proto(vocab: Vocab) -> bytes:
    """Encode the vocabulary as a sentencepiece model.

    Every token takes part in merges, as in llama.cpp, apart from the unknown token and bytes; bytes that are not all
    there stand for nothing. The text comes with its leading space in place.
    """
    unknown = vocab.unk_id if vocab.unk_id is not None else 0
    typed = zip(vocab.tokens, vocab.types.tolist(), strict=True)
    bytes_at = {i for i, (token, kind) in enumerate(typed) if kind == BYTE and re.fullmatch("<0x[0-9A-F]{2}>", token)}
    bytes_at.discard(unknown)
    has_all = len(bytes_at) == 256
    pieces = [
        (token, score, UNKNOWN if i == unknown else NORMAL if i not in bytes_at else BYTE if has_all else CONTROL)
        for i, (token, score) in enumerate(zip(vocab.tokens, vocab.scores.tolist(), strict=True))
    ]
    return pack_sentencepiece(pieces, unknown=unknown, byte_fallback=has_all)
