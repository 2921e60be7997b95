"""Policies: made by seed, saved whole, loaded with clear errors."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from distrl.config import ModelConfig
from distrl.data.tokenizer import train_tokenizer
from distrl.disk import NotWritten
from distrl.models import load_policy, new_llama, save_policy
from distrl.models.folder import replacing
from distrl.models.load import ModelError, check_weights

SMALL = ModelConfig(hidden=64, layers=2, heads=2, vocab=300, context=32)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a good film", "a bad film", "the end"], 300, 32)


def test_the_seed_alone_decides_the_weights(tokenizer):
    state = torch.get_rng_state()
    one, same, other = (new_llama(SMALL, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were used up"


def test_a_new_llama_has_the_sizes_asked_for(tokenizer):
    config = new_llama(ModelConfig(), tokenizer, 0).config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (192, 4, 512)
    assert config.tie_word_embeddings and config.max_position_embeddings == 128
    assert config.eos_token_id == tokenizer.eos_token_id


def test_saved_and_loaded_it_answers_the_same(tmp_path, tokenizer):
    model = new_llama(SMALL, tokenizer, 0).eval()
    save_policy(model, tokenizer, tmp_path / "policy")
    ids = torch.randint(0, 259, (3, 9))
    again = load_policy(tmp_path / "policy", tokenizer=tokenizer)
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert torch.allclose(model(ids).logits, elsewhere(ids).logits, atol=1e-6)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not again.training
    assert len(AutoTokenizer.from_pretrained(tmp_path / "policy")) == len(tokenizer)
    assert not [p for p in (tmp_path / "policy").iterdir() if p.suffix in {".bin", ".pt", ".pkl"}]


def test_a_temperature_without_sampling_is_no_hindrance_to_saving(tmp_path, tokenizer):
    """Checkpoints are about that transformers reads and does not write."""
    save_policy(new_llama(SMALL, tokenizer, 0), tokenizer, tmp_path / "policy")
    path = tmp_path / "policy" / "generation_config.json"
    settings = json.loads(path.read_text()) | {"temperature": 0.9, "top_p": 0.6}
    path.write_text(json.dumps(settings))
    save_policy(load_policy(tmp_path / "policy"), tokenizer, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert again["temperature"] == 0.9 and again["do_sample"]


@pytest.mark.parametrize("pad", [0, 1, 2])
def test_padding_never_changes_a_log_probability(tokenizer, pad):
    model = new_llama(SMALL, tokenizer, 0).eval()
    rows = [torch.randint(3, 259, (n,)) for n in (3, 11, 7)]
    padded = torch.full((3, 14), pad)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    together = model(padded).logits
    for place, row in enumerate(rows):
        alone = model(row.unsqueeze(0)).logits[0]
        assert torch.allclose(together[place, : len(row)], alone, atol=1e-5)


def test_errors_name_the_folder_and_what_is_missing(tmp_path, tokenizer):
    with pytest.raises(ModelError, match="no model folder"):
        load_policy(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match=r"no config\.json.*notes\.txt"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load the policy"):
        load_policy(tmp_path)


def test_weights_that_are_not_whole_are_told_before_and_at_loading(tmp_path, tokenizer):
    save_policy(new_llama(SMALL, tokenizer, 0), tokenizer, tmp_path / "policy")
    check_weights(tmp_path / "policy")
    path = tmp_path / "policy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read.*copy it again"):
        check_weights(tmp_path / "policy")
    with pytest.raises(ModelError, match="cannot load the policy"):
        load_policy(tmp_path / "policy")
    path.unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        check_weights(tmp_path / "policy")


def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path, tokenizer):
    save_policy(new_llama(SMALL, tokenizer, 0), tokenizer, tmp_path / "policy")
    tokenizer_of_more = train_tokenizer(["x"], 300, 32)
    tokenizer_of_more.add_tokens([f"<extra{i}>" for i in range(100)])
    with pytest.raises(ModelError, match="ids but the model"):
        load_policy(tmp_path / "policy", tokenizer=tokenizer_of_more)


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, tokenizer):
    model = new_llama(SMALL, tokenizer, 0)
    save_policy(model, tokenizer, tmp_path / "policy")
    before = (tmp_path / "policy" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        save_policy(model, tokenizer, tmp_path / "policy")
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == before


def test_replacing_keeps_the_old_folder_where_writing_fails(tmp_path):
    folder = tmp_path / "thing"
    with replacing(folder) as new:
        (new / "a").write_text("one")
    with pytest.raises(RuntimeError), replacing(folder) as new:
        (new / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "one"
    with replacing(folder) as new:
        (new / "b").write_text("two")
    assert [p.name for p in folder.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["thing"], "something was left beside it"


def test_a_full_disk_is_told_in_place_of_safetensors_own_words(tmp_path):
    folder = tmp_path / "thing"
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ):
        said = r"the model could not be written to .*thing: No space left on"
        with pytest.raises(NotWritten, match=said), replacing(folder):
            raise error
    with pytest.raises(SafetensorError, match="a bug"), replacing(folder):
        raise SafetensorError("a bug")
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_behind_is_no_hindrance(tmp_path):
    for left in (".thing.new", ".thing.old", "thing"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "a").write_text(left)
    with replacing(tmp_path / "thing") as new:
        (new / "b").write_text("two")
    assert [p.name for p in tmp_path.rglob("*")] == ["thing", "b"]
