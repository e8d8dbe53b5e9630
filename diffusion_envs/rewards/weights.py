"""Where a learned reward's weights are, and how their tensors are read.

Files are those of a folder, of one file with the rest beside it, or of a repository on the Hugging
Face hub. Published ``.pt`` files are pickles, and a pickle is a program: only tensors are read
(``weights_only``), and what names anything to be called is refused without calling it. So is an
archive that holds more than its size: tensors are stored as they are, and never compressed.
"""

import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

PICKLES = (".pt", ".pth", ".bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CALLED = re.compile(r"GLOBAL (\S+)")
_SHOWN = 3


@dataclass(frozen=True)
class Weights:
    """The files of a learned reward, by their published names.

    Attributes:
        reward: its name on command lines, such as "image-reward".
        files: what a file is for -> its name in a folder of ours; several names are alternatives,
            the first that is there is read. A file that is named alone stands for the first entry,
            unless its name is that of another.
        repositories: repository on the hub -> files that ``fetch`` takes from it.
    """

    reward: str
    files: Mapping[str, str | tuple[str, ...]]
    repositories: Mapping[str, tuple[str, ...]]

    def names(self, role: str) -> tuple[str, ...]:
        """Alternative names of one file."""
        names = self.files[role]
        return (names,) if isinstance(names, str) else tuple(names)

    def remedy(self, folder: str | Path | None = None) -> str:
        """How the files are had, with and without a network."""
        output = "" if folder is None else f" --output {folder}"
        return (
            f"get them with: python -m diffusion_envs.rewards fetch {self.reward}{output}; "
            f"{self.by_hand()}, and pass that folder"
        )

    def by_hand(self) -> str:
        """How the files are had without a network."""
        taken = (f"{', '.join(files)} of {name}" for name, files in self.repositories.items())
        return (
            f"without a network, copy into one folder {'; '.join(taken)} (repositories on the "
            "Hugging Face hub)"
        )


# -- where they are --------------------------------------------------------------------------------


def from_anywhere(weights: Weights, source: str | Path) -> str:
    """The same source for another directory: local paths, checked and absolute, and hub ids.

    Nothing is read or downloaded, so that a reward can check what it is made with.

    Raises:
        FileNotFoundError: a local path is not there, or files are missing beside it.
        ValueError: the source is empty.
    """
    if not str(source).strip():
        raise ValueError(
            f"model of {weights.reward} must be a folder, a file or a hub id, got an empty name"
        )
    path = Path(source).expanduser()
    if path.exists():
        _require(weights, _in_folder(weights, path), path)
        return str(path.absolute())
    name = str(source)
    looks_local = isinstance(source, Path) or path.suffix in (*PICKLES, ".safetensors")
    if looks_local or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"model of {weights.reward} is neither a folder nor a file, and no hub id either: "
            f"{source} does not exist; {weights.remedy()}"
        )
    return name


def locate(weights: Weights, source: str | Path) -> Mapping[str, Path]:
    """The path of every file, by what it is for; downloaded first if the source is a hub id.

    Files of a hub id that are on this machine are used without asking the hub. What its repository
    lacks is taken from the reward's other repositories.

    Raises:
        FileNotFoundError: files are missing; it lists them, and how to get them.
        ValueError: the source is empty.
    """
    settled = from_anywhere(weights, source)
    path = Path(settled)
    if path.exists():
        return _require(weights, _in_folder(weights, path), path)
    paths, failure = _from_hub(weights, settled)
    return _require(weights, paths, settled, failure)


def _in_folder(weights: Weights, path: Path) -> dict[str, Path]:
    """Those files that are in a folder, or beside a file that stands for one of them."""
    folder = path if path.is_dir() else path.parent
    paths = {}
    for role in weights.files:
        there = (folder / name for name in weights.names(role) if (folder / name).is_file())
        if (first := next(there, None)) is not None:
            paths[role] = first
    if not path.is_dir():
        roles = [role for role in weights.files if path.name in weights.names(role)]
        paths[roles[0] if roles else next(iter(weights.files))] = path
    return paths


def _require(
    weights: Weights, paths: Mapping[str, Path], source: str | Path, failure: str = ""
) -> Mapping[str, Path]:
    missing = [" or ".join(weights.names(role)) for role in weights.files if role not in paths]
    if not missing:
        return paths
    folder = None
    if isinstance(source, Path):
        folder = source if source.is_dir() else source.parent
    why = f" ({failure})" if failure else ""
    raise FileNotFoundError(
        f"model of {weights.reward}, {source}, lacks {', '.join(missing)}{why}; "
        f"{weights.remedy(folder)}"
    )


