"""PyTorch's other ways to run a decoding step: over fixed buffers, as recorded on a GPU, and with `torch.compile`."""

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

import minillm_jax
import minillm_torch
from minillm_core.text.tokenizer import Tokenizer
from minillm_torch.generate import MAX_RECORDED
from parity_tests.conftest import BACKENDS, TIERS, TINY, make_pair
from parity_tests.test_generate import PROMPTS, complete, tokens_of


def test_a_step_over_fixed_buffers(tokenizer: Tokenizer) -> None:
    """What PyTorch records on a GPU gives the bits of the plain loop: in blocks, with rows that end early, with other
    requests between the blocks of a first, and when the buffers are used again."""
    model = make_pair(TINY, TIERS["float32"]).torch
    plain, recorded = (minillm_torch.Generator(model, tokenizer) for _ in range(2))
    recorded._records = True
    requests = [
        {"max_new_tokens": 40, "temperature": 1.0, "seed": 2, "top_k": 9, "repetition_penalty": 1.2},
        {"max_new_tokens": 33, "temperature": 0.0},
        {"max_new_tokens": 40, "temperature": 0.7, "seed": 2, "top_p": 0.9, "n": 2},
    ]
    for request in (*requests, *requests):
        assert complete(recorded, PROMPTS, **request) == complete(plain, PROMPTS, **request)
    n_recorded = len(recorded._recorded)
    assert n_recorded == len(requests)
    streams = [[generator.stream(PROMPTS[i], **requests[0]) for i in (0, 0, 1)] for generator in (plain, recorded)]
    pieces = [["".join(step) for step in itertools.zip_longest(*three, fillvalue="")] for three in streams]
    assert pieces[0] == pieces[1]
    assert len(recorded._recorded) >= n_recorded + 3, "streams of the same shape need buffers of their own"
    assert all(step.is_free() for step in recorded._recorded)
    streams = [recorded.stream(PROMPTS[0], **requests[0]) for _ in range(MAX_RECORDED + 2)]
    for stream in streams:
        next(stream)
    assert len(recorded._recorded) == len(streams), "those in use are kept, however many"
    del stream, streams
    assert complete(recorded, PROMPTS, **requests[1]) == complete(plain, PROMPTS, **requests[1])
    assert len(recorded._recorded) == MAX_RECORDED


def test_threads_share_a_generator(tokenizer: Tokenizer) -> None:
    """Calls at the same time from several threads get their own answers, from steps over fixed buffers, too."""
    generator = minillm_torch.Generator(make_pair(TINY, TIERS["float32"]).torch, tokenizer)
    requests = [{"max_new_tokens": 40, "temperature": 1.0, "seed": seed} for seed in range(4)]
    expected = [complete(generator, PROMPTS, **request) for request in requests]
    generator._records = True
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            assert [*threads.map(lambda request: complete(generator, PROMPTS, **request), requests)] == expected


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("framework", BACKENDS)
def test_torch_compile_gives_the_same_tokens(framework: str, tokenizer: Tokenizer) -> None:
    if framework == "jax":
        with pytest.raises(TypeError):
            minillm_jax.Generator(make_pair(TINY, TIERS["float32"]).jax, tokenizer, compile=True)
        return
    model = make_pair(TINY, TIERS["float32"]).torch
    plain, compiled = (minillm_torch.Generator(model, tokenizer, compile=on) for on in (False, True))
    request = {"max_new_tokens": 20, "temperature": 1.0, "seed": 2}
    assert tokens_of(compiled, PROMPTS, **request) == tokens_of(plain, PROMPTS, **request)
