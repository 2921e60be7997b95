"""What a run would find only after its first stages: looked at before, as far as it is there.

`--dry-run` calls `check_what_is_there` before its plan, and `check_rows` (or what else a command
reads) after it, unless the rows are the built-in ones and still to be fetched (`rows_are_here`).
Nothing is trained, and no weight is read.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any

from distrl.cli.stages import (
    is_own,
    reward_model_folder,
    reward_stage,
    scored_by,
    sft_stage,
    trains_reward_model,
)
from distrl.config import Config, ConfigError
from distrl.data.errors import DataError, NoRows
from distrl.data.reviews import Split, reviews_are_here
from distrl.data.smollm2 import resolve_model
from distrl.data.sources import (
    REVIEWS,
    Demonstration,
    PromptRow,
    check_prompts,
    load_demonstrations,
    load_prompts,
)
from distrl.data.stream import PromptStream
from distrl.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from distrl.models.folder import META_FILE
from distrl.models.heads import HEAD_FILE
from distrl.models.load import ModelError, checked_folder, positions
from distrl.models.lora import check_targets
from distrl.records import Prompt
from distrl.roles import ScoreFailed

STAGE_SPLITS: tuple[Split, Split] = ("train", "validation")
MADE_UP = "yes"
"""The response that functions of the user's are tried on."""

COMPILERS = ("g++", "clang++", "c++")


def check_what_is_there(config: Config) -> None:
    """Compilers, folders of models, what goes with what, text for PPO-ptx. Raises ConfigError,
    ModelError or DataError."""
    check_reward_parts(config)
    reward_model = reward_model_folder(config)
    if reward_model is not None and is_own(config, reward_model):
        reward_model = None  # made from the policy, it has the policy's tokenizer
    check_models(config, known_policy(config), reward_model)
    texts = config.learn.pretrain.source or config.data.source
    if config.learn.pretrain.coef and texts != REVIEWS:
        pretrain_rows(config)


def rows_are_here(config: Config) -> bool:
    """Whether the run's rows can be looked at without a package that is still to be fetched."""
    return config.data.source != REVIEWS or reviews_are_here()


def check_rows(config: Config, *, evaluates: bool = False) -> None:
    """Read every row that the run will use: what is wrong with one is told now, and not after the
    stages before it. Where the tokenizer is not there yet, what needs one is left to a second call.

    Functions that reward are tried on a prompt. Without a row for the evaluation a run goes on,
    with a word, unless it `evaluates` itself. Raises DataError or ConfigError.
    """
    tokenizer = _known_tokenizer(config)
    check_demonstrations(config)
    if trains_reward_model(config):
        check_comparisons(config)
    rows = _prompts(config, "train", tokenizer)
    if rows:
        check_rewards(config, PromptStream(rows, seed=config.run.seed).next())
    try:
        _prompts(config, "test", tokenizer)
    except NoRows as error:
        if evaluates:
            raise
        print(f"no prompts for 'distrl evaluate': {error}", flush=True)


def check_rewards(config: Config, prompt: Prompt) -> None:
    """Try functions that reward on a prompt and a made-up response. Raises ConfigError where one
    fails, or where all together are too slow for a group."""
    samples, limit_s = config.generate.samples_per_prompt, config.score.timeout_s
    seconds = _seconds(config, prompt)
    if samples * sum(seconds.values()) > limit_s:
        seconds = _seconds(config, prompt)  # the first call may have loaded something
    if (group_s := samples * sum(seconds.values())) > limit_s:
        each = " and ".join(f"reward {name!r} took {s:.3g} s" for name, s in seconds.items())
        raise ConfigError(
            f"score.parts: {each} for one response, so a group of generate.samples_per_prompt="
            f"{samples} would take {group_s:.3g} s, and score.timeout_s={limit_s:g}. Make it "
            f"faster, or raise score.timeout_s well above {group_s:.3g}"
        )


def _seconds(config: Config, prompt: Prompt) -> dict[str, float]:
    """How long each function that rewards takes for a made-up response. Raises ConfigError."""
    from distrl.score.rules import RuleReward

    seconds = {}
    for part in config.score.parts:
        if part.function is None:
            continue
        rule = RuleReward(part.name, part.function)
        start = time.perf_counter()
        try:
            rule.number(prompt, MADE_UP)
        except ScoreFailed as failure:
            raise ConfigError(
                f"score.parts: {failure}, tried with the response {MADE_UP!r}. A sample may hold "
                "anything, and a group with one that gets no number is given up: mend it"
            ) from failure
        seconds[part.name] = time.perf_counter() - start
    return seconds


def check_demonstrations(config: Config) -> None:
    """Read what the policy is trained and judged on first, where SFT is wanted."""
    if config.sft.epochs:
        for split in STAGE_SPLITS:
            load_demonstrations(config.data, split)


def check_comparisons(config: Config) -> None:
    """Read what a reward model is trained and judged on, before the stage before it."""
    from distrl.learn.reward_model import comparisons, read_groups

    tokenizer = _known_tokenizer(config)
    for split in STAGE_SPLITS:
        if tokenizer is None:
            comparisons(config, split)
        else:
            read_groups(config, split, tokenizer)


