"""The model `quantlab` of lm-evaluation-harness: its tasks, scored by quantlab's evaluator.

    lm_eval run --model quantlab --model_args path=model-Q4_K_M.gguf --tasks hellaswag

lm-evaluation-harness finds it by the entry point of the group `lm_eval.models`. Releases up to 0.4.13 do not look there
yet; with them, put `python -m quantlab.evaluate.lm_eval` in the place of `lm_eval`.

Source: docs/plugins.md and docs/model_guide.md of lm-evaluation-harness.
"""

from __future__ import annotations

import lm_eval.models  # noqa: F401 - registers the harness's own models, which it does only while there are no others
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from quantlab.evaluate.likelihood import Likelihood

DEVICE = "cuda:0"  # what the harness names where --device does not


@register_model("quantlab")
class QuantlabLM(Likelihood, LM):
    """A GGUF file or checkpoint as lm-evaluation-harness wants its models.

    Parameters
    ----------
    path : str
        A GGUF file, a checkpoint folder, or a bundled model's name.
    device : str, optional
        As for `perplexity`. `cuda:0`, the harness's default for any machine, is `auto` here.
    batch_size, max_batch_size : optional
        The harness gives them to every model. Results are the same for any batch; `memory` bounds it here.
    **options
        Of `Likelihood`: mode, device_memory, memory, max_length.

    Examples
    --------
    >>> QuantlabLM("tiny").max_length
    512
    """

    def __init__(self, path: str, *, device: str = DEVICE, batch_size=None, max_batch_size=None, **options):
        LM.__init__(self)
        Likelihood.__init__(self, path, device="auto" if device == DEVICE else device, **options)

    def get_model_info(self) -> dict:
        """Return what the results say of the model."""
        model = self._model
        n_bytes = sum(tensor.nbytes for tensor in model)
        return {"model_num_parameters": model.n_weights, "model_bytes": n_bytes, "mode": self._choice.mode}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
