"""What is looked at before the first stage, and by `--dry-run`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from transformers import BloomConfig, GraniteConfig, Phi3Config

from distrl.cli import main
from distrl.cli.checks import check_models, check_rows, check_what_is_there, known_policy
from distrl.cli.stages import check_context, claimed
from distrl.cli.train import prepare_stages, write_pretrain
from distrl.config import Config, ConfigError, dump_yaml
from distrl.data.errors import DataError
from distrl.data.reviews import split_of
from distrl.data.tokenizer import load_tokenizer
from distrl.learn.pretrain import Examples
from distrl.models import ScalarModel, load_policy
from distrl.models.load import ModelError


@pytest.fixture(autouse=True)
def nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("sft.run_sft", "reward_model.run_reward_model"):
        monkeypatch.setattr(f"distrl.learn.{stage}", lambda *_: pytest.fail("a stage was begun"))


def brevity(prompt: str, response: str, meta: Any) -> float:
    return -float(len(response))


@pytest.fixture
def recipe(tiny_policy: Path, tmp_path: Path) -> dict[str, Any]:
    """SFT from the tiny policy, rewards by a rule."""
    return {
        "run": {"name": "r", "root": str(tmp_path / "runs")},
        "model": {"path": str(tiny_policy)},
        "score": {"parts": [{"name": "rule", "function": f"{__name__}:brevity"}]},
        "learn": {"value": {"start": "policy"}},
    }


def refused(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `train` and `train --dry-run` say, which is the same; no stage is begun."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    said = []
    for more in ([], ["--dry-run"]):
        assert main(["train", "--config", str(path), *more]) in (1, 2)
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    return said[0]


@pytest.fixture
def other_reward_model(tiny_policy: Path, tmp_path: Path) -> Path:
    """A reward model whose tokenizer knows a word more."""
    tokenizer = load_tokenizer(tiny_policy)
    model = ScalarModel.from_policy(load_policy(tiny_policy))
    tokenizer.add_tokens(["another"])
    model.save(tmp_path / "other", tokenizer, {})
    return tmp_path / "other"


def test_a_recipe_that_works_passes(recipe: dict[str, Any], tiny_policy: Path) -> None:
    config = Config.model_validate(recipe)
    check_what_is_there(config)
    assert known_policy(config) == tiny_policy
    assert known_policy(Config()) is None


def test_lora_targets(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["learn"]["lora"] = {"rank": 2, "targets": ["query"]}
    assert "an adapter is called 'query'; it has" in refused(recipe, tmp_path, capsys)


def test_the_critic_s_tokenizer(
    recipe: dict[str, Any],
    other_reward_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe["score"] = {"parts": [{"name": "other", "model": str(other_reward_model)}]}
    check_what_is_there(Config.model_validate(recipe))
    recipe["learn"] = {"value": {"start": "reward_model"}}
    said = refused(recipe, tmp_path, capsys)
    assert "has another tokenizer" in said and "learn.value.start=policy" in said


def test_a_critic_without_a_reward_model_to_start_from(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["learn"] = {}
    assert "names no reward model for the critic" in refused(recipe, tmp_path, capsys)


def test_folders_without_a_reward_model(
    recipe: dict[str, Any],
    tiny_policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewards = recipe["score"]["parts"]
    rewards.append({"name": "taste", "model": str(tmp_path / "runs/R/reward-model/model")})
    said = refused(recipe, tmp_path, capsys)
    assert "score.parts, 'taste': no model folder" in said
    assert f"This run's own would be {tmp_path / 'runs/r/reward-model/model'}" in said
    rewards[-1]["model"] = str(tiny_policy)
    said = refused(recipe, tmp_path, capsys)
    assert "holds no reward model, as it has no head.safetensors and no distrl.json" in said
    assert "distrl reward-model" in said
    rewards[-1]["model"] = str(tmp_path / "runs/r/reward-model/model")
    check_what_is_there(Config.model_validate(recipe))


def test_a_reward_model_that_cannot_read_the_longest_sample(
    recipe: dict[str, Any],
    tiny_policy: Path,
    other_reward_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    policy = load_policy(tiny_policy)
    context = policy.config.max_position_embeddings
    assert context is not None
    model = ScalarModel.from_policy(policy)
    model.body.config.max_position_embeddings = 40
    model.save(tmp_path / "short", load_tokenizer(tiny_policy), {})
    recipe["score"]["parts"].append({"name": "taste", "model": str(tmp_path / "short")})
    recipe["data"] = {"max_prompt_tokens": 12}
    recipe["generate"] = {"max_new_tokens": 29}
    said = refused(recipe, tmp_path, capsys)
    assert "score.parts, 'taste'" in said and "reads 40 tokens" in said and "= 41" in said
    recipe["generate"] = {"max_new_tokens": 28}
    check_what_is_there(Config.model_validate(recipe))
    # How many tokens of another tokenizer a sample has is not known.
    config_file = other_reward_model / "config.json"
    told = json.loads(config_file.read_text()) | {"max_position_embeddings": 40}
    config_file.write_text(json.dumps(told))
    recipe["score"]["parts"][-1]["model"] = str(other_reward_model)
    recipe["generate"] = {"max_new_tokens": 29}
    check_what_is_there(Config.model_validate(recipe))


def rows_at(path: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    """A data section for these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": str(path), "validation": str(path)}


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"prompt": "p"}, "rows.jsonl:1: no column 'response'"),
        ({"prompt": "p", "response": ""}, "rows.jsonl:1: column 'response' is empty"),
    ],
)
def test_no_text_for_ppo_ptx(
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    cause: str,
) -> None:
    recipe["data"] = rows_at(tmp_path / "rows.jsonl", row)
    recipe["sft"] = {"epochs": 0}
    recipe["learn"]["pretrain"] = {"coef": 0.5}
    said = refused(recipe, tmp_path, capsys)
    assert "learn.pretrain.coef=0.5" in said and cause in said
    assert "data.response_column, or set learn.pretrain.coef=0" in said


