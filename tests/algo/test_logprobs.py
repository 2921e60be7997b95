from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical

from distrl.algo import head_logprobs, token_logprobs
from distrl.algo import logprobs as logprobs_module


def sample(B=3, T=5, V=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=generator) * 2
    return logits, torch.randint(V, (B, T), generator=generator)


def test_known_answers(vectors, close):
    entry = vectors["temperature_logprob"]
    logits = torch.tensor(entry["inputs"]["logits"]).expand(1, 3, 3)
    logprobs, _ = token_logprobs(logits, torch.tensor([[0, 1, 2]]), entry["inputs"]["temperature"])
    close(logprobs[0], entry["expected"]["logprob"])

    entry = vectors["ppo_total_loss"]
    logits = torch.tensor([entry["inputs"]["logits"]])
    _, entropy = token_logprobs(logits, torch.zeros(1, 3, dtype=torch.long))
    close(entropy[0], entry["expected"]["entropy"])


@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 15, 512])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_every_chunk_agrees_with_autograd_through_a_categorical(chunk, temperature, close):
    logits, tokens = sample()
    weights = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))

    plain = logits.clone().requires_grad_()
    softmax = Categorical(logits=plain / temperature)
    wanted = softmax.log_prob(tokens), softmax.entropy()
    (weights[0] * wanted[0] + weights[1] * wanted[1]).sum().backward()

    ours = logits.clone().requires_grad_()
    got = token_logprobs(ours, tokens, temperature, chunk=chunk)
    (weights[0] * got[0] + weights[1] * got[1]).sum().backward()

    close(got[0], wanted[0])
    close(got[1], wanted[1])
    close(ours.grad, plain.grad)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_by_finite_differences(output):
    logits, tokens = sample(2, 3, 5)
    assert torch.autograd.gradcheck(
        lambda z: token_logprobs(z, tokens, 0.8, chunk=2)[output], logits.requires_grad_()
    )


def test_entropy_can_be_skipped(close):
    logits, tokens = sample()
    logprobs, entropy = token_logprobs(logits.requires_grad_(), tokens, with_entropy=False)
    close(logprobs, token_logprobs(logits, tokens)[0])
    assert logprobs.requires_grad and not entropy.requires_grad
    assert torch.equal(entropy, torch.zeros(3, 5))
    logprobs.sum().backward()


def test_nothing_of_the_logits_size_is_kept_but_the_logits():
    """Also for a slice along T, which a flattening reshape would copy."""
    logits, tokens = sample()
    window = logits.requires_grad_()[:, 1:4]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_logprobs(window, tokens[:, 1:4], chunk=4)
    large = [x for x in kept if x.numel() >= window.numel()]
    assert [x.data_ptr() for x in large] == [window.data_ptr()]


def test_blocks_are_no_larger_than_chunk(monkeypatch):
    sizes: list[int] = []
    plain = torch.Tensor.logsumexp
    monkeypatch.setattr(
        torch.Tensor, "logsumexp", lambda x, dim: sizes.append(x[..., 0].numel()) or plain(x, dim)
    )
    logits, tokens = sample(7, 9, 4)
    token_logprobs(logits, tokens, chunk=5)
    assert max(sizes) <= 5 and sum(sizes) == 63


def test_words_that_cannot_be_sampled_add_nothing_to_the_entropy(close):
    logits, _ = sample(1, 2, 4)
    banned = torch.cat([logits, torch.full((1, 2, 3), -torch.inf)], -1).requires_grad_()
    tokens = torch.tensor([[0, 1]])
    got = token_logprobs(banned, tokens)
    for ours, wanted in zip(got, token_logprobs(logits, tokens), strict=True):
        close(ours, wanted)
    (got[0] + got[1]).sum().backward()
    assert banned.grad is not None and banned.grad.isfinite().all()


