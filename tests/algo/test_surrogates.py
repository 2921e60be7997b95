"""Surrogates against the vectors, against slow loops, and against each other where they meet."""

from __future__ import annotations

import math

import pytest
import torch

from distrl.algo import (
    AdaptivePenalty,
    LinearKL,
    capped_weight_surrogate,
    clipped_surrogate,
    importance_ratio,
    importance_weights,
    kl_estimate,
    penalised_surrogate,
    policy_gradient,
    ppo_clip_loss,
    sequence_surrogate,
    token_shares,
)

SURROGATES = [
    clipped_surrogate,
    sequence_surrogate,
    capped_weight_surrogate,
    lambda *four: penalised_surrogate(*four, coef=0.7),
    policy_gradient,
]
NAMES = ["clip", "sequence", "capped_weight", "kl_penalty", "policy_gradient"]


@pytest.fixture
def batch():
    """logprobs (a leaf), old, advantages, mask: 5 sequences of up to 6 tokens, one empty."""
    generator = torch.Generator().manual_seed(0)
    new = -torch.rand(5, 6, generator=generator) - 0.5
    old = new + 0.4 * torch.randn(5, 6, generator=generator)
    advantages = torch.randn(5, 6, generator=generator)
    lengths = torch.tensor([6, 3, 1, 0, 5])
    return new.requires_grad_(), old, advantages, torch.arange(6) < lengths[:, None]


def test_kl_penalty_known_answers(vectors, close):
    inputs, wanted = (vectors["ppo_klpen"][k] for k in ("inputs", "expected"))
    p_old, p_new = (torch.tensor(inputs[k]) for k in ("p_old", "p_new"))
    kl = (p_old * (p_old / p_new).log()).sum(1)
    close(kl, wanted["kl_old_new"])
    taken = torch.tensor(inputs["actions"])[:, None]
    new, old = (p.gather(1, taken).T.log() for p in (p_new, p_old))
    made = penalised_surrogate(
        new, old, torch.tensor([inputs["advantage"]]), torch.ones(1, 2), coef=1.0, kl_BT=kl[None]
    )
    close(made.ratio[0], wanted["ratio"])
    close(-made.loss.mean(), wanted["objective"])


def test_policy_gradient_known_answers(vectors, close):
    """A bandit, each action by its probability: the gradient is that of the expected reward with
    any baseline, which changes its variance alone."""
    inputs, wanted = (vectors["policy_gradient_bandit"][k] for k in ("inputs", "expected"))
    theta = torch.tensor(inputs["theta"], requires_grad=True)
    logprobs = theta.log_softmax(0)
    p, rewards = logprobs.exp().detach(), torch.tensor(inputs["q"])
    close(p, wanted["pi"])
    close(p @ rewards, wanted["J"])
    baselines = {"mean_q": wanted["J"], "optimal": wanted["optimal_baseline"]}
    for name, variance in wanted["variance_trace_by_baseline"].items():
        baseline = baselines[name] if name in baselines else float(name)
        made = policy_gradient(
            logprobs[None], logprobs[None], (rewards - baseline)[None], torch.ones(1, 3)
        )
        each = torch.stack(
            [-torch.autograd.grad(one, theta, retain_graph=True)[0] for one in made.loss[0]]
        )
        close(p @ each, wanted["grad"])
        close(p @ each.square().sum(1) - (p @ each).square().sum(), variance)


def test_the_penalty_is_doubled_and_halved_as_in_the_paper(vectors, close):
    inputs, wanted = (vectors["adaptive_kl_ppo2017"][k] for k in ("inputs", "expected"))
    control = AdaptivePenalty(inputs["beta0"], inputs["d_targ"])
    close([control.update(kl) for kl in inputs["d_sequence"]], wanted["beta_sequence"])


def test_the_penalty_never_leaves_what_it_can_come_back_from():
    control = AdaptivePenalty(1.0, 0.01)
    for _ in range(200):
        control.update(0.0)
    assert control.coef > 0
    for _ in range(300):
        control.update(1.0)
    assert math.isfinite(control.coef)
    with pytest.raises(ValueError, match="finite"):
        control.update(math.nan)


def test_a_linear_leash_goes_from_start_to_end_and_stays():
    leash = LinearKL(0.2, 0.1, 100)
    assert [leash.update(5.0, 25) for _ in range(6)] == pytest.approx(
        [0.175, 0.15, 0.125, 0.1, 0.1, 0.1]
    )