def test_what_ppo_ptx_reads_is_written(
    recipe: dict[str, Any], tiny_policy: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "p", "response": "z" * count} for count in (1, 2, 3, 90)]
    recipe |= {"data": rows_at(tmp_path / "rows.jsonl", *rows), "sft": {"max_tokens": 10}}
    recipe["learn"]["pretrain"] = {"coef": 0.5}
    write_pretrain(Config.model_validate(recipe), tiny_policy, tmp_path / "pretrain")
    written = Examples.load(tmp_path / "pretrain").ids
    tokenizer = load_tokenizer(tiny_policy)
    texts = sorted((str(tokenizer.decode(ids)) for ids in written), key=len)
    bos, eos = "<bos>", "<eos>"
    assert texts[:3] == [f"{bos}p{'z' * count}{eos}" for count in (1, 2, 3)]
    assert max(map(len, written)) == 10 and eos not in texts[3]


def test_ppo_ptx_reads_a_text_of_its_own(
    recipe: dict[str, Any], tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"plain text {'z' * count}" for count in range(40)]
    rows_at(tmp_path / "corpus.jsonl", *({"response": text} for text in texts))
    recipe |= {"data": rows_at(tmp_path / "rows.jsonl", {"prompt": "p"}), "sft": {"epochs": 0}}
    recipe["learn"]["pretrain"] = {"coef": 0.5, "source": str(tmp_path / "corpus.jsonl")}
    write_pretrain(Config.model_validate(recipe), tiny_policy, tmp_path / "pretrain")
    tokenizer = load_tokenizer(tiny_policy)
    written = {
        str(tokenizer.decode(ids, skip_special_tokens=True))
        for ids in Examples.load(tmp_path / "pretrain").ids
    }
    assert written <= set(texts) and 30 <= len(written) < 40, "a tenth is held out"
    recipe["learn"]["pretrain"]["source"] = str(tmp_path / "nowhere.jsonl")
    said = refused(recipe, tmp_path, capsys)
    assert "nowhere.jsonl" in said and "learn.pretrain.coef=0.5" in said


