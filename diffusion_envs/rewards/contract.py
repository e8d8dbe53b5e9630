"""The contract of a reward, and the one place where rewards are called.

A reward is any callable (images [n, 3, h, w] in [0, 1], prompts) -> [n], larger is better. It
gets a copy of the images, so it may change them in place, and may declare
``differentiable = True``. Whatever else it does is caught here, so nothing unusable reaches the
weights; torch's global settings are afterwards what they were. A reward that ships refuses what it
cannot score by ``require_inputs``, so that it is safe to call alone too.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import numbers
import pkgutil
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ctrl.devices import read
from diffusion_envs.training.memory import ran_out

Reward = Callable[[Tensor, Sequence[str]], Any]
"""Any callable (images [n, 3, h, w] in [0, 1], prompts) -> one number for each image."""
Scorer = Callable[[Reward, Tensor, Sequence[str]], Tensor]
"""How a reward is asked, and its answer checked: (reward, images, prompts) -> [n]."""
_SLACK = 1e-3  # outside [0, 1] that is let through: decoders overshoot; clamping is the reward's
LARGEST = 1e15  # |reward|: of a million such the sum of squares is a number in float32
_PYTHON = ".py"  # the ending of a file of code
_LOADED: dict[int, tuple[Any, str]] = {}  # what ``load`` has made, and by which name


@runtime_checkable
class Embedder(Protocol):
    """A reward that also describes pictures by vectors, whose angles say how alike they are."""

    def embedding(self, images: Tensor) -> Tensor:
        """[n, 3, h, w] in [0, 1] -> [n, width]."""
        ...


@runtime_checkable
class Counting(Protocol):
    """A reward that counts what a reader of the log must know, prompts that were cut, say."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Totals since it was made, by name; they never decrease, and scores ignore them."""
        ...


@runtime_checkable
class InParts(Protocol):
    """A reward that is computed from named parts, each of which belongs into the log."""

    @property
    def weights(self) -> Mapping[str, float]:
        """How much each part counts, in the order of ``parts``."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any:
        """As any reward."""
        ...

    def parts(
        self, images: Tensor, prompts: Sequence[str], ask: Scorer
    ) -> dict[str, Float[Tensor, " n"]]:
        """Each part of the pictures' rewards, asked by ``ask``."""
        ...

    def total(self, parts: Mapping[str, Float[Tensor, " n"]]) -> Float[Tensor, " n"]:
        """The reward that follows from its parts."""
        ...


class RewardError(ValueError):
    """A reward raised, or returned something unusable."""


