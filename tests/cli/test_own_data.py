"""The README's recipe for one's own model and data, word for word but for paths and sizes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from distrl.cli.main import main
from distrl.cli.options import merged, validated
from distrl.cli.stages import claimed, scored_by
from distrl.cli.train import prepare_stages, prompt_stream
from distrl.config import Config
from distrl.data.tokenizer import load_tokenizer
from distrl.records import Rollout, Sample, ScoredRollout, VersionSpan
from distrl.score import RewardSum

README = Path(__file__).parents[2] / "README.md"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SMALL = {
    "data": {"max_prompt_tokens": 48},
    "generate": {"max_new_tokens": 40},
    "reward_model": {"epochs": 1, "reference_prompts": 8},
}


@pytest.fixture(scope="module")
def folder(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instruct model, rated answers, and the reward function that the README names."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(tiny_policy, folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    words = np.array(["good", "bad", "film", "story", "could", "have", "been"])
    with (folder / "train.jsonl").open("w") as file:
        for row in range(200):
            answers = [" ".join(rng.choice(words, 6)) for _ in range(3)]
            ratings = [float(answer.count("good") - answer.count("bad")) for answer in answers]
            prompt = [{"role": "user", "content": f"number {row}"}]
            file.write(json.dumps({"prompt": prompt, "responses": answers, "ratings": ratings}))
            file.write("\n")
    (folder / "my_rewards.py").write_text(
        "def brevity(*, prompt, response, meta):\n    return -float(len(response.split()))\n"
    )
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    found = re.search(r"```yaml\n(# mine\.yaml\n.*?)```", README.read_text(), re.DOTALL)
    assert found, "the README has no mine.yaml"
    values: dict[str, Any] = yaml.safe_load(found[1])
    assert values["score"]["parts"][0]["model"] == "own"
    values["run"]["root"] = str(folder / "runs")
    values["model"]["path"] = str(folder / "model")
    values["data"]["source"] = str(folder / "train.jsonl")
    whole = merged(values, SMALL)
    (folder / "mine.yaml").write_text(yaml.safe_dump(whole))
    return validated(whole)


@pytest.fixture(scope="module")
def trained(config: Config, folder: Path) -> Iterator[Config]:
    """The stages that `distrl train` makes first: one part of the reward is its own model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with claimed(config, resume=False, fresh=False) as directory:
            prepare_stages(config, directory, fresh=False)
        yield config
    sys.modules.pop("my_rewards")


def test_the_plan_is_printed(
    trained: Config, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(folder / "mine.yaml"), "--dry-run"]) == 0
    assert "slots (groups under way, at most)" in capsys.readouterr().out


def test_the_reward_model_sees_the_whole_of_every_answer(trained: Config) -> None:
    report = json.loads((trained.run.dir / "reward-model" / "report.json").read_text())
    assert (report["truncated"], report["alike"]) == (0, 0)


def test_prompts_are_chat_and_rewards_are_of_both_parts(trained: Config, folder: Path) -> None:
    stream = prompt_stream(trained, folder / "model")
    prompt = stream.next()
    assert prompt.text.startswith("user: number") and prompt.text.endswith("assistant:")
    tokenizer = load_tokenizer(folder / "model")
    reward = RewardSum.of(scored_by(trained), tokenizer)
    ids = np.array(tokenizer.encode(" a good film", add_special_tokens=False), dtype=np.int32)
    sample = Sample(
        text=" a good film",
        token_ids=ids,
        logprobs=np.zeros(len(ids), np.float32),
        spans=(VersionSpan(version=0, start=0, end=len(ids)),),
        finish_reason="stop",
    )
    (scored,) = reward.score([Rollout(prompt=prompt, samples=(sample,), generator="g0")])
    assert isinstance(scored, ScoredRollout)
    parts = scored.scores[0].parts
    assert parts["short"] == -3.0
    assert scored.scores[0].value == pytest.approx(parts["taste"] - 0.3)
