"""Plain sampling: prompts of unequal length, ends at the end-of-sequence token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from distrl.config import ModelConfig
from distrl.data.tokenizer import train_tokenizer
from distrl.models import new_llama, sample

PROMPTS = [np.array(ids, np.int32) for ids in ([0], [0, 40, 41, 42, 43], [0, 50, 60])]

# So cold that the favourite token always wins: runs can be compared.
COLD = 1e-6


@pytest.fixture(scope="module")
def model():
    tokenizer = train_tokenizer(["a good film"], 300, 32)
    config = ModelConfig(hidden=64, layers=2, heads=2, vocab=300, context=32)
    model = new_llama(config, tokenizer, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # strong enough for attention to decide what comes next
        for weight in model.model.layers.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3, generator=generator)
    return model


def draw(model, prompts=PROMPTS, **settings):
    asked = {"max_new_tokens": 12, "temperature": 1.0, "eos": 1, "seed": 0, **settings}
    return [ids.tolist() for ids in sample(model, prompts, **asked)]


def test_a_prompt_s_neighbours_do_not_matter(model):
    together = draw(model, temperature=COLD)
    alone = [draw(model, [prompt], temperature=COLD)[0] for prompt in PROMPTS]
    assert together == alone


def test_the_first_end_of_sequence_token_ends_a_response(model):
    free = draw(model, temperature=COLD, eos=266)
    eos = free[1][4]
    for whole, cut in zip(free, draw(model, temperature=COLD, eos=eos), strict=True):
        ends = whole.index(eos) + 1 if eos in whole else len(whole)
        assert cut == whole[:ends]


def test_any_end_that_the_checkpoint_names_ends_a_response(model, monkeypatch):
    free = draw(model, temperature=COLD, eos=266)
    named = [free[1][4], free[2][2]]
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=named))
    for whole, cut in zip(free, draw(model, temperature=COLD, eos=266), strict=True):
        ends = min([place for place, i in enumerate(whole) if i in named], default=len(whole))
        assert cut == whole[: ends + 1]
    assert model.generation_config.eos_token_id == named


def test_the_seed_decides_and_the_caller_s_random_state_is_left_alone(model):
    state = torch.get_rng_state()
    assert draw(model, seed=3) == draw(model, seed=3) != draw(model, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_training_mode_is_put_back(model):
    model.train()
    draw(model)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    "own", [{"min_p": 0.9999}, {"suppress_tokens": list(range(20, 300))}, {"repetition_penalty": 9}]
)
def test_what_the_checkpoint_asks_for_is_left_out(model, monkeypatch, own):
    plain = draw(model)
    settings = GenerationConfig(**own)
    monkeypatch.setattr(model, "generation_config", settings)
    assert draw(model) == plain
    assert model.generation_config is settings
