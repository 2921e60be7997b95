"""What all tests share: a quiet offline environment, a tiny policy, and a check for leftovers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests import leftovers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAINS = (
    ("tests/end_to_end/test_stops.py",),
    ("tests/end_to_end/test_survivor.py", "tests/end_to_end/test_cluster.py"),
)
"""Files that run whole rings, each of which would have two cores for itself: the files of a chain
go to one worker, one after the other, so that there are never more rings than chains."""

FIRST = (
    *(file for chain in CHAINS for file in chain),
    "tests/driver/test_schedules.py",
    "tests/generate/test_processes.py",
)
"""The longest files, for the sake of their workers."""

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of workers side by side wait for each other

# Before anything is imported that reads them, and inherited by every process that tests start.
os.environ.update(
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    TOKENIZERS_PARALLELISM="false",
    # Leftovers are found by this mark; SPT_NOENV keeps setproctitle from writing over it.
    SPT_NOENV="1",
    **{leftovers.MARK: leftovers.SESSION},
)


# A machine that is busy with something else is no fault of the code.
settings.register_profile("distrl", deadline=None)
settings.load_profile("distrl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; tests marked `gpu` are skipped where there is no CUDA device."""

    def place(item: pytest.Item) -> int:
        file = file_of(item.nodeid)
        return FIRST.index(file) if file in FIRST else len(FIRST)

    items.sort(key=place)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


class Chained(LoadFileScheduling):
    """A worker takes a file at a time, or a chain of them."""

    def _split_scope(self, nodeid: str) -> str:
        file = file_of(nodeid)
        return next((" ".join(chain) for chain in CHAINS if file in chain), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Chained:
    if missing := [file for file in FIRST if not (config.rootpath / file).exists()]:
        raise pytest.UsageError(f"tests/conftest.py names files that are not there: {missing}")
    return Chained(config, log)


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is torch's, whatever another test of this process has compiled; what this one
    compiles is gone after it."""
    from distrl.models import attention

    monkeypatch.setattr(attention, "_kernel", None)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail at the end of the session where something was left (see `leftovers`)."""
    shared = leftovers.SharedFiles()
    shared.watch()
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # its service process lives until told otherwise
    processes = leftovers.after(15, leftovers.processes)
    assert not processes, f"left running: {'; '.join(processes)}"
    files = [*shared.left(), *leftovers.after(30, leftovers.memory_files)]
    assert not files, f"left in memory: {', '.join(files)}"
    senders = leftovers.after(30, leftovers.senders)
    assert not senders, f"left waiting: {'; '.join(senders)}"
    folders = leftovers.folders()
    assert not folders, f"left among temporary files: {', '.join(map(str, folders))}"


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """Numbers worked out from the papers' formulas, each with its source."""
    return json.loads((Path(__file__).parent / "algo/vectors.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a 2-layer, 64-wide Llama and a byte-level BPE of 300 tokens.

    Tied embeddings, float32, 128 positions, random weights that are the same each time;
    <pad> is 0, <bos> 1, <eos> 2. Read only: whoever changes it copies it first.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_policy")
    _byte_tokenizer().save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # heads of 32: the narrowest that vLLM's CPU attention takes
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with exactly 300 tokens, <pad>, <bos> and <eos> first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the movie is a good film and the story was not as bad as it could have been"
    tokenizer.train_from_iterator([words] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=128,
    )
