"""Models in the layout of Hugging Face: found in a folder or on the hub, with what identifies them.

Needs PyTorch and transformers: pip install marsjax[transformers].
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

from marsjax.files import digest_json, sha256_file

SETTINGS = ("*.json", "*.txt", "*.model")


class Found(NamedTuple):
    """A model on disk."""

    folder: pathlib.Path
    revision: str  # the commit on the hub, or the name of a folder
    sha256: str  # over names and sums of all files of weights
    settings_sha256: str  # and of the files beside them: the configuration, the tokenizer, its words


def need_transformers(encoder: str) -> tuple[Any, Any]:
    """The modules torch and transformers. Raises ImportError naming the extra where one is missing."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{encoder} needs PyTorch and transformers: pip install marsjax[transformers], or `tools/setup "
            "transformers` in a checkout"
        ) from error
    return torch, transformers


def find_model(encoder: str, name: str, revision: str) -> Found:
    """A folder as it is, or a hub name, whose files are downloaded into the cache of huggingface_hub unless they are
    there. Only weights in safetensors are taken: other formats can run code when they are loaded.

    Raises:
        ValueError: no name, or no such weights.
    """
    key = "text_model" if encoder == "llama" else "image_model"
    if not name:
        raise ValueError(f"{encoder}: expected features.{key}, a folder or a hub name, found none")
    folder = pathlib.Path(name)
    if not folder.is_dir():
        import huggingface_hub

        try:
            patterns = ["*.safetensors", *SETTINGS]
            folder = pathlib.Path(
                huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns)
            )
        except Exception as error:  # the hub has errors of many kinds
            raise ValueError(
                f"features.{key}: expected a folder or the name of a model on the hub, found {name!r} "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from error
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder}: expected weights in *.safetensors, found none; save the model in this format")
    return Found(folder, folder.name, _sums(weights), settings_sum(folder))


def settings_sum(folder: pathlib.Path) -> str:
    """sha256 over names and sums of all files that are no weights but decide what a model makes of a text or image."""
    return _sums(sorted(path for ending in SETTINGS for path in folder.glob(ending) if path.is_file()))


def _sums(paths: list[pathlib.Path]) -> str:
    return digest_json([[path.name, sha256_file(path)] for path in paths])


def check_width(encoder: str, found: int, expected: int) -> None:
    """Raises ValueError where a model has another width than the configuration expects; 0 expects any."""
    if expected and found != expected:
        key = "text_expected" if encoder == "llama" else "image_expected"
        raise ValueError(
            f"{encoder}: expected a model of width {expected}, found {found}; give another model, or set "
            f"features.{key} to its width, or to 0"
        )


def place(torch: Any) -> tuple[str, Any]:
    """Where models run and in which numbers: bfloat16 on an accelerator that has it, float32 elsewhere."""
    if not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
