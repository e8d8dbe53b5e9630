"""Digests by which a file of a run tells that it was altered: a flipped bit, a lost end.

JSON      the key ``sha256``, over all other keys
tensors   ``sha256`` in the metadata of a safetensors file, over names, types, shapes and numbers
logs      grow, and so have none of their own: a checkpoint holds those of the logs as they were

A file of before, without a digest, is read as it is. A digest is no signature: whoever alters a
file on purpose can make another.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_envs.whole_files import whole

KEY = "sha256"


# -- JSON ------------------------------------------------------------------------------------------


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its digest, which stands first."""
    return {KEY: _of_json(content), **content}


def opened(content: Any, path: Path) -> dict[str, Any]:
    """The content without its digest.

    Args:
        content: of ``sealed``, or of before.
        path: where it was read, for the message.

    Raises:
        ValueError: it is no mapping, or another one than was sealed.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is no mapping")
    bare = {name: value for name, value in content.items() if name != KEY}
    if KEY in content and content[KEY] != _of_json(bare):
        raise ValueError(
            f"{path} is damaged: its {KEY} is not that of its content. Restore it; or, if it was "
            f"edited on purpose, take out the line {KEY}"
        )
    return bare


def _of_json(content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(content))  # tuples become lists, as they will be when read
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


# -- tensors ---------------------------------------------------------------------------------------


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file with its digest, whole or not at all.

    Raises:
        OSError: it cannot be written; it is named.
    """
    plain = {name: value.contiguous() for name, value in tensors.items()}
    with whole(path) as partial:
        try:
            save_file(plain, partial, {KEY: of_tensors(plain)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that is as it was written.

    Raises:
        ValueError: it was altered, or is no such file.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if known is not None and known != of_tensors(tensors):
        raise ValueError(f"{path} is damaged: its {KEY} is not that of its tensors")
    return tensors


# -- logs ------------------------------------------------------------------------------------------


class LogDigests:
    """Of the logs in a folder, as far as they have grown: read once, further as they grow.

    Args:
        folder: of the run.
        names: of the logs.
    """

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self._paths = {name: folder / name for name in names}
        self._begin()

    def _begin(self) -> None:
        self._digests = {name: hashlib.sha256() for name in self._paths}
        self._sizes = dict.fromkeys(self._paths, 0)

    def state(self) -> dict[str, Any]:
        """Bytes and digest of each log that is there, for a checkpoint."""
        for name, path in self._paths.items():
            if path.is_file():
                with path.open("rb") as file:
                    file.seek(self._sizes[name])
                    while more := file.read(2**20):
                        self._digests[name].update(more)
                        self._sizes[name] += len(more)
        return {
            name: {"bytes": size, KEY: self._digests[name].hexdigest()}
            for name, size in self._sizes.items()
            if size
        }

    def altered(self, state: Mapping[str, Any]) -> list[Path]:
        """The logs that do not begin as they did when ``state`` was taken."""
        differing = []
        for name, known in state.items():
            path = self._paths[name]
            if not path.is_file():
                differing.append(path)
                continue
            with path.open("rb") as file:
                start = file.read(known["bytes"])
            if hashlib.sha256(start).hexdigest() != known[KEY]:
                differing.append(path)
        return differing