def test_clip_is_the_token_form_of_the_loss(batch):
    new, old, advantages, mask = batch
    made = clipped_surrogate(new, old, advantages, mask, clip_low=0.1, clip_high=0.3, dual_clip=3.0)
    whole = ppo_clip_loss(new, old, advantages, mask, 0.1, 0.3, 3.0)
    assert (token_shares(mask) * made.loss).sum().item() == pytest.approx(whole.loss.item())
    assert made.clipped[mask].mean().item() == pytest.approx(whole.clip_fraction.item())


def test_sequence_ratio_against_a_loop(batch):
    """GSPO, eq. 5 to 7: a mean over sequences of min(sA, clip(s)A)."""
    new, old, _, mask = batch
    advantages = torch.randn(5, 1, generator=torch.Generator().manual_seed(1)).expand(5, 6)
    made = sequence_surrogate(new, old, advantages, mask, clip_low=0.1, clip_high=0.2)
    terms = []
    for b in range(5):
        n = int(mask[b].sum())
        if n:
            s = ((new[b, :n] - old[b, :n]).sum() / n).exp()
            a = advantages[b, 0]
            terms.append(torch.minimum(s * a, s.clamp(0.9, 1.2) * a))
            assert torch.allclose(made.ratio[b, :n], s.detach())
    wanted = -torch.stack(terms).mean()
    loss = (token_shares(mask, "sequence") * made.loss).sum()
    assert loss.item() == pytest.approx(wanted.item())
    (mine,) = torch.autograd.grad(loss, new, retain_graph=True)
    (slow,) = torch.autograd.grad(wanted, new)
    torch.testing.assert_close(mine, slow)


@pytest.mark.parametrize(
    ("low", "high", "clipped"),
    [
        pytest.param(10.0, 10.0, set(), id="unclipped"),
        pytest.param(0.0, 0.0, {0, 4}, id="clipped"),
        pytest.param(0.06, 0.0, {0}, id="one of each"),
    ],
)
def test_the_form_for_tokens_is_gspo_where_a_sequence_has_one_advantage(low, high, clipped):
    """Zheng et al. 2025, section 4.3: eq. 13 is eq. 5 then, in value and in gradient."""
    gaps = torch.tensor([0.08, -0.3, 0.2, 0.0, -0.05])  # log s; the fourth sequence is empty
    advantages = torch.tensor([1.0, 2.0, -0.7, 1.5, -1.2])[:, None].expand(5, 6)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 0, 5])[:, None]
    noise = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)) * mask
    noise -= noise.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1) * mask
    old = -torch.rand(5, 6, generator=torch.Generator().manual_seed(3)) - 0.5
    new = (old + gaps[:, None] + noise).requires_grad_()

    made = sequence_surrogate(new, old, advantages, mask, clip_low=low, clip_high=high)
    loss = (token_shares(mask, "sequence") * made.loss).sum()
    (mine,) = torch.autograd.grad(loss, new)

    there = mask.any(1)
    mean = ((new - old) * mask).sum(1)[there] / mask.sum(1)[there]
    s, a = mean.exp(), advantages[there, 0]
    wanted = -torch.minimum(s * a, s.clamp(1 - low, 1 + high) * a).mean()
    (slow,) = torch.autograd.grad(wanted, new)

    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(mine, slow, rtol=1e-12, atol=1e-15)
    silent = torch.zeros(5, dtype=torch.bool)
    silent[list(clipped)] = True
    assert torch.equal(made.clipped.bool(), silent[:, None] & mask)
    assert torch.equal(mine != 0, ~silent[:, None] & mask)


def test_a_sequences_ratio_leaves_each_token_its_own_advantage_and_clip(batch):
    """GSPO-token: d loss_t / d logp_t = -s A_t, 0 where s beyond a bound does not count for A_t."""
    new, old, advantages, mask = batch
    made = sequence_surrogate(new, old, advantages, mask, clip_low=0.02, clip_high=0.02)
    weights = torch.rand(5, 6, generator=torch.Generator().manual_seed(4))
    (gradient,) = torch.autograd.grad((weights * made.loss).sum(), new)
    for b in range(5):
        n = int(mask[b].sum())
        s = ((new[b, :n] - old[b, :n]).sum() / max(n, 1)).exp().item()
        for t in range(n):
            a = advantages[b, t].item()
            bound = (a > 0 and s > 1.02) or (a < 0 and s < 0.98)
            assert made.clipped[b, t] == bound
            own = 0.0 if bound else -s * a * weights[b, t].item()
            assert gradient[b, t].item() == pytest.approx(own, rel=1e-12, abs=1e-15)
    assert 0 < made.clipped.sum() < mask.sum()
    assert not gradient[~mask].any()


