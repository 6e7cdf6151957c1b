"""files/sentencepiece_file.py: what is read agrees with sentencepiece, what is written reads back."""

import pytest
from checkpoints import GOLDEN

from quantlab.files.sentencepiece_file import pack_sentencepiece, read_sentencepiece

RAW = (GOLDEN / "tiny_spm.model").read_bytes()


def test_pieces_are_sentencepieces():
    from sentencepiece import SentencePieceProcessor

    processor, pieces = SentencePieceProcessor(model_proto=RAW), read_sentencepiece(GOLDEN, RAW)
    ids = range(processor.vocab_size())
    assert pieces.tokens == [processor.id_to_piece(i) for i in ids]
    assert pieces.scores == [processor.get_score(i) for i in ids]
    assert [kind == 6 for kind in pieces.types] == [processor.is_byte(i) for i in ids]
    assert [kind == 3 for kind in pieces.types] == [processor.is_control(i) for i in ids]
    assert pieces.types[pieces.tokens.index("<|user|>")] == 4
    assert (pieces.model_type, pieces.adds_space) == ("bpe", True)


def test_what_is_written_reads_back():
    pieces = [("<unk>", 0.0, 2), ("a", -1.5, 1), ("<s>", 0.0, 3)]
    found = read_sentencepiece(GOLDEN, pack_sentencepiece(pieces, unknown=0, byte_fallback=False))
    assert list(zip(found.tokens, found.scores, found.types, strict=True)) == pieces
    assert (found.model_type, found.adds_space) == ("bpe", False)


@pytest.mark.parametrize("raw", [b"", b"\xff" * 100, RAW[:-1], b"\x0a\x03\x0a\x01\xff"])
def test_what_is_no_model_gets_one_line(raw):
    with pytest.raises(ValueError, match="a.model: is not a SentencePiece model"):
        read_sentencepiece("a.model", raw)