def test_half_precision_logits_give_float32_answers():
    logits, tokens = sample()
    half = logits.bfloat16().requires_grad_()
    logprobs, entropy = token_logprobs(half, tokens)
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact, _ = token_logprobs(half.detach().double(), tokens)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)
    logprobs.sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_no_tokens():
    logprobs, entropy = token_logprobs(torch.zeros(0, 4, 3), torch.zeros(0, 4))
    assert logprobs.shape == entropy.shape == (0, 4)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ((3, 4), {}, r"tokens_BT \(3, 4\) and logits_BTV \(3, 5, 11\) differ in axis T"),
        ((15,), {}, r"tokens_BT needs the 2 axes BT, got \(15,\)"),
        ((3, 5), {"temperature": 0.0}, "temperature must be positive"),
        ((3, 5), {"chunk": 0}, "chunk"),
    ],
)
def test_refusals(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        token_logprobs(torch.zeros(3, 5, 11), torch.zeros(tokens, dtype=torch.long), **options)


@pytest.mark.parametrize("chunk", [1, 4, 15, 512])
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_in_blocks_agrees_with_the_head_as_a_whole(chunk, bias, close):
    generator = torch.Generator().manual_seed(2)
    states, weight = (torch.randn(*shape, generator=generator) for shape in ((15, 6), (11, 6)))
    offset = torch.randn(11, generator=generator) if bias else None
    tokens = torch.randint(11, (15,), generator=generator)
    weights = torch.randn(2, 15, generator=generator)
    made = []
    for blocks in (False, True):
        leaves = [t.clone().requires_grad_() for t in (states, weight, offset) if t is not None]
        extra = leaves[2] if bias else None
        if blocks:
            found = head_logprobs(leaves[0], leaves[1], tokens, 0.7, bias_V=extra, chunk=chunk)
        else:
            logits = torch.nn.functional.linear(leaves[0], leaves[1], extra)
            found = tuple(x[0] for x in token_logprobs(logits[None], tokens[None], 0.7))
        (weights[0] * found[0] + weights[1] * found[1]).sum().backward()
        made.append([*found, *(leaf.grad for leaf in leaves)])
    for mine, whole in zip(*made, strict=True):
        close(mine, whole)


def test_a_head_in_blocks_without_entropy(close):
    states, weight = torch.randn(4, 3), torch.randn(5, 3)
    tokens = torch.tensor([0, 4, 2, 2])
    logprobs, entropy = head_logprobs(states.requires_grad_(), weight, tokens, with_entropy=False)
    close(logprobs, (states @ weight.T).log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    assert logprobs.requires_grad and not entropy.requires_grad and not entropy.any()
    with pytest.raises(ValueError, match="axis D"):
        head_logprobs(states, torch.randn(5, 2), tokens)
    with pytest.raises(ValueError, match="temperature must be positive"):
        head_logprobs(states, weight, tokens, 0.0)


def test_a_heads_gradient_keeps_its_digits_over_many_blocks():
    """128 of them, of which a sum in bfloat16 would lose all but a few."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(32, (2048,), generator=generator)
    exact = [torch.randn(n, 16, generator=generator).bfloat16().double() for n in (2048, 32)]
    half = [leaf.bfloat16().requires_grad_() for leaf in exact]
    exact = [leaf.requires_grad_() for leaf in exact]
    for states, weight in (exact, half):
        head_logprobs(states, weight, tokens, chunk=16)[0].sum().backward()
    for mine, wanted in zip(half, exact, strict=True):
        assert mine.grad is not None and wanted.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        assert (mine.grad - wanted.grad).norm() < 5e-3 * wanted.grad.norm()


@pytest.mark.parametrize(("head", "bias"), [(False, False), (False, True), (True, False)])
def test_a_head_that_learns_nothing_costs_nothing_on_the_way_back(monkeypatch, close, head, bias):
    """Beside adapters it is frozen: no sum as large as it is, and no product for it."""
    products = []
    add = logprobs_module._add_product
    monkeypatch.setattr(
        logprobs_module, "_add_product", lambda *parts: (products.append(1), add(*parts))
    )
    states, weight, extra = torch.randn(6, 3), torch.randn(5, 3), torch.randn(5)
    tokens = torch.tensor([0, 4, 2, 2, 1, 3])
    for leaf, learns in ((states, True), (weight, head), (extra, bias)):
        leaf.requires_grad_(learns)
    head_logprobs(states, weight, tokens, bias_V=extra, chunk=2)[0].sum().backward()
    assert len(products) == (3 if head else 0)

    mine = [leaf.grad for leaf in (states, weight, extra)]
    states.grad = weight.grad = extra.grad = None
    logits = torch.nn.functional.linear(states, weight, extra)
    token_logprobs(logits[None], tokens[None])[0].sum().backward()
    for found, leaf in zip(mine, (states, weight, extra), strict=True):
        assert (found is None) == (leaf.grad is None)
        if found is not None:
            close(found, leaf.grad)