def test_capped_weights_keep_every_tokens_gradient(batch):
    """CISPO, eq. 4 and 5: d loss / d logp = -clip(ratio) A, whatever the clip."""
    new, old, advantages, mask = batch
    made = capped_weight_surrogate(new, old, advantages, mask, clip_low=0.1, clip_high=0.1)
    (gradient,) = torch.autograd.grad(made.loss.sum(), new)
    ratio = (new - old).exp().detach()
    weight = ratio.clamp(0.9, 1.1)
    torch.testing.assert_close(gradient, torch.where(mask, -weight * advantages, 0))
    assert torch.equal(made.clipped.bool(), ((ratio < 0.9) | (ratio > 1.1)) & mask)
    assert 0 < made.clipped.sum() < mask.sum() and (gradient[mask] != 0).all()
    silent = clipped_surrogate(new, old, advantages, mask, clip_low=0.1, clip_high=0.1)
    (clipped,) = torch.autograd.grad(silent.loss.sum(), new)
    assert (clipped[mask] == 0).any(), "where PPO's clip leaves tokens without one"


@pytest.mark.parametrize("make", SURROGATES, ids=NAMES)
def test_all_have_the_policy_gradient_where_they_start(make, batch):
    """At logp = logp_old every surrogate's gradient is -A."""
    new, _, advantages, mask = batch
    loss = make(new, new.detach(), advantages, mask).loss
    (gradient,) = torch.autograd.grad((token_shares(mask, "sequence") * loss).sum(), new)
    wanted = torch.where(mask, -token_shares(mask, "sequence") * advantages, 0)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("make", SURROGATES, ids=NAMES)
def test_the_ratio_that_is_told_is_the_probabilities_and_has_no_gradient(make, batch):
    new, old, _, mask = batch
    made = make(*batch)
    gaps = new - old
    if make is sequence_surrogate:
        mean_B = (gaps * mask).sum(1) / mask.sum(1).clamp(min=1)
        gaps = mean_B[:, None].expand_as(gaps)
    torch.testing.assert_close(made.ratio, torch.where(mask, gaps.exp().detach(), 0))
    assert made.loss.requires_grad
    assert not made.ratio.requires_grad and not made.clipped.requires_grad


def test_bounds_are_those_of_the_papers_unless_they_are_set(close):
    """Two sequences of a token: ten times likelier at A = 1, ten times less likely at A = -1."""
    new, ratio = torch.full((2, 1), -1.0), torch.tensor([[10.0], [0.1]])
    four = new, new - ratio.log(), torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1)
    close(clipped_surrogate(*four).loss, [[-1.2], [0.8]])
    close(sequence_surrogate(*four).loss, [[-1.0004], [0.9997]])
    close(capped_weight_surrogate(*four).loss, [[5.0], [-0.1]])  # -min(ratio, 5) A logp


@pytest.mark.parametrize("make", SURROGATES, ids=NAMES)
@pytest.mark.parametrize("garbage", [7.0, math.nan, math.inf])
def test_padding_reaches_neither_loss_nor_gradient(make, batch, garbage):
    new, old, advantages, mask = batch
    clean = make(*batch)
    dirty = torch.where(mask, new, garbage).detach().requires_grad_()
    made = make(
        dirty, torch.where(mask, old, garbage), torch.where(mask, advantages, garbage), mask
    )
    for name in ("loss", "clipped", "ratio"):
        assert torch.equal(getattr(made, name), getattr(clean, name)), name
        assert not getattr(made, name)[~mask].any()
    made.loss.sum().backward()
    assert dirty.grad is not None and not dirty.grad[~mask].any()
    assert dirty.grad.isfinite().all()


