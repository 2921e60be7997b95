"""The real instruct model, converted; and what `model.path` may mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distrl.data.errors import DataError
from distrl.data.smollm2 import resolve_model, smollm2_checkpoint
from distrl.data.tokenizer import encode_prompt, load_tokenizer


def test_resolve_model(tmp_path: Path) -> None:
    assert resolve_model(None) is None
    with pytest.raises(DataError, match=r"no such folder; give .*'smollm2'"):
        resolve_model(str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"config\.json is a file; give the checkpoint folder"):
        resolve_model(str(tmp_path / "config.json"))
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.slow
def test_checkpoint_is_plain_and_its_tokenizer_is_the_original() -> None:
    folder = smollm2_checkpoint()
    assert resolve_model("smollm2") == folder
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["tie_word_embeddings"]) == ("float32", True)
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(538e6, rel=0.01)
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == config["vocab_size"] == 49_152
    # Digits stand alone, and do not take the blank before them.
    pieces = tokenizer.tokenize("a  12 b")
    assert pieces == ["a", "ĠĠ", "1", "2", "Ġb"]
    text, ids = encode_prompt(tokenizer, ({"role": "user", "content": "Hi"},))
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_checkpoint_knows_a_capital_and_ends_its_turn() -> None:
    folder = smollm2_checkpoint()
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = load_tokenizer(folder)

    def continuation(ids: list[int], tokens: int) -> list[int]:
        out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        return out[0, len(ids) :].tolist()

    capital = tokenizer.encode("The capital of France is", add_special_tokens=False)
    assert tokenizer.decode(continuation(capital, 1)) == " Paris"
    question = ({"role": "user", "content": "What is the capital of France? One word."},)
    answer = continuation(encode_prompt(tokenizer, question)[1].tolist(), 24)
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