def test_what_ppo_ptx_cannot_use_is_told_with_the_fix(
    recipe: dict[str, Any], tiny_policy: Path, tmp_path: Path
) -> None:
    recipe |= {"data": rows_at(tmp_path / "rows.jsonl", {"prompt": "p"})}
    recipe["learn"]["pretrain"] = {"coef": 0.5}
    with pytest.raises(DataError, match=r"learn\.pretrain\.coef=0\.5 .*pretrain\.coef=0$"):
        write_pretrain(Config.model_validate(recipe), tiny_policy, tmp_path / "pretrain")
    recipe |= {"data": rows_at(tmp_path / "rows.jsonl", {"prompt": "p" * 20, "response": "z"})}
    recipe["sft"] = {"max_tokens": 8}
    with pytest.raises(ConfigError, match=r"learn\.pretrain\.coef=0\.5 .*sft\.max_tokens=8; raise"):
        write_pretrain(Config.model_validate(recipe), tiny_policy, tmp_path / "pretrain")


def rated(count: int = 60) -> list[dict[str, Any]]:
    """Rows that serve every view, of which each split gets some."""
    answers = {"response": " yes", "responses": [" yes", " no"], "ratings": [1, 0]}
    return [{"prompt": f"Number {i}?", **answers} for i in range(count)]


def first_of(split: str, rows: list[dict[str, Any]]) -> int:
    return next(place for place, row in enumerate(rows) if split_of(row["prompt"]) == split)


def spoilt(recipe: dict[str, Any], path: Path, place: int, **columns: Any) -> Config:
    """The recipe with rewards of its own model, on rated rows of which one is spoilt."""
    rows = rated()
    rows[place] |= columns
    data = rows_at(path, *rows) | {"max_prompt_tokens": 24, "validation": None}
    return Config.model_validate(recipe | {"data": data, "score": {}})


def prepared(config: Config) -> None:
    with claimed(config, resume=False, fresh=False) as directory:
        prepare_stages(config, directory, fresh=False)


@pytest.mark.parametrize(
    ("split", "columns", "cause"),
    [
        ("train", {}, "the prompt has .* data.max_prompt_tokens is 24"),
        ("test", {}, "the prompt has .* data.max_prompt_tokens is 24"),
        ("train", {"ratings": [1]}, "1 numbers in 'ratings' for 2 responses"),
        ("validation", {"ratings": [1, None]}, "should be a list of finite numbers"),
        ("train", {"response": 5}, "column 'response' should be text"),
        ("validation", {"response": ""}, "column 'response' is empty"),
    ],
)
def test_a_bad_row_is_told_before_the_first_stage(
    recipe: dict[str, Any], tmp_path: Path, split: str, columns: dict[str, Any], cause: str
) -> None:
    place = first_of(split, rated())
    columns = columns or {"prompt": longer_in(split)}
    config = spoilt(recipe, tmp_path / "rows.jsonl", place, **columns)
    with pytest.raises(DataError, match=rf"rows\.jsonl:{place + 1}: .*{cause}"):
        prepared(config)


