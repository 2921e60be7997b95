"""SFT: the loss is on responses alone, and what comes out is a policy that loads."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from distrl.config import Config
from distrl.data.errors import DataError
from distrl.data.tokenizer import load_tokenizer, train_tokenizer
from distrl.learn import sft
from distrl.learn.sft import (
    Example,
    collate,
    encode,
    next_token_loss,
    run_sft,
    validation_loss,
)
from distrl.models import load_policy, new_llama

MODEL = {"hidden": 32, "layers": 1, "heads": 1, "vocab": 300, "context": 48}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rows = [
        {"prompt": f"Is number {i} even?", "response": " yes" if i % 2 == 0 else " no, it is odd"}
        for i in range(120)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(source, **sections) -> Config:
    sft = {"epochs": 4, "lr": 2e-2, "batch_tokens": 128, "max_tokens": 40}
    sft |= sections.pop("sft", {})
    reward_model = {"max_tokens": 40}
    generate = {"max_new_tokens": 12}
    return Config.model_validate(
        {
            "model": MODEL,
            "data": {"source": str(source), "max_prompt_tokens": 30},
            "sft": sft,
            "reward_model": reward_model,
            "generate": generate,
            **sections,
        }
    )


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """With two threads, each of which has sequences of its own."""
    out, seen = tmp_path_factory.mktemp("sft"), []
    torch.set_num_threads(2)
    report = run_sft(config(source), out, lambda *row: seen.append(row))
    assert torch.get_num_threads() == 2, "the cores are given back"
    return out, report, seen


def test_the_loss_is_on_response_tokens_alone_whatever_the_padding(source):
    tokenizer = train_tokenizer(["Is number 1 even? yes"], 300, 48)
    model = new_llama(config(source).model, tokenizer, 0)
    rng = np.random.default_rng(0)
    lengths = ((9, 4), (5, 1), (12, 11), (3, 0))
    batch = [
        Example(ids=rng.integers(0, 259, n).astype(np.int32), prompt_tokens=p) for n, p in lengths
    ]
    expected = []
    for example in batch:
        ids = torch.as_tensor(example.ids, dtype=torch.long)
        logprobs = model(ids[None]).logits[0].log_softmax(-1)
        first = max(example.prompt_tokens, 1)  # nothing stands before the very first token
        expected += [-logprobs[t - 1, ids[t]] for t in range(first, len(ids))]
    loss = next_token_loss(model, batch)
    assert loss.count == len(expected)
    torch.testing.assert_close(loss.mean, torch.stack(expected).mean())
    assert validation_loss(model, batch) == pytest.approx(loss.mean.item(), rel=1e-5)


def test_targets_come_from_lengths_and_not_from_ids():
    batch = [
        Example(ids=np.array([0, 7, 0, 0], np.int32), prompt_tokens=2),
        Example(ids=np.array([0, 9], np.int32), prompt_tokens=1),
    ]
    _, targets_BT = collate(batch, CPU)
    assert targets_BT.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_long_rows_are_cut_and_counted_and_rows_without_a_response_dropped(source):
    from distrl.data.sources import Demonstration

    tokenizer = train_tokenizer(["abc"], 300, 48)
    rows = [
        Demonstration(row_id="a", prompt="xy", response="z"),
        Demonstration(row_id="b", prompt="xy", response="z" * 20),
        Demonstration(row_id="c", prompt="x" * 20, response="z"),
    ]
    examples, cut = encode(rows, tokenizer, 10)
    assert cut == 2
    assert [(len(e.ids), e.prompt_tokens) for e in examples] == [(5, 3), (10, 3)]


def test_a_cut_that_leaves_no_response_is_an_error(tmp_path):
    source, rng = tmp_path / "rows.jsonl", np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    rows = [{"prompt": "".join(rng.choice(letters, 25)), "response": " yes"} for _ in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"sft\.max_tokens=8 is filled by the prompt .*raise it"):
        run_sft(config(source, sft={"max_tokens": 8}), tmp_path)


def test_it_learns_and_reports(trained):
    out, report, seen = trained
    assert report.validation_losses[-1] < report.validation_losses[0] < math.log(300)
    assert report.validation_loss < 1.5
    assert report.perplexity == pytest.approx(math.exp(report.validation_loss))
    assert report.truncated == 0 and report.skipped == 0
    assert json.loads((out / "report.json").read_text())["steps"] == report.steps
    assert max(step for step, _, _ in seen) == seen[0][1] == report.steps
    assert sum("validation_loss" in metrics for _, _, metrics in seen) == 4


def test_the_saved_policy_has_the_reported_loss(trained, source, monkeypatch):
    from distrl.data.sources import load_demonstrations

    out, report, _ = trained
    tokenizer = load_tokenizer(out / "policy")
    rows = load_demonstrations(config(source).data, "validation")
    examples, _ = encode(rows, tokenizer, 40)
    model = load_policy(out / "policy", tokenizer=tokenizer)
    assert validation_loss(model, examples) == pytest.approx(report.validation_loss, abs=1e-5)
    monkeypatch.setattr(sft, "EVALUATION_TOKENS", 4)  # less than any example has
    assert validation_loss(model, examples) == pytest.approx(report.validation_loss, abs=1e-5)


def test_the_same_seed_gives_the_same_policy(trained, source, tmp_path):
    out, _, _ = trained
    torch.set_num_threads(2)
    run_sft(config(source), tmp_path / "again")
    run_sft(config(source, run={"seed": 1}, sft={"epochs": 1}), tmp_path / "other")
    one, again, other = (
        load_policy(folder / "policy").state_dict()
        for folder in (out, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_it_goes_on_from_a_checkpoint(trained, source, tmp_path):
    out, before, _ = trained
    settings = {"model": {"path": str(out / "policy")}, "sft": {"epochs": 1, "lr": 1e-6}}
    report = run_sft(config(source, **settings), tmp_path)
    assert report.validation_loss == pytest.approx(before.validation_loss, abs=0.02)
    same = [(folder / "policy" / "tokenizer.json").read_text() for folder in (out, tmp_path)]
    assert same[0] == same[1]
