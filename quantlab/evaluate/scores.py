"""Token scores of all variants of a pass, compared with its base."""

import numpy as np

from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.metrics import TokenScores


class ScoreTokens:
    """A consumer of a `ForwardPass` that scores every target under every variant."""

    observe = None

    def output(self, forward_pass: ForwardPass) -> list[TokenScores]:
        """Compute the scored logits block by block, for the base and as many variants as fit."""
        p, base = forward_pass, forward_pass.output(0)
        scores = [TokenScores.empty(*p.windows.targets.shape) for _ in p.variants]
        others, step = list(range(1, len(p.variants))), p.budget.outputs_at_once
        for start in range(0, max(1, len(others)), step):
            group = others[start : start + step]
            outputs = [base, *(base if p.same_output(i) else p.output(i) for i in group)]
            p.weights.forget()
            for chunks in p.batches():
                states = [p.last_states(i, chunks) for i in (0, *group)]
                found = p.engine.score(outputs, states, p.windows.targets[chunks])
                for i, part in zip((0, *group), found, strict=True):
                    for field, values in part.at(slice(None)).items():
                        np.copyto(scores[i].at(chunks)[field], values)
            p.bar.update(p.windows.tokens.size * (len(group) + (start == 0)))
            del outputs
        return scores
