"""Pre-tokenizers: cuts of text into words before byte-level BPE merges, by their GGUF names.

GGUF's `tokenizer.ggml.pre` names a cut; the names and the cuts are llama.cpp's (`llama-vocab.cpp`), the regular
expressions those of the models' own tokenizer files.
"""

from dataclasses import dataclass
from typing import Any

from quantlab.files.recognize import short

__all__ = ["GPT2_REGEX", "PreTokenizer", "name_of_pieces", "name_of_regexes", "pre_tokenizer"]

# parts of the expressions
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LETTERS_AND_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATH_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_NEWLINE_OR_SPACES = r"\s*[\r\n]|\s+(?!\S)|\s+"

GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_SIGNS}|{_SPACES}"
_TEKKEN = rf"{_CASED}|{_CAPITALS}|\p{{N}}|{_PATH_SIGNS}|{_SPACES}"
_GPT4O = rf"{_CASED}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_PATH_SIGNS}|{_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """Regular expressions applied in turn: each one's matches, and the text between, go to the next.

    `ignore_merges`: a piece that is a token stays whole, against the merges. `add_bos`: the default where the
    metadata does not say. `of_bytes`: merges start from bytes; if not, from characters with U+2581 for a space, as in
    SentencePiece, and lines are the pieces.
    """

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    of_bytes: bool = True

    def build(self) -> Any:
        """Build the tokenizers library's pre-tokenizer."""
        from tokenizers import Regex, pre_tokenizers

        steps: list[Any] = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in self.regexes]
        if self.of_bytes:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)


_BY_CUT = {
    PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True): (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
    ),
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe chatglm-bpe",
    PreTokenizer((_LLAMA3,), ignore_merges=True): "glm4 glm5",
    PreTokenizer((_QWEN2,)): ("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2"),
    PreTokenizer(
        (rf"{_CONTRACTION}|{_LETTERS_AND_MARKS}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",)
    ): "qwen35",
    PreTokenizer((rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)): "seed-coder",
    PreTokenizer(
        (rf"'(?i:[sdmt]|ll|ve|re)|{_LETTERS}|\p{{N}}|{_SIGNS}|{_NEWLINE_OR_SPACES}",)
    ): "bailingmoe bailingmoe2 llada-moe",
    PreTokenizer(
        (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}+|{_SIGNS}|{_SPACES}"), ignore_merges=True
    ): "minicpm5",
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")): "deepseek-coder",
    PreTokenizer((r"[^\n]+|\n+",), add_bos=True, of_bytes=False): "gemma4 granite-embed-multi-311m",
    PreTokenizer((GPT2_REGEX,)): "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4",
    PreTokenizer((r"\p{N}", GPT2_REGEX)): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2_REGEX, r"[0-9][0-9][0-9]")): "falcon",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2_REGEX, r"\p{N}+", r"[0-9][0-9][0-9]")): "default",
    PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): "tekken",
    PreTokenizer((_GPT4O,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    PreTokenizer(
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
        )
    ): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
}
_BY_NAME = {name: cut for cut, names in _BY_CUT.items() for name in names.split()}


def pre_tokenizer(name: str, *, source: str = "vocabulary") -> PreTokenizer:
    """Return the pre-tokenizer called `name`; `source` starts the error text.

    Raises
    ------
    ValueError
        If the name is not known.

    Examples
    --------
    >>> pre_tokenizer("smollm").regexes[0]
    '\\\\p{N}'
    """
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(
            f"{source}: tokenizer.ggml.pre={short(name)}, need one of {' '.join(sorted(_BY_NAME))}. "
            f"Use llama.cpp for this model's text."
        )
    return _BY_NAME[name]


def name_of_regexes(regexes: tuple[str, ...], ignore_merges: bool) -> str | None:
    """Return a GGUF name for these expressions (None: unknown).

    Examples
    --------
    >>> name_of_regexes((r"\\p{N}", GPT2_REGEX), False)
    'smollm'
    """
    for cut, names in _BY_CUT.items():
        if cut.regexes == regexes and cut.ignore_merges == ignore_merges:
            return names.split()[0]
    return None


def name_of_pieces(pre_tokenizer: Any, text: str, ignore_merges: bool) -> str | None:
    """Return a name that cuts `text` as `pre_tokenizer` does (None: unknown)."""
    wanted = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]
    for cut, names in _BY_CUT.items():
        if cut.ignore_merges == ignore_merges:
            if [piece for piece, _ in cut.build().pre_tokenize_str(text)] == wanted:
                return names.split()[0]
    return None
