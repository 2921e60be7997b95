"""The batched passes against one sequence at a time, without padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from distrl.learn import forward
from distrl.learn.experience import to_experience
from distrl.learn.forward import PolicyModel, response_logprobs, response_values
from distrl.learn.networks import check_head
from distrl.models import ScalarModel, load_policy
from distrl.models.load import ModelError
from distrl.records import RolloutBatch

EXACT = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def policy(tiny_policy):
    """Far from uniform, so that a token out of place is seen."""
    model = load_policy(tiny_policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def critic(policy):
    return ScalarModel.from_policy(policy, seed=3)


@pytest.fixture(scope="module")
def groups(make_groups):
    return make_groups(seed=5)


@pytest.fixture(scope="module")
def batch(groups):
    return to_experience(RolloutBatch(groups=tuple(groups)))


def garbled(batch):
    """The same sequences, four places wider, with other tokens in all padding."""
    generator = torch.Generator().manual_seed(9)
    ids = torch.nn.functional.pad(batch.ids_BL, (0, 4))
    padding = torch.arange(ids.shape[1]) >= batch.lengths_B[:, None]
    noise = torch.randint(0, 300, ids.shape, generator=generator)
    tokens = batch.tokens_BT.masked_fill(~batch.mask_BT, 7)
    return dataclasses.replace(batch, ids_BL=ids.where(~padding, noise), tokens_BT=tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_and_entropy_equal_a_slow_loop(policy, groups, batch, temperature):
    logprobs, entropy, _ = response_logprobs(
        PolicyModel(policy), batch, temperature, with_entropy=True
    )
    row = 0
    for group in groups:
        for sample in group.rollout.samples:
            prompt = group.rollout.prompt.token_ids.tolist()
            answer = sample.token_ids.tolist()
            for t, token in enumerate(answer):
                with torch.no_grad():
                    logits = policy(input_ids=torch.tensor([prompt + answer[:t]])).logits[0, -1]
                expected = torch.log_softmax(logits / temperature, -1)
                torch.testing.assert_close(logprobs[row, t], expected[token], **EXACT)
                by_hand = -(expected.exp() * expected).sum()
                torch.testing.assert_close(entropy[row, t], by_hand, **EXACT)
            assert not logprobs[row, len(answer) :].any() and not entropy[row, len(answer) :].any()
            row += 1


def test_values_are_of_the_state_before_each_token(critic, groups, batch):
    """V(prompt and the tokens before): at the first token, of the prompt alone."""
    values = response_values(critic, batch)
    row = 0
    for group in groups:
        for sample in group.rollout.samples:
            prompt = group.rollout.prompt.token_ids.tolist()
            answer = sample.token_ids.tolist()
            for t in range(len(answer)):
                with torch.no_grad():
                    seen = torch.tensor([prompt + answer[:t]])
                    expected = critic.reward(seen, torch.tensor([seen.shape[1]]))[0]
                torch.testing.assert_close(values[row, t], expected, **EXACT)
            assert not values[row, len(answer) :].any()
            row += 1


def test_what_stands_in_padding_changes_no_result_and_no_gradient(policy, critic, batch):
    clean, other = (gradients(policy, critic, b) for b in (batch, garbled(batch)))
    for mine, theirs in zip(clean, other, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_company_in_a_batch_changes_no_result_and_no_gradient(policy, critic, batch):
    whole = gradients(policy, critic, batch)
    parts = [gradients(policy, critic, batch.rows(torch.tensor([i]))) for i in range(len(batch))]
    for mine, theirs in zip(
        whole[2:], zip(*(part[2:] for part in parts), strict=True), strict=True
    ):
        torch.testing.assert_close(mine, sum(theirs), atol=1e-4, rtol=1e-4)
    for row, (logprobs, values, *_) in enumerate(parts):
        n = logprobs.shape[1]
        torch.testing.assert_close(whole[0][row, :n], logprobs[0], **EXACT)
        torch.testing.assert_close(whole[1][row, :n], values[0], **EXACT)


def gradients(policy, critic, batch):
    """Log-probabilities, values, and the gradients of a sum over both and the entropy."""
    policy.zero_grad()
    critic.zero_grad()
    logprobs, entropy, _ = response_logprobs(PolicyModel(policy), batch, 0.8, with_entropy=True)
    values = response_values(critic, batch)
    (logprobs.sum() + entropy.sum() + values.square().sum()).backward()
    made = [p.grad.clone() for m in (policy, critic) for p in m.parameters() if p.grad is not None]
    assert made and all(g.any() for g in made[:2])
    return [logprobs.detach(), values.detach(), *made]


def test_entropy_is_left_out_where_nobody_asks(policy, batch):
    logprobs, entropy, _ = response_logprobs(PolicyModel(policy), batch, 1.0, with_entropy=False)
    assert logprobs.requires_grad and not entropy.any()


def test_only_positions_that_predict_response_tokens_reach_the_head(policy, batch):
    """Logits are the largest tensor of all: none are made for prompts and padding."""
    seen = []
    hook = policy.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    response_logprobs(PolicyModel(policy), batch, 1.0, with_entropy=False)
    hook.remove()
    assert seen == [(int(batch.response_lengths_B.sum()), 300)]


def test_logits_in_blocks_change_nothing(policy, batch, monkeypatch):
    made = []
    for kept in (2**28, 0):
        monkeypatch.setattr(forward, "KEPT_BYTES", kept)
        policy.zero_grad()
        logprobs, entropy, _ = response_logprobs(PolicyModel(policy), batch, 0.7, with_entropy=True)
        (logprobs.sum() + 2 * entropy.sum()).backward()
        made.append([logprobs, entropy, *(p.grad for p in policy.parameters())])
        policy.zero_grad(set_to_none=True)
    for whole, blocks in zip(*made, strict=True):
        torch.testing.assert_close(whole, blocks, atol=1e-4, rtol=1e-4)


def test_a_policy_whose_logits_are_capped_after_the_head_is_refused(tiny_policy, monkeypatch):
    model = load_policy(tiny_policy)
    monkeypatch.setattr(model.config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(ModelError, match=r"final_logit_softcapping=30\.0.*choose another model"):
        check_head(model, tiny_policy)


def test_what_is_done_to_logits_is_seen_whatever_it_is_called(tiny_policy, monkeypatch):
    model = load_policy(tiny_policy)
    check_head(model, tiny_policy)
    forward = model.forward

    def louder(**inputs):
        found = forward(**inputs)
        found.logits = found.logits * 1.01
        return found

    monkeypatch.setattr(model, "forward", louder)
    with pytest.raises(ModelError, match="not what the head makes of the last states"):
        check_head(model, tiny_policy)