@pytest.mark.parametrize("make", SURROGATES, ids=NAMES)
@pytest.mark.parametrize(
    ("logprobs", "old"),
    [
        pytest.param([-1e4, 0.0], [0.0, -1e4], id="of both signs"),
        pytest.param([0.0, 0.0], [-1e4, -1e4], id="likelier"),
        pytest.param([-1e4, -1e4], [0.0, 0.0], id="less likely"),
    ],
)
def test_any_gap_stays_finite(make, logprobs, old):
    """Of one sign, a sequence's mean is as far off as its tokens."""
    new = torch.tensor([logprobs], dtype=torch.float32, requires_grad=True)
    before = torch.tensor([old], dtype=torch.float32)
    made = make(new, before, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
    made.loss.sum().backward()
    assert made.ratio.isfinite().all()
    assert made.loss.isfinite().all() and new.grad is not None and new.grad.isfinite().all()


def test_an_estimated_penalty_is_the_exact_one_in_expectation(vectors):
    """Over all actions by their old probability: loss and gradient of ρ − 1 − log ρ are those of
    the divergence."""
    p_old = torch.tensor(vectors["ppo_klpen"]["inputs"]["p_old"][0])
    logits = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    new = logits.log_softmax(0)
    zeros, ones = torch.zeros(1, 3), torch.ones(1, 3)
    made = penalised_surrogate(new[None], p_old.log()[None], zeros, ones, coef=1.0)
    estimated = (p_old * made.loss[0]).sum()
    exact = (p_old * (p_old.log() - new)).sum()
    assert estimated.item() == pytest.approx(exact.item())
    (mine,) = torch.autograd.grad(estimated, logits, retain_graph=True)
    (true,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_shares_against_a_loop(batch, how, close):
    mask = batch[3]
    shares = token_shares(mask, how, longest=10)
    lengths = [int(n) for n in mask.sum(1)]
    there = sum(n > 0 for n in lengths)
    for b, n in enumerate(lengths):
        wanted = {"token": 1 / sum(lengths), "constant": 1 / (there * 10)}
        wanted["sequence"] = 1 / (there * n) if n else 0
        close(shares[b, :n], [wanted[how]] * n)
        assert not shares[b, n:].any()
    assert not token_shares(torch.zeros(2, 3), how, longest=10).any()


def test_importance_by_geometric_mean_and_two_sided_masks(close):
    proximal = torch.tensor([[0.0, 0.4, -0.4], [0.9, 0.9, 5.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    zeros = torch.zeros(2, 3)
    ratio = importance_ratio(proximal, zeros, mask, "geometric")
    close(ratio[:, 0], [1.0, math.exp(0.9)])
    assert (ratio[0] == ratio[0, 0]).all() and ratio[1, 2] == 0
    icepop = importance_weights(proximal, zeros, mask, "token", 1.45, True, 0.7)
    close(icepop, [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    whole = importance_weights(proximal, zeros, mask, "geometric", 2.0, True, 0.5)
    close(whole, [[1.0] * 3, [0.0] * 3])
    close(importance_weights(proximal, zeros, mask, "token", 1.2, False, 0.9)[0], [1.0, 1.2, 0.9])


def test_refusals(batch):
    new, old, advantages, mask = batch
    with pytest.raises(ValueError, match=r"clip_low must lie in .* got -0.1"):
        clipped_surrogate(new, old, advantages, mask, clip_low=-0.1)
    with pytest.raises(ValueError, match="dual_clip must exceed 1"):
        clipped_surrogate(new, old, advantages, mask, dual_clip=1.0)
    with pytest.raises(ValueError, match="axis T"):
        policy_gradient(new, old[:, :4], advantages, mask)
    for coef, kl, message in ((-0.1, new, "coef"), (1.0, new[:, :1], r"kl_BT \(5, 1\)")):
        with pytest.raises(ValueError, match=message):
            penalised_surrogate(new, old, advantages, mask, coef=coef, kl_BT=kl)
    for longest in (None, 0):
        with pytest.raises(ValueError, match="needs the longest response"):
            token_shares(mask, "constant", longest)
    with pytest.raises(ValueError, match=r"mask_BT needs the 2 axes BT, got \(6,\)"):
        token_shares(mask[0])
    with pytest.raises(ValueError, match="token, sequence, constant; got 'mean'"):
        token_shares(mask, "mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"floor must lie in \[0, 1.5\]"):
        importance_weights(new, old, mask, cap=1.5, floor=2.0)
    with pytest.raises(ValueError, match="positive"):
        AdaptivePenalty(0.0)


def test_the_kl_in_a_loss_pulls_back_to_the_reference(batch):
    """k2 and k3 have the divergence's gradient on the policy's own samples, k1 has none."""
    logits = torch.tensor([0.5, -0.3, 0.2], requires_grad=True)
    reference = torch.tensor([0.2, 0.3, 0.5]).log()
    new = logits.log_softmax(0)
    p = new.exp().detach()
    (true,) = torch.autograd.grad((new.exp() * (new - reference)).sum(), logits, retain_graph=True)
    found = {}
    for kind in ("k1", "k2", "k3"):
        loss = (p * kl_estimate(new, reference, kind)).sum()
        (found[kind],) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(found["k2"], true)
    assert found["k1"].abs().max() < 1e-12
    assert (found["k3"] * true).sum() > 0, "k3's is that of the reverse divergence: downhill too"
