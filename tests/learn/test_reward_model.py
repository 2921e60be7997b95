"""Reward-model training: pairs of a group, the scale, and a preference that is learnt."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distrl.config import Config, RewardModelConfig
from distrl.data.errors import DataError
from distrl.data.sources import Comparison, load_prompts
from distrl.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from distrl.learn import reward_model
from distrl.learn.reward_model import (
    Group,
    batches,
    encode,
    forward_rows,
    group_loss,
    pairs_of,
    reference_samples,
    run_reward_model,
    score_rows,
    told_apart,
)
from distrl.models import ScalarModel, load_policy, new_llama, save_policy

GOOD, BAD = ("fine", "lovely", "great"), ("awful", "dull", "poor")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(150):
        words = [[*rng.choice(GOOD, k), *rng.choice(BAD, 3 - k)] for k in range(4)]
        texts = [" " + " ".join(rng.permutation(w)) for w in words]
        ratings = [-2, -0.5, 0.5, 2]
        rows.append({"prompt": f"Film {i // 2} was", "responses": texts, "ratings": ratings})
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def config(source) -> Config:
    return Config.model_validate(
        {
            "model": {"hidden": 32, "layers": 1, "heads": 1, "vocab": 300, "context": 48},
            "data": {"source": str(source), "max_prompt_tokens": 20},
            "sft": {"max_tokens": 40},
            "reward_model": {"epochs": 2, "lr": 5e-3, "max_tokens": 40, "reference_prompts": 24},
            "generate": {"max_new_tokens": 8},
        }
    )


@pytest.fixture(scope="module")
def policy(config, tmp_path_factory):
    tokenizer = train_tokenizer(["Film 12 was", *GOOD, *BAD] * 3, 300, 48)
    folder = tmp_path_factory.mktemp("policy") / "policy"
    save_policy(new_llama(config.model, tokenizer, 0), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def trained(config, policy, tmp_path_factory):
    out, seen = tmp_path_factory.mktemp("rm"), []
    return out, run_reward_model(config, policy, out, lambda *row: seen.append(row)), seen


@pytest.fixture
def model(policy):
    return ScalarModel.from_policy(load_policy(policy), 1)


def random_groups(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Group(
            prompt="",
            ids=tuple(rng.integers(0, 259, rng.integers(2, 30)).astype(np.int32) for _ in range(k)),
            ratings_K=rng.integers(-4, 5, k).astype(np.float32),
        )
        for k in sizes
    ]


def test_pairs_are_at_least_the_gap_apart_and_better_first():
    better, worse, gap = pairs_of(np.array([1.0, 3.0, 1.5, 1.0], np.float32), 1.0)
    assert list(zip(better, worse, gap.tolist(), strict=True)) == [
        (1, 0, 2),
        (1, 2, 1.5),
        (1, 3, 2),
    ]
    assert pairs_of(np.array([1.0, 1.0], np.float32), 0.0)[0] == []


def test_ratings_exactly_the_gap_apart_are_a_pair_however_they_are_rounded():
    """On a grid of 0.1, of which 32 bits hold hardly a point."""
    grid = np.arange(-40, 41) / 10
    for ratings in (grid, 1000 + grid[:11]):
        for steps in (1, 2, 3, 5, 7):
            better, worse, gap = pairs_of(ratings.astype(np.float32), steps / 10)
            apart = np.subtract(better, worse)
            assert apart.min() == steps and len(apart) == sum(range(len(ratings) - steps + 1))
            assert gap == pytest.approx(apart / 10, abs=1e-6 * float(ratings.max()))


def test_ratings_that_differ_by_rounding_alone_are_no_pair():
    ratings_K = np.array([0.3, 0.3 + 3e-8, 0.0], np.float32)
    assert ratings_K[0] != ratings_K[1]
    better, worse, _ = pairs_of(ratings_K, 0.0)
    assert list(zip(better, worse, strict=True)) == [(0, 2), (1, 2)]


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_the_loss_is_a_mean_over_groups_of_means_over_their_pairs(model, margin):
    settings = RewardModelConfig(margin=margin, min_gap=1.5)
    groups = random_groups((4, 2, 6))
    expected = []
    for group in groups:
        scores = [
            model.reward(torch.as_tensor(i[None]).long(), torch.tensor([len(i)]))[0]
            for i in group.ids
        ]
        pairs = []
        for i, high in enumerate(group.ratings_K.tolist()):
            for j, low in enumerate(group.ratings_K.tolist()):
                if high - low >= 1.5:
                    lead = scores[i] - scores[j] - margin * (high - low)
                    pairs.append(-torch.nn.functional.logsigmoid(lead))
        if pairs:
            expected.append(torch.stack(pairs).mean())
    loss = group_loss(model, groups, settings)
    assert loss.count == len(expected)
    torch.testing.assert_close(loss.mean, torch.stack(expected).mean())


def test_equal_held_out_ratings_are_told_before_the_training(config, policy, source, tmp_path):
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    flat = tmp_path / "flat.jsonl"
    flat.write_text("".join(json.dumps(row | {"ratings": [1] * 4}) + "\n" for row in rows))
    data = config.data.model_copy(update={"validation": str(flat)})
    with pytest.raises(DataError, match=r"rated differently .*data\.source.*ratings_column"):
        run_reward_model(
            config.model_copy(update={"data": data}),
            policy,
            tmp_path / "out",
            lambda *_: pytest.fail("trained in vain"),
        )


def test_ratings_that_all_lie_too_close_are_told_before_the_training(config, policy, tmp_path):
    wide = config.reward_model.model_copy(update={"min_gap": 100.0})
    with pytest.raises(DataError, match=r"reward_model\.min_gap=100 or more apart .*lower it"):
        run_reward_model(
            config.model_copy(update={"reward_model": wide}),
            policy,
            tmp_path / "out",
            lambda *_: pytest.fail("trained in vain"),
        )


def test_a_batch_without_a_pair_has_loss_0_in_the_graph(model):
    group = Group(prompt="", ids=random_groups((2,))[0].ids, ratings_K=np.ones(2, np.float32))
    loss = group_loss(model, [group], RewardModelConfig())
    loss.mean.backward()
    assert loss.mean.item() == 0 and loss.count == 0


@pytest.mark.parametrize("budget", [16, 64, 10_000])
def test_rows_come_back_in_order_whatever_the_budget(model, budget):
    rows = [ids for group in random_groups((9,)) for ids in group.ids]
    alone = torch.cat([forward_rows(model, [ids], 64) for ids in rows])
    torch.testing.assert_close(forward_rows(model, rows, budget), alone, atol=1e-5, rtol=0)


def test_every_group_is_seen_once_an_epoch():
    groups = random_groups((2,) * 10)
    seen = [id(group) for batch in batches(groups, 4, 0) for group in batch]
    assert sorted(seen) == sorted(map(id, groups))
    assert seen != [id(group) for batch in batches(groups, 4, 1) for group in batch]


def test_every_row_ends_in_eos_also_where_it_was_cut(policy):
    tokenizer = load_tokenizer(policy)
    row = Comparison(row_id="0", prompt="Film", responses=("x", "x" * 60), ratings=(0, 1))
    (group,), cut = encode([row], tokenizer, 16)
    assert cut == 1
    assert [int(ids[-1]) for ids in group.ids] == [tokenizer.eos_token_id] * 2
    assert len(group.ids[1]) == 16


ENDS = tuple(c * 9 for c in "abc")


def test_responses_that_the_cut_made_equal_are_left_out(policy):
    tokenizer = load_tokenizer(policy)
    rows = [
        Comparison(row_id="0", prompt="x" * 20, responses=ENDS[:2], ratings=(0, 1)),
        Comparison(row_id="1", prompt="x" * 12, responses=("y", *ENDS), ratings=(0, 1, 2, 3)),
        Comparison(row_id="2", prompt="x" * 20, responses=("y" * 9,) * 2, ratings=(0, 1)),
        Comparison(row_id="3", prompt="Film", responses=("same", "same"), ratings=(0, 1)),
    ]
    encoded, cut = encode(rows, tokenizer, 16)
    groups, alike = told_apart(encoded, 16)
    assert (cut, alike) == (7, 4), "what was not cut is as its row has it"
    assert [group.ratings_K.tolist() for group in groups] == [[0, 1, 2, 3], [0, 1]]
    mixed = Group(
        prompt="",
        ids=(encoded[0].ids[0], encoded[1].ids[0], encoded[0].ids[1], encoded[1].ids[1]),
        ratings_K=np.array([0, 1, 2, 3], np.float32),
    )
    (kept,), alike = told_apart([mixed], 16)
    assert alike == 2 and kept.ratings_K.tolist() == [1, 3]
    assert [ids.tolist() for ids in kept.ids] == [mixed.ids[1].tolist(), mixed.ids[3].tolist()]


def test_a_cut_that_leaves_nothing_to_compare_is_an_error_before_training(config, policy, tmp_path):
    rows = [
        {"prompt": f"{i:02}" + "x" * 20, "responses": [" good", " bad"], "ratings": [1, 0]}
        for i in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(path), "max_prompt_tokens": 24}
    values = config.model_dump() | {"data": data, "reward_model": {"max_tokens": 16}}
    with pytest.raises(DataError, match=r"reward_model\.max_tokens=16 cuts every .*raise it"):
        run_reward_model(Config.model_validate(values), policy, tmp_path)
    values["reward_model"] = {"reference_prompts": 4, "epochs": 1}
    report = run_reward_model(Config.model_validate(values), policy, tmp_path)
    assert (report.truncated, report.alike) == (0, 0)


@pytest.mark.parametrize(
    "spoil, message",
    [
        ({"max_prompt_tokens": 3}, r"the prompt has .* data\.max_prompt_tokens is 3"),
        ({"validation": "equal"}, r"rated differently .*, so .* data\.validation"),
    ],
)
def test_rows_are_found_bad_before_training(config, policy, tmp_path, spoil, message):
    if "validation" in spoil:
        spoil = {"validation": str(tmp_path / "equal.jsonl")}
        row = {"prompt": "Film", "responses": [" a", " b"]}
        rows = [row | {"ratings": [1, 1]}, row | {"ratings": [0, 0]}]
        (tmp_path / "equal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = config.model_dump()
    values["data"] |= spoil
    values["generate"]["max_new_tokens"] = 24
    with pytest.raises(DataError, match=message):
        run_reward_model(
            Config.model_validate(values), policy, tmp_path, lambda *_: pytest.fail("trained")
        )


def test_it_learns_what_people_prefer(trained):
    _, report, seen = trained
    assert report.held_out.accuracy["2"].value > 0.9
    assert report.held_out.accuracy["0"].value > 0.8
    assert report.steps == seen[0][1] and report.skipped == 0


def test_held_out_pairs_are_of_one_row_also_where_two_rows_have_one_prompt(trained):
    _, report, _ = trained
    held_out = report.held_out
    assert held_out.accuracy["0"].pairs == held_out.responses // 4 * 6


@pytest.mark.parametrize("across, pairs, right", [(False, 2, 1), (True, 4, 0.75)])
def test_rows_with_one_prompt_are_compared_with_each_other_only_on_one_scale(
    model, monkeypatch, across, pairs, right
):
    """A over B, and B over C: that B is 0 in one row and 1 in the other compares nothing."""
    a, b, c = (np.array([id], np.int32) for id in (3, 2, 1))
    ratings_K = np.array([1, 0], np.float32)
    groups = [Group(prompt="", ids=ids, ratings_K=ratings_K) for ids in ((a, b), (b, c))]
    monkeypatch.setattr(
        reward_model, "score_rows", lambda _, rows: np.array([float(ids[0]) for ids in rows])
    )
    found = reward_model.judge(model, groups, 0, across=across).accuracy["0"]
    assert (found.pairs, found.value) == (pairs, right)


def test_what_it_saves_says_how_good_it_is(trained, policy):
    out, report, _ = trained
    model = ScalarModel.load(out / "model")
    fingerprint = tokenizer_fingerprint(load_tokenizer(policy))
    assert model.meta["tokenizer_fingerprint"] == fingerprint
    assert model.meta["held_out"]["accuracy"]["1"]["value"] == report.held_out.accuracy["1"].value
    assert (float(model.gain), float(model.bias)) == pytest.approx((report.gain, report.bias))
    assert (out / "calibration.png").exists()
    assert json.loads((out / "report.json").read_text())["examples"] == report.examples


def test_the_scale_is_mean_0_and_deviation_1_on_the_policy_s_samples(trained, config, policy):
    out, report, _ = trained
    tokenizer = load_tokenizer(policy)
    samples = reference_samples(config, load_policy(policy), tokenizer)
    assert len(samples) == report.reference_samples == 24
    assert all(ids[-1] == tokenizer.eos_token_id for ids in samples)
    scores_N = score_rows(ScalarModel.load(out / "model"), samples)
    assert scores_N.mean() == pytest.approx(0, abs=1e-4)
    assert scores_N.std() == pytest.approx(1, abs=1e-4)


def test_few_prompts_are_sampled_more_than_once(config, policy, tmp_path):
    """One would give one score, which is no scale."""
    values = config.model_dump()
    row = {"prompt": "Film", "responses": [" good", " bad"], "ratings": [2, 1]}
    for name in ("source", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        values["data"][name] = str(tmp_path / f"{name}.jsonl")
    values["data"]["limit"] = None
    one = Config.model_validate(values)
    samples = reference_samples(one, load_policy(policy), load_tokenizer(policy))
    assert len(samples) == one.reward_model.reference_prompts
    assert len({ids.tobytes() for ids in samples}) > 1
    assert run_reward_model(one, policy, tmp_path / "out").gain > 0


def test_samples_that_fill_the_model_s_context_can_be_read(config):
    """GPT-2 has so many positions and no more, and here a longest prompt's response fills them."""
    tokenizer = train_tokenizer(["Film 12 was", *GOOD, *BAD] * 3, 300, 24)
    shape = GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=32, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(shape).eval()
    prompts = load_prompts(config.data, tokenizer, "train")
    longest = max(len(row.token_ids) for row in prompts)
    values = config.model_dump()
    values["data"]["max_prompt_tokens"] = longest
    values["generate"]["max_new_tokens"] = 24 - longest
    whole = Config.model_validate(values)
    samples = reference_samples(whole, model, tokenizer)
    assert max(map(len, samples)) == 24
    scores_N = score_rows(ScalarModel.from_policy(model, 1), samples)
    assert np.isfinite(scores_N).all()