def check_reference_prompts(config: Config) -> None:
    """Read the prompts on which a reward model's scale is measured, before any stage. Where the
    tokenizer is not there yet, how long they are is left to the stage itself."""
    _prompts(config, "train", _known_tokenizer(config))


def check_held_out_prompts(config: Config) -> None:
    """Read the prompts that an evaluation is drawn from, as far as they can be without an SFT stage
    that is not finished yet."""
    _prompts(config, "test", _known_tokenizer(config))


def _prompts(config: Config, split: Split, tokenizer: Any) -> list[PromptRow]:
    """A split's prompts; without a tokenizer they are looked at as far as they can be, and none
    comes back."""
    if tokenizer is not None:
        return load_prompts(config.data, tokenizer, split)
    check_prompts(config.data, split)
    return []


def _known_tokenizer(config: Config) -> Any:
    """The tokenizer that the policy will have; None where it is made yet."""
    folder = known_policy(config)
    return None if folder is None else load_tokenizer(folder)


def known_policy(config: Config) -> Path | None:
    """A folder with the layers and the tokenizer that the policy will have: `model.path`, which SFT
    changes neither of, or a finished SFT stage's; None where both are made yet."""
    folder = resolve_model(config.model.path)
    if folder is None and sft_stage(config).finished():
        folder = sft_stage(config).folder / "policy"
    return folder


def check_reward_parts(config: Config) -> None:
    """ModelError where a part of the reward names a folder without a reward model, or one that
    could not read the longest sample, and it is not the one that this run makes."""
    for part in scored_by(config).parts:
        if part.model is None or is_own(config, part.model):
            continue
        try:
            folder = checked_folder(part.model)
        except ModelError as error:
            raise ModelError(
                f"score.parts, {part.name!r}: {error}. This run's own would be "
                f"{reward_stage(config).folder / 'model'}, or 'own' in short"
            ) from None
        missing = [name for name in (HEAD_FILE, META_FILE) if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"score.parts, {part.name!r}: {folder} holds no reward model, as it has no "
                f"{' and no '.join(missing)}; make one with 'distrl reward-model'"
            )
        check_reads(config, part.name, folder)


def check_reads(config: Config, name: str, folder: Path) -> None:
    """ModelError where samples may be longer than a reward model can read. How long they are in
    the tokens of another tokenizer than the policy's is not known before."""
    policy, context = known_policy(config), positions(folder)
    if policy is None or context is None or config.sequence_tokens <= context:
        return
    own, theirs = (tokenizer_fingerprint(load_tokenizer(each)) for each in (folder, policy))
    if own == theirs:
        raise ModelError(
            f"score.parts, {name!r}: {folder} reads {context} tokens, and data.max_prompt_tokens + "
            f"generate.max_new_tokens = {config.sequence_tokens}; shorten one"
        )


def check_models(config: Config, policy: Path | None, reward_model: Path | None) -> None:
    """What the learner would only find once it is up; of folders that are None, nothing is asked.
    Raises ModelError or ConfigError."""
    learn = config.learn
    compiled = {
        f"{section}.compile=true": getattr(config, section).compile
        for section in ("learn", "generate", "score")
    } | {"learn.adam_bits=8": learn.adam_bits == 8}
    asked = [setting for setting, wanted in compiled.items() if wanted]
    if asked and not any(map(shutil.which, COMPILERS)):
        raise ConfigError(
            f"{' and '.join(asked)}: this needs a C++ compiler ({', '.join(COMPILERS)}), and there "
            "is none on the path; install one, or leave it out"
        )
    if learn.adam_bits == 8 and importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "learn.adam_bits=8 needs torchao: pip install 'distrl[eight-bit]', or set it to 32"
        )
    if policy is None:
        return
    if learn.lora.rank:
        check_targets(policy, learn.lora)
    from_rewards = learn.has_critic and learn.value.start == "reward_model"
    if from_rewards and reward_model is not None:
        tokenizers = [load_tokenizer(folder) for folder in (policy, reward_model)]
        if len(set(map(tokenizer_fingerprint, tokenizers))) > 1:
            raise ConfigError(
                f"the reward model in {reward_model} has another tokenizer than the policy in "
                f"{policy}: a critic that starts from it would read other words than were "
                "written. Set learn.value.start=policy; rewards may be of any tokenizer"
            )


def pretrain_rows(config: Config) -> list[Demonstration]:
    """The rows that PPO-ptx mixes in. Raises DataError that says who asks for them."""
    data, own = config.data, config.learn.pretrain.source
    if own is not None:
        plain = {"source": own, "prompt_column": "", "id_column": None}
        plain |= {"validation": None, "limit": None}
        data = data.model_copy(update=plain)
    try:
        return load_demonstrations(data, "train")
    except DataError as error:
        raise DataError(
            f"learn.pretrain.coef={config.learn.pretrain.coef:g} mixes text into PPO, and it "
            f"cannot be read: {error}. Name its column in data.response_column, or set "
            "learn.pretrain.coef=0"
        ) from error
