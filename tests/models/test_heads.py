"""Scalar heads: read at the last token by length, whatever the padding holds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

from distrl.config import ModelConfig
from distrl.data.tokenizer import train_tokenizer
from distrl.models import ScalarModel, new_llama, reward_input, save_policy
from distrl.models.load import ModelError
from distrl.models.packing import pack

SMALL = ModelConfig(hidden=64, layers=2, heads=2, vocab=300, context=32)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a good film", "a bad film"], 300, 32)


@pytest.fixture(scope="module")
def policy(tokenizer):
    return new_llama(SMALL, tokenizer, 0).eval()


@pytest.fixture
def model(policy):
    return ScalarModel.from_policy(policy, seed=1).eval()


def padded(rows: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths_B = torch.tensor([len(row) for row in rows])
    ids_BT = torch.full((len(rows), int(lengths_B.max()) + 2), pad)
    for place, row in enumerate(rows):
        ids_BT[place, : len(row)] = row
    return ids_BT, lengths_B


@pytest.mark.parametrize("pad", [0, 1, 2, 250])
def test_padding_never_changes_a_reward_or_a_value(model, pad):
    # 1 is the end-of-sequence id: it stands inside a row too, and may be the padding.
    rows = [torch.randint(0, 259, (n,)) for n in (1, 4, 9, 17)]
    rows[2][3] = 1
    ids_BT, lengths_B = padded(rows, pad)
    rewards_B, values_BT = model.reward(ids_BT, lengths_B), model.values(ids_BT, lengths_B)
    for place, row in enumerate(rows):
        alone = torch.tensor([len(row)])
        values_T = model.values(row[None], alone)[0]
        torch.testing.assert_close(
            model.reward(row[None], alone)[0], rewards_B[place], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(values_BT[place, : len(row)], values_T, atol=1e-5, rtol=0)
        assert (values_BT[place, len(row) :] == 0).all()


def test_the_reward_is_the_value_at_the_last_token(model):
    ids_BT, lengths_B = padded([torch.randint(0, 259, (n,)) for n in (5, 8)], 0)
    values_BT = model.values(ids_BT, lengths_B)
    assert torch.equal(model.reward(ids_BT, lengths_B), values_BT[[0, 1], lengths_B - 1])
    with pytest.raises(ValueError, match="without tokens"):
        model.reward(ids_BT, torch.tensor([0, 3]))


def test_a_packed_reward_model_goes_on_with_last_tokens_alone_in_its_last_layer(model):
    ids_BT, lengths_B = padded([torch.randint(0, 259, (n,)) for n in (5, 8, 1)], 0)
    before_B = model.reward(ids_BT, lengths_B)
    assert pack(model.body)
    seen = []
    model.body.layers[-1].mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    torch.testing.assert_close(model.reward(ids_BT, lengths_B), before_B, atol=1e-5, rtol=0)
    assert [shape[:-1] for shape in seen] == [(1, 3)]


def test_it_reads_the_policy_s_own_hidden_states(model, policy):
    ids = torch.randint(0, 259, (2, 6))
    hidden = policy(ids, output_hidden_states=True).hidden_states[-1]
    expected = hidden @ model.head.weight[0] + model.head.bias
    whole_B = torch.tensor([6, 6])
    torch.testing.assert_close(model.values(ids, whole_B), expected)
    model.normalise(2.0, -0.5)
    torch.testing.assert_close(model.values(ids, whole_B), 2 * expected - 0.5)


def test_the_head_starts_as_stiennon_s(policy):
    heads = torch.cat([ScalarModel.from_policy(policy, s).head.weight for s in range(60)])
    assert heads.std().item() == pytest.approx(1 / math.sqrt(65), rel=0.05)
    assert heads.mean().abs().item() < 0.015
    assert ScalarModel.from_policy(policy, 0).head.bias.item() == 0
    assert torch.equal(heads[3:4], ScalarModel.from_policy(policy, 3).head.weight)


def test_a_zero_head_answers_zero_and_still_learns(policy):
    critic = ScalarModel.from_policy(policy, zero_head=True)
    values_BT = critic.values(torch.randint(0, 259, (2, 6)), torch.tensor([6, 6]))
    assert (values_BT == 0).all()
    (values_BT - 1).square().sum().backward()
    grad = critic.head.weight.grad
    assert grad is not None and grad.abs().sum() > 0


def test_it_does_not_share_weights_with_the_policy(model, policy):
    before = policy.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        model.body.embed_tokens.weight.zero_()
    assert torch.equal(policy.model.embed_tokens.weight, before)


def test_saved_and_loaded_it_answers_the_same(tmp_path, model, tokenizer):
    model.normalise(1.75, -0.25)
    model.save(tmp_path / "rm", tokenizer, {"tokenizer_fingerprint": "f", "accuracy": 0.8})
    again = ScalarModel.load(tmp_path / "rm")
    ids_BT, lengths_B = padded([torch.randint(0, 259, (n,)) for n in (5, 8)], 0)
    assert torch.equal(model.reward(ids_BT, lengths_B), again.reward(ids_BT, lengths_B))
    assert again.meta["accuracy"] == 0.8 and again.meta["gain"] == 1.75
    assert again.context == 32 and not again.training
    assert {p.suffix for p in (tmp_path / "rm").iterdir()} == {".safetensors", ".json"}
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["hidden_size"] == 64


def test_a_body_that_projects_its_last_states_has_a_head_of_their_width(tmp_path, tokenizer):
    config = OPTConfig(
        vocab_size=300,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=32,
    )
    policy = OPTForCausalLM(config)
    rows, lengths = padded([torch.tensor([5, 6, 7])], 1)
    model = ScalarModel.from_policy(policy.eval()).eval()
    model.save(tmp_path / "model", tokenizer, {})
    again = ScalarModel.load(tmp_path / "model")
    assert model.head.in_features == ScalarModel.upon(policy).head.in_features == 16
    torch.testing.assert_close(again.reward(rows, lengths), model.reward(rows, lengths))


def test_a_folder_that_is_no_reward_model_is_named(tmp_path, policy, tokenizer, model):
    save_policy(policy, tokenizer, tmp_path / "policy")
    with pytest.raises(ModelError, match=r"policy holds no reward model.*distrl reward-model"):
        ScalarModel.load(tmp_path / "policy")
    model.save(tmp_path / "rm", tokenizer, {})
    (tmp_path / "rm" / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="no reward model"):
        ScalarModel.load(tmp_path / "rm")
    other = {"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}
    save_file(other, tmp_path / "rm" / "head.safetensors")
    with pytest.raises(ModelError, match="no reward model"):
        ScalarModel.load(tmp_path / "rm")


def test_nonsense_scales_are_refused(model):
    for gain, bias in ((0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="gain"):
            model.normalise(gain, bias)


def test_a_reward_input_ends_in_exactly_one_eos():
    eos = 1
    assert reward_input(np.array([0, 5, 6]), eos).tolist() == [0, 5, 6, 1]
    assert reward_input(np.array([0, 5, 1]), eos).tolist() == [0, 5, 1]
    assert reward_input(np.array([0, 1, 6]), eos).tolist() == [0, 1, 6, 1]
    assert reward_input(np.array([0, 5, 6]), eos, limit=3).tolist() == [0, 5, 6]
    assert reward_input(np.array([0, 5]), eos).dtype == np.int32
    for ids in ([], [0, 5, 6, 7]):
        with pytest.raises(ValueError, match="1 to 3 tokens"):
            reward_input(np.array(ids, np.int32), eos, limit=3)