def require_inputs(images: Any, prompts: Any) -> None:
    """Refuse what is not one prompt for each picture with values in [0, 1].

    Values may exceed the interval by 1e-3. The device is waited for once.

    Raises:
        TypeError: ``images`` is no tensor of floats, or ``prompts`` no sequence of strings.
        ValueError: another shape, number of prompts or range; or a value is no number.
    """
    if not isinstance(images, Tensor):
        hint = "; images come first, then prompts: are they swapped?" if _words(images) else ""
        raise TypeError(f"images must be a tensor, got {type(images).__name__}{hint}")
    if not _words(prompts):
        hint = "; one string for each image in a list" if isinstance(prompts, str) else ""
        raise TypeError(f"prompts must be a sequence of strings, got {_type_of(prompts)}{hint}")
    if not images.is_floating_point():
        raise TypeError(
            f"images must be floats in [0, 1], got {images.dtype}: divide 8-bit ones by 255"
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"images must be [n, 3, height, width] with at least one pixel, got "
            f"{list(images.shape)}"
        )
    if len(prompts) != len(images):
        raise ValueError(
            f"there must be one prompt for each image, got {len(images)} images and "
            f"{len(prompts)} prompts"
        )
    low, high = read(*images.detach().aminmax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # not (...): NaN is outside too
        raise ValueError(f"images must have values in [0, 1], got {low:g} to {high:g}")


def _words(value: Any) -> bool:
    """Whether it is a sequence of strings, and not one string."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(word, str) for word in value)
    )


def _type_of(value: Any) -> str:
    """Its type, and that of its first entry which is no string."""
    kind = type(value).__name__
    if not isinstance(value, Sequence) or isinstance(value, str):
        return kind
    return f"{kind} of {next(type(x).__name__ for x in value if not isinstance(x, str))}"


def reward_name(reward: Reward) -> str:
    """For messages: the function's or the class's name."""
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    return getattr(reward, "__name__", type(reward).__name__)


@torch.no_grad()
def score(
    reward: Reward, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
) -> Float[Tensor, " n"]:
    """Rewards of images, float32 on the CPU, checked.

    Tensors, numpy arrays and lists of numbers are accepted, in any real dtype. Nothing is
    broadcast: ``[n, 1]`` is refused as ``[1]`` is.

    Raises:
        RewardError: the reward raised; or did not return one finite real number for each image, at
            most ``LARGEST`` in size; or returned a tensor that needs a gradient; or a value of the
            images is outside [0, 1].
        ValueError: there is no image, or not one prompt for each.
    """
    name, n = reward_name(reward), len(images)
    if not n or len(prompts) != n:
        raise ValueError(
            f"images must be at least one, with one prompt for each, got {n} images and "
            f"{len(prompts)} prompts"
        )
    low, high = read(*images.aminmax())
    if not (low >= 0 and high <= 1):  # not (...): NaN is outside too
        raise RewardError(  # a ValueError; and what ends one process by it ends all of them
            f"images must have values in [0, 1], got {low:g} to {high:g}; if they are not numbers, "
            "the model overflowed: use float32 or bfloat16"
        )
    returned = _asked(reward, name, images, prompts)
    rule = f"reward {name} must return one real number for each image, [{n}]"
    try:
        values = _as_tensor(returned, name, rule)
    except RewardError:
        raise
    except Exception as error:  # an object that breaks where it is read
        raise RewardError(
            f"{rule}; got {type(returned).__name__}, which cannot be read: {error}"
        ) from error
    if values.shape != (n,):
        raise RewardError(
            f"{rule}; got shape {list(values.shape)}: flatten or average it so that it is [{n}]"
        )
    return _finite(values, name, prompts)


def _asked(reward: Reward, name: str, images: Tensor, prompts: Sequence[str]) -> Any:
    """What the reward returns for copies of the images and of the list of prompts.

    Raises:
        RewardError: it raised anything but an interrupt, or that memory ran out.
    """
    try:
        with _settings_kept():
            return reward(images.clone(), list(prompts))
    except RewardError as error:  # of a reward within it
        raise _named(error, name) from error.__cause__
    except (Exception, SystemExit) as error:  # whatever a user's function raises
        if ran_out(error):  # the caller asks for fewer at once
            raise
        shape = list(images.shape)
        raise RewardError(
            f"reward {name} raised {type(error).__name__} on images {shape}: {error}; "
            f"{_remedy(reward, shape)}"
        ) from error


def _remedy(reward: Reward, shape: Sequence[int]) -> str:
    """What to do about a reward that raised."""
    try:
        inspect.signature(reward).bind(None, None)
    except TypeError:
        return "it must take two arguments, the images and their prompts, in this order"
    except ValueError:  # a builtin, of which Python knows no signature
        pass
    return f"try it alone: reward(torch.rand({', '.join(map(str, shape))}), prompts)"


@contextmanager
def _settings_kept() -> Iterator[None]:
    """After this context torch's settings, which all code shares, are what they were."""
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None)  # a context of its own for every call of torch goes too
            if torch.get_default_device() != device:
                torch.set_default_device(device)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)


def score_in_parts(
    reward: Reward, images: Float[Tensor, " n *event"], prompts: Sequence[str], ask: Scorer = score
) -> tuple[Float[Tensor, " n"], dict[str, Float[Tensor, " n"]]]:
    """Rewards of images, and each part of them; no part of a reward that has none.

    Args:
        reward: to ask once, or each of its parts once.
        images: to score.
        prompts: one for each.
        ask: how a single reward is asked, and checked.

    Raises:
        RewardError: as of ``score``; a part is named.
    """
    if not isinstance(reward, InParts):
        return ask(reward, images, prompts), {}
    parts = reward.parts(images, prompts, ask)
    return _finite(reward.total(parts), reward_name(reward), prompts), parts


def _named(error: RewardError, name: str) -> RewardError:
    """The same, said to be of this reward too."""
    return error if name in str(error) else RewardError(f"reward {name}: {error}")


def _finite(values: Tensor, name: str, prompts: Sequence[str]) -> Float[Tensor, " n"]:
    """The same in float32, where they are numbers too, whose squares can be added up."""
    small = values.float()
    # not (...): NaN is no number at all
    if bad := (~(small.detach().abs() <= LARGEST)).nonzero().flatten().tolist():
        k = bad[0]
        raise RewardError(
            f"reward {name} must be finite in float32 for every image, at most {LARGEST:g} in "
            f"size; sample {k} ({prompts[k]!r}) got {values[k].item()}, {len(bad)} of "
            f"{len(values)} samples are affected: return the lowest reward that there is where it "
            "has no answer"
        )
    return small


def differentiable_score(
    reward: Reward, images: Float[Tensor, " n *event"], prompts: Sequence[str]
) -> Float[Tensor, " n"]:
    """Rewards of images with their gradient, checked, on the device and in the dtype they come in.

    Raises:
        RewardError: the reward raised; or did not return a tensor with one finite number for each
            image that has a gradient in the images.
    """
    name = reward_name(reward)
    values = _asked(reward, name, images, prompts)
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        raise RewardError(
            f"reward {name} must return a tensor [{len(images)}] to be differentiated, got "
            f"{list(values.shape) if isinstance(values, Tensor) else type(values).__name__}"
        )
    if images.requires_grad and not values.requires_grad:
        raise RewardError(
            f"reward {name} declares differentiable = True, but its values have no gradient in the "
            "images: it must not detach, round or leave torch"
        )
    if not bool((values.detach().abs() <= LARGEST).all()):
        _finite(values.detach().cpu(), name, prompts)
    return values


