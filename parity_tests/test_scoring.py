"""Log-probabilities of given texts."""

import numpy as np
import pytest

from minillm_core.errors import InputError
from minillm_core.text.tokenizer import Tokenizer
from parity_tests.conftest import BACKENDS, TINY, Tier, make_pair
from parity_tests.test_generate import PROMPTS, complete, generators


@pytest.mark.parametrize("framework", BACKENDS)
def test_scores(framework: str, float64: Tier, tokenizer: Tokenizer) -> None:
    """Scores equal those of the uncached model and the log-probabilities of generation, in any batch."""
    pair, generator = make_pair(TINY, float64), generators(TINY, float64, tokenizer)[framework]
    texts = ["The Congress of the United States", "a", "My fellow citizens, " * 8, "\u20ac and \U0001f600"]
    scores = generator.score(texts)
    for text, score in zip(texts, scores, strict=True):
        ids = tokenizer.encode(text, bos=True)
        assert len(score) == len(ids) - 1
        logits = pair.logits(np.array([ids[:-1]]))[1][0]
        expected = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[range(len(ids) - 1), ids[1:]]
        assert np.abs(score - expected).max() <= 1e-12
    changed = {"temperature": 1.7, "top_k": 30, "repetition_penalty": 1.4}  # log-probabilities are unfiltered
    completion = complete(generator, [PROMPTS[2]], max_new_tokens=30, **changed)[0]
    score = generator.score([PROMPTS[2] + completion.tokens])[0]
    assert np.allclose(score[len(PROMPTS[2]) - 1 :], completion.logprobs, rtol=0, atol=1e-12)
    longest = np.arange(321) % 500 + 4
    assert len(generator.score([longest])[0]) == 320
    refused = ((["x" * 4000], "longer than the context"), ([""], "empty"), ([], "at least one"), ([[3]], "two"))
    for bad, message in refused:
        with pytest.raises(InputError, match=message):
            generator.score(bad)


def test_scores_agree(tier: Tier, tokenizer: Tokenizer) -> None:
    both = generators(TINY, tier, tokenizer)
    texts = ["The Congress", "of the United States of America"]
    for ours, theirs in zip(both["jax"].score(texts), both["torch"].score(texts), strict=True):
        assert np.abs(ours - theirs).max() <= tier.logits