def _from_hub(weights: Weights, name: str) -> tuple[dict[str, Path], str]:
    """Files from the hub's cache and, where it lacks some, from the hub; and why not all, if so."""
    from huggingface_hub import snapshot_download  # here: not all rewards have weights
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    failure = ""
    paths: dict[str, Path] = {}
    for local in (True, False):
        for repository in dict.fromkeys((name, *weights.repositories)):
            wanted = [n for role in weights.files if role not in paths for n in weights.names(role)]
            if repository != name:  # by its list; of another's repository nothing is known
                wanted = [n for n in wanted if n in weights.repositories[repository]]
            if not wanted:
                continue
            try:
                folder = snapshot_download(
                    repository, allow_patterns=wanted, local_files_only=local
                )
            except (OSError, ValueError, RuntimeError, HfHubHTTPError, HFValidationError) as error:
                if not local and not failure:
                    words = str(error).strip().splitlines()
                    failure = f"{repository}: {words[0] if words else type(error).__name__}"
                continue
            paths = _in_folder(weights, Path(folder)) | paths
    return paths, failure


# -- what is in them -------------------------------------------------------------------------------


def read_state(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, float32 on the CPU, by their names in the network.

    A dictionary under ``state_dict`` is taken out, and ``module.`` before every name is left out.
    Tensors of whole numbers stay what they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of tensors, names something to be called, or holds a number that
            is not finite.
    """
    return {name: _float32(value) for name, value in read_tensors(path).items()}


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """As ``read_state``, in the types of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, but {path} is none")
    content = _safetensors(path) if path.suffix == ".safetensors" else unpickled(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"{path} must hold a dictionary of tensors, got {type(content).__name__} of "
            f"{len(content) if isinstance(content, Mapping) else 'none'}"
        )
    state = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path} must hold tensors by name, but {name!r} is {type(value).__name__}"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(
                f"{path} must hold finite numbers, but {name} does not: it is damaged, or training "
                "has diverged; get it again"
            )
        state[name] = value
    if all(name.startswith("module.") for name in state):  # as data-parallel training stores it
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no whole safetensors file ({reason}); get it again") from error


def unpickled(path: Path) -> object:
    """What a pickle of tensors holds, as it lies in it; nothing that it names is called.

    Raises:
        ValueError: it names something to be called, or is no pickle of tensors.
    """
    _require_no_bomb(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other protocols of pickle: they fail below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make an unpickler raise anything
        if called := _CALLED.search(str(error)):
            raise ValueError(
                f"{path} is refused: it names {called[1]} to be called, which no file of tensors "
                "needs, and nothing in it was executed. Take the published file or its safetensors "
                "copy; if this is the published one, convert it on a machine that may run it"
            ) from error
        raise ValueError(
            f"{path} is no file of tensors ({type(error).__name__}: "
            f"{' '.join(str(error).split())[-200:]}); nothing in it was executed. Get it again"
        ) from error


def _require_no_bomb(path: Path) -> None:
    """Refuse an archive that unpacks to more than its own size: torch stores, and packs nothing.

    Raises:
        ValueError: it does.
    """
    if not zipfile.is_zipfile(path):
        return  # torch's former format, which has no packing
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is no file of tensors ({error}); get it again") from error
    unpacked, size = sum(part.file_size for part in parts), path.stat().st_size
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if packed or unpacked > size:
        raise ValueError(
            f"{path} is refused: an archive of {size:,} bytes that unpacks to {unpacked:,}, and "
            "torch.save compresses nothing; nothing in it was read. Get it again"
        )


def require_keys(state: Mapping[str, Tensor], network: nn.Module, path: str | Path) -> None:
    """Refuse tensors that are not those of a network, by name or shape.

    Args:
        state: tensors by name.
        network: what they are for; it may be on the device "meta".
        path: where they are from, for messages.

    Raises:
        ValueError: naming the first few that are missing, too many or of another shape.
    """
    expected = network.state_dict()
    complaints = {
        "lacks": [name for name in expected if name not in state],
        "has in addition": [name for name in state if name not in expected],
        "has in another shape": [
            f"{name} {list(state[name].shape)} for {list(value.shape)}"
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    words = []
    for complaint, names in complaints.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            words.append(f"{complaint} {', '.join(names[:_SHOWN])}{more}")
    if words:
        raise ValueError(
            f"{path} does not hold the weights of {type(network).__name__}: it "
            + "; it ".join(words)
        )
