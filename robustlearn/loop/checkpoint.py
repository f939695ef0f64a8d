"""Tensors and a header in one file that is whole or not there."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustlearn.errors import InputError

NAME, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"


def write(folder: Path, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> Path:
    """Write a checkpoint; the one before it stays in the folder as the previous one.

    At every moment one of the two is whole: the new file is written beside them, forced to the
    disk, and renamed.

    Raises
    ------
    InputError that names the path when the disk is full or cannot be written to; the files that
    were there are as they were.
    """
    tensors = {name: owned(value) for name, value in tensors.items()}
    text = json.dumps(header)
    content = save(tensors, {"header": text, "sha256": _digest(tensors, text)})
    path = folder / NAME
    _write(path, content, keep=folder / PREVIOUS)
    return path


def export(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a state dictionary alone, as ``safetensors.torch.load_file`` reads it."""
    _write(path, save({name: owned(value) for name, value in weights.items()}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and header of a checkpoint.

    Raises
    ------
    InputError that names the file if it is damaged: cut off, or other than its own hash.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = facts["header"]
        whole = facts["sha256"] == _digest(tensors, text)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged or no checkpoint: {error}") from error
    if not whole:
        raise InputError(f"{path} is damaged: its content does not have the hash that it names")
    return tensors, json.loads(text)


def newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the last whole checkpoint of a folder, None if it never had one.

    A damaged one is named in a warning, and the previous one is taken; training goes on from
    there to the same weights.

    Raises
    ------
    InputError if no checkpoint is whole.
    """
    faults = []
    for path in (folder / NAME, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            found = read(path)
        except InputError as error:
            faults.append(str(error))
            continue
        if faults:
            warnings.warn(f"{faults[0]}; going on from {path}", RuntimeWarning, stacklevel=2)
        return found
    if faults:
        raise InputError(f"{'; '.join(faults)}. No older one is left: start in another folder")
    return None


def exists(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, whole or not."""
    return any((folder / name).exists() for name in (NAME, PREVIOUS))


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): value for k, value in tensors.items() if k.startswith(prefix)}


def owned(value: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU that shares memory with nothing."""
    return value.detach().to("cpu", copy=True).contiguous()


def _write(path: Path, content: bytes, keep: Path | None = None) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        _discard(temporary)
        raise InputError(
            f"{path} could not be written ({error.strerror or error}); nothing that was there is "
            "lost: make room or choose another folder, then resume"
        ) from error


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # where nothing can be written, nothing can be removed
        return


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