MY_REWARDS = """
def fine(prompt, response, meta):
    return len(response) / len(meta["responses"])

def bad(prompt, response, meta):
    return len(response) / meta["words"]

def endless(prompt, response, meta):
    return float("inf")

def leaves(prompt, response, meta):
    raise SystemExit("enough")
"""


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (
            "bad",
            r"raised KeyError: 'words' \(.*my_rewards_here\.py, line 6\); .*tried with",
        ),
        ("endless", "answered inf, which is not finite; prompt .*'yes'.*: mend it"),
        ("leaves", r"raised SystemExit: enough \(.*my_rewards_here\.py, line 12\); .*tried with"),
    ],
)
def test_a_reward_of_one_s_own_is_tried_before_the_first_stage(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    cause: str,
) -> None:
    (tmp_path / "my_rewards_here.py").write_text(MY_REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    config = spoilt(recipe, tmp_path / "rows.jsonl", 0)

    def rewarded_by(name: str) -> Config:
        parts = [{"name": "mine", "function": f"my_rewards_here:{name}"}]
        return Config.model_validate(config.model_dump() | {"score": {"parts": parts}})

    check_rows(rewarded_by("fine"))
    with pytest.raises(ConfigError, match=f"reward 'mine' .*{cause}"):
        prepared(rewarded_by(function))


def test_a_reward_too_slow_for_a_group_is_told_before_the_first_stage(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_rewards_here.py").write_text(
        "import time\ncalls = []\n"
        "def slow(prompt, response, meta):\n    time.sleep(0.1)\n    return 1\n"
        "def first(prompt, response, meta):\n"
        "    time.sleep(0 if calls else 0.6)\n    calls.append(1)\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    whole = spoilt(recipe, tmp_path / "rows.jsonl", 0).model_dump()

    def rewarded_by(*names: str) -> Config:
        parts = [{"name": name, "function": f"slow_rewards_here:{name}"} for name in names]
        score = {"parts": parts, "timeout_s": 2}
        return Config.model_validate(
            whole | {"score": score, "generate": {"samples_per_prompt": 4}}
        )

    check_rows(rewarded_by("slow"))
    check_rows(rewarded_by("first"))  # it loads something once
    config = Config.model_validate(
        rewarded_by("slow", "first").model_dump() | {"generate": {"samples_per_prompt": 40}}
    )
    with pytest.raises(
        ConfigError,
        match=r"reward 'slow' took 0\.\d+ s and .*samples_per_prompt=40 would take \d.* s, and "
        r"score\.timeout_s=2\. .*raise score\.timeout_s well above",
    ):
        prepared(config)


def test_a_bad_rating_is_told_before_the_stage_that_it_is_not_of(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = first_of("train", rated())
    config = spoilt(recipe, tmp_path / "rows.jsonl", place, ratings=[1])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(config))
    assert main(["reward-model", "--config", str(path)]) == 1
    assert f"rows.jsonl:{place + 1}: " in capsys.readouterr().err


def test_ratings_are_read_wherever_a_part_is_the_run_s_own(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    place = first_of("train", rated())
    config = spoilt(recipe, tmp_path / "rows.jsonl", place, ratings=[1])
    parts = {"parts": [{"name": "taste", "model": "own"}]}
    with pytest.raises(DataError, match=rf"rows\.jsonl:{place + 1}: 1 numbers in 'ratings'"):
        prepared(Config.model_validate(config.model_dump() | {"score": parts}))


def test_a_bad_prompt_is_told_before_the_reward_model_has_its_policy(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, path = first_of("train", rated()), tmp_path / "recipe.yaml"
    config = spoilt(recipe, tmp_path / "rows.jsonl", place, prompt=longer_in("train"))
    path.write_text(dump_yaml(config))
    assert main(["reward-model", "--config", str(path)]) == 1
    assert f"rows.jsonl:{place + 1}: the prompt has" in capsys.readouterr().err
    config = spoilt(new_model(recipe), tmp_path / "rows.jsonl", place)  # no tokenizer as yet
    path.write_text(dump_yaml(config))
    ids = ["--data.id_column", "response", "--data.validation", str(tmp_path / "rows.jsonl")]
    assert main(["reward-model", "--config", str(path), *ids]) == 1
    assert "rows.jsonl:2: id ' yes' is taken by" in capsys.readouterr().err
    assert not config.run.dir.exists()


def test_ratings_that_are_all_alike_are_told_without_a_tokenizer(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    rows = [row | {"ratings": [1, 1]} for row in rated()]
    recipe |= {"data": rows_at(tmp_path / "rows.jsonl", *rows), "score": {}, "model": {}}
    with pytest.raises(DataError, match="no two responses to one prompt are rated"):
        check_rows(Config.model_validate(recipe))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (GraniteConfig, {"logits_scaling": 8.0}, "logits_scaling=8.0.*choose another model"),
        (BloomConfig, {"n_head": 4, "n_layer": 1}, "no policy can be made of .*bloom"),
        (
            Phi3Config,
            {
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 32,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 32,
                },
            },
            "beyond the 32 positions up to which .*longrope.*shorten it",
        ),
    ],
)
def test_kinds_of_models_that_cannot_be_trained(
    recipe: dict[str, Any],
    tiny_policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: Any,
    settings: dict[str, Any],
    message: str,
) -> None:
    """Their weights are not read: those of the tiny policy stand for them."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"pad_token_id": 0, "max_position_embeddings": 256}
    folder = tmp_path / kind.model_type
    shutil.copytree(tiny_policy, folder)
    kind(**(sizes | settings)).save_pretrained(folder)
    recipe["model"] = {"path": str(folder)}
    assert re.search(message, refused(recipe, tmp_path, capsys), re.DOTALL)
    if kind is Phi3Config:
        recipe["data"] = {"max_prompt_tokens": 12}
        recipe["generate"] = {"max_new_tokens": 20}
        recipe |= {"sft": {"max_tokens": 32}, "reward_model": {"max_tokens": 32}}
        check_context(Config.model_validate(recipe))


def longer_in(split: str) -> str:
    """A prompt that is too long, of that split."""
    return next(text for i in range(99) if split_of(text := f"{i}" + "xyz" * 30) == split)


def new_model(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"model": {"hidden": 32, "heads": 1, "layers": 1, "vocab": 300}}


def test_without_a_tokenizer_rows_are_told_as_far_as_they_go(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    place = first_of("test", rated())
    path = tmp_path / "rows.jsonl"
    config = spoilt(new_model(recipe), path, first_of("train", rated()), ratings=[1])
    with pytest.raises(DataError, match="1 numbers in 'ratings'"):
        prepared(config)
    check_rows(spoilt(new_model(recipe), path, place, prompt=longer_in("test")))
    twice = spoilt(new_model(recipe), path, 0)
    ids = twice.data.model_copy(update={"id_column": "response", "validation": str(path)})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: id ' yes' is taken by"):
        check_rows(twice.model_copy(update={"data": ids}))
    with pytest.raises(DataError, match=r"data\.prompt_words=\(3, 1\) should be the fewest and"):
        check_rows(Config.model_validate({"data": {"prompt_words": (3, 1)}}))


def test_where_sft_makes_the_policy_the_rest_is_looked_at_right_after(
    recipe: dict[str, Any],
    tiny_policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sft(config: Config, out: Path, *_: Any) -> Any:
        shutil.copytree(tiny_policy, out / "policy")
        return SimpleNamespace(parameters=1e6, validation_loss=1.0, truncated=0, seconds=1.0)

    monkeypatch.setattr("distrl.learn.sft.run_sft", sft)
    place = first_of("test", rated())
    path = tmp_path / "rows.jsonl"
    config = spoilt(new_model(recipe), path, place, prompt=longer_in("test"))
    with pytest.raises(DataError, match=rf"rows\.jsonl:{place + 1}: the prompt has"):
        prepared(config)
    assert known_policy(config) == config.run.dir / "sft" / "policy"
    recipe["learn"] = {"lora": {"rank": 2, "targets": ["query"]}}
    shutil.rmtree(config.run.dir)
    with pytest.raises(ModelError, match="called 'query'"):
        prepared(spoilt(new_model(recipe), path, place))


def test_without_a_row_to_evaluate_on_training_goes_on(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for row in rated() if split_of(row["prompt"]) != "test"]
    recipe["data"] = {**rows_at(tmp_path / "rows.jsonl", *rows), "validation": None}
    config = Config.model_validate(recipe)
    check_rows(config)
    assert "no prompts for 'distrl evaluate': no row of" in capsys.readouterr().out
    with pytest.raises(DataError, match="the test split"):
        check_rows(config, evaluates=True)


def test_what_the_learner_would_find_too_late_is_told_before(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny_policy)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path)
    check_models(Config(), tiny_policy, tiny_policy)
    with pytest.raises(ConfigError, match=r"another tokenizer .* learn\.value\.start=policy"):
        check_models(Config(), tiny_policy, tmp_path)
    alone = Config.model_validate({"learn": {"value": {"start": "policy"}}})
    check_models(alone, tiny_policy, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for section in ("learn", "generate", "score"):
        compiles = Config.model_validate({section: {"compile": True}})
        with pytest.raises(ConfigError, match=rf"{section}\.compile=true: this needs a C\+\+ comp"):
            check_models(compiles, tiny_policy, None)
    lora = {"learn": {"lora": {"rank": 2, "targets": ["query"]}}}
    with pytest.raises(ModelError, match="called 'query'"):
        check_models(Config.model_validate(lora), tiny_policy, tiny_policy)
