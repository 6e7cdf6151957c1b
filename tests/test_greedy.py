"""A file quantized here runs in llama.cpp itself, and says there what the model evaluated here says."""

import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate.logits import logits
from quantlab.files.bundled import data_dir

PROMPT = "A scale is a number that is kept once for a block of weights. When the weights are read,"
STEPS = 16
CLOSE = 0.05  # the two best logits, where rounding alone may decide


def greedy(model, ids: list[int]) -> list[int]:
    """The most probable continuation token by token, up to where two are equally good."""
    found = []
    for _ in range(STEPS):
        last = logits(model, ids + found, mode="ggml-cpu")[-1]
        second, best = np.partition(last, -2)[-2:]
        if best - second < CLOSE:
            break
        found.append(int(last.argmax()))
    return found


@pytest.mark.filterwarnings("ignore:.*became zero in F16")
@pytest.mark.parametrize("ftype", ["Q4_K_M", "Q2_K"])
def test_llama_cpp_continues_as_the_evaluated_model_does(ftype, tmp_path):
    pytest.importorskip("xllamacpp")
    from quantlab.run.llama_cpp import Engine, Options

    path = ql.quantize(data_dir() / "models" / "tiny", tmp_path / f"{ftype}.gguf", ftype=ftype)
    model = ql.open(path)
    ids = model.vocab.encode(PROMPT).tolist()
    ours = greedy(model, ids)
    request = {"prompt": ids, "n_predict": STEPS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    with Engine(path, Options(n_ctx=256, n_threads=2)) as engine:
        answer = engine.complete(request)
    theirs = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
    assert theirs[: len(ours)] == ours
    assert len(theirs) == STEPS