@torch.no_grad()
def embed(embedder: Embedder, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
    """Embeddings of images, float32 on the CPU, checked.

    Raises:
        RewardError: the embedding raised, or is not one finite vector for each image.
    """
    name = type(embedder).__name__
    try:
        with _settings_kept():
            vectors = embedder.embedding(images.clone())
    except Exception as error:  # whatever a user's function raises
        if ran_out(error):
            raise
        raise RewardError(
            f"embedding of {name} raised {type(error).__name__} on images {list(images.shape)}: "
            f"{error}"
        ) from error
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != len(images):
        raise RewardError(
            f"embedding of {name} must return a tensor [{len(images)}, width], got "
            f"{list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__}"
        )
    small = vectors.float().cpu()
    if not bool(torch.isfinite(small).all()):
        raise RewardError(f"embedding of {name} must be finite for every image")
    return small


def _as_tensor(returned: Any, name: str, rule: str) -> Tensor:
    """What a reward returned as a real tensor on the CPU; words and objects are never numbers."""
    if isinstance(returned, Tensor):
        if returned.requires_grad:
            raise RewardError(
                f"reward {name} returned a tensor that needs a gradient; detach it, or compute it "
                "under torch.no_grad()"
            )
        if returned.is_complex():
            raise RewardError(f"{rule}; got complex numbers: take the real part or the modulus")
        if returned.layout != torch.strided or returned.is_quantized:
            raise RewardError(f"{rule}; got a tensor that is not dense: use to_dense()")
        return returned.cpu()
    if isinstance(returned, np.ndarray):
        if returned.dtype.kind not in "fiub":
            raise RewardError(f"{rule}; got a numpy array of {returned.dtype}: convert it to float")
        return torch.from_numpy(returned.astype(np.float64))
    if not isinstance(returned, list | tuple):
        raise RewardError(
            f"{rule}; got {type(returned).__name__} {returned!r:.80}: return a tensor"
        )
    for k, value in enumerate(returned):
        if isinstance(value, Tensor) and not value.ndim:
            value = _as_tensor(value, name, rule).item()
        if not isinstance(value, numbers.Real | np.bool_):
            raise RewardError(
                f"{rule}; sample {k} got {type(value).__name__} {value!r:.80}: return a number"
            )
    try:
        return torch.tensor([float(value) for value in returned], dtype=torch.float64)
    except OverflowError as error:
        raise RewardError(f"{rule}; got an integer too large for any float: {error}") from error


def load(spec: str, kind: str = "reward") -> Any:
    """A user's own reward by name, or judge, preference or objective.

    Args:
        spec: "my_module:my_function", or "path/file.py:my_function"; a class is made without
            arguments.
        kind: what it is to be, for messages.

    Raises:
        ValueError: ``spec`` has another form, or names nothing that can be called.
    """
    module_name, _, attribute = spec.rpartition(":")
    if not module_name or not attribute:
        raise ValueError(
            f"{kind} must be given as my_module:my_function or path/file.py:my_function, got "
            f"{spec!r}"
        )
    in_file = module_name.endswith(_PYTHON)
    try:
        module = _module_in(Path(module_name)) if in_file else importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            hint = _nearest(module_name, (known.name for known in pkgutil.iter_modules()))
        raise ValueError(
            f"{kind} {spec!r}: cannot import {module_name}: {type(error).__name__}: {error}{hint}"
        ) from error
    if not hasattr(module, attribute):
        hint = _nearest(attribute, dir(module))
        raise ValueError(f"{kind} {spec!r}: {module_name} has no {attribute!r}{hint}")
    named = getattr(module, attribute)
    try:
        made = named() if isinstance(named, type) else named
    except Exception as error:  # whatever a user's class raises
        raise ValueError(
            f"{kind} {spec!r}: a class must be made without arguments, but {attribute}() raised "
            f"{type(error).__name__}: {error}; name a function or a ready object instead"
        ) from error
    if not callable(made):
        raise ValueError(f"{kind} {spec!r} must be callable, got {made!r:.80}")
    place = Path(module_name).expanduser().absolute() if in_file else module_name
    _LOADED[id(made)] = made, f"{place}:{attribute}"
    return made


def _module_in(path: Path) -> types.ModuleType:
    """The module that a file holds now, under a name of its own: it may be called as any other.

    What lies beside the file can be imported from it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = path.expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    content = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()
    name = f"{path.stem}_{content[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def name_of_loaded(reward: Any) -> str | None:
    """The name by which ``load`` has made this very object, if it did."""
    made, spec = _LOADED.get(id(reward), (None, None))
    return spec if made is reward else None


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
