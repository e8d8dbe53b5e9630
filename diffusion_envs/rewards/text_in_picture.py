"""Whether a picture shows the text that its prompt quotes, as a recogniser of text reads it.

The wanted text is what stands between the first quotes of the prompt. Both texts are compared in
lower case and without spaces. Not differentiable, and always computed on the CPU.

The graded score forgives what stands around the wanted text: "XCATX" contains "CAT". A policy that
is trained long enough can exploit that, so judge by ``ReadableText``.

Source  the text reward of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), here with rapidocr's own
        models (PP-OCRv6 small, Apache-2.0), which lie inside its package: nothing is downloaded.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_envs.rewards.contract import require_inputs
from diffusion_envs.rewards.declaration import Declaration

_QUOTED = re.compile(r'"([^"]*)"|\u201c([^\u201d]*)\u201d')  # straight or curly


def quoted_text(prompt: str) -> str:
    """What stands between the first quotes, in lower case and without spaces.

    Raises:
        ValueError: the prompt quotes nothing.
    """
    match = _QUOTED.search(prompt)
    text = _plain(match[1] or match[2] or "") if match else ""
    if not text:
        raise ValueError(
            f"prompt {prompt!r} must have the wanted text in double quotes, such as "
            'a sign that says "CAT"'
        )
    return text


def distance(left: str, right: str) -> int:
    """Levenshtein's: fewest letters to insert, delete or replace."""
    costs = list(range(len(right) + 1))  # from nothing to every beginning of ``right``
    for k, letter in enumerate(left, start=1):
        diagonal, costs[0] = costs[0], k
        for j, other in enumerate(right, start=1):
            replaced = diagonal + (letter != other)
            diagonal, costs[j] = costs[j], min(replaced, costs[j] + 1, costs[j - 1] + 1)
    return costs[-1]


def share_read(read: str, wanted: str) -> float:
    """1 - min(distance, n) / n of a wanted text of n letters; 1 where it is contained."""
    if wanted in read:
        return 1.0
    return 1 - min(distance(read, wanted), len(wanted)) / len(wanted)


@dataclass(frozen=True, kw_only=True)
class _ByReader:
    """A reward that compares what a recogniser of text reads.

    Attributes:
        detect_from: pixels; a picture whose smaller side has fewer is read as a single line of
            text, a larger one is searched for lines first. 0: always searched.
        detection_side: pixels to which a picture's smaller side is enlarged before it is searched
            (larger pictures are not changed); most of the cost.
        threads: of the recogniser. With 1, equal pictures have equal scores on one machine.
    """

    detect_from: int = 96
    detection_side: int = 736
    threads: int = 1
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, least in (("detect_from", 0), ("detection_side", 32), ("threads", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    @property
    def _preprocessing(self) -> str:
        return (
            "8 bits; below detect_from pixels the whole picture resized to 48 pixels in height, "
            "else every detected line (bilinear, by rapidocr)"
        )

    def texts(self, images: Float[Tensor, "n 3 h w"]) -> list[str]:
        """What is read in each picture, all lines joined, in lower case and without spaces.

        Raises:
            ImportError: rapidocr or onnxruntime is not installed.
        """
        whole = min(images.shape[2:]) < self.detect_from
        read = _reader(0 if whole else self.detection_side, self.threads)
        pixels = (images.detach().float().clamp(0, 1) * 255).round().byte()
        pixels = pixels.flip(1).permute(0, 2, 3, 1).cpu().numpy()  # blue, green, red
        texts = []
        for picture in pixels:  # one by one: lines of a batch would be padded to one width
            result = read(np.ascontiguousarray(picture), use_det=not whole, use_cls=False)
            texts.append(_plain("".join(result.txts or ())))
        return texts


@dataclass(frozen=True, kw_only=True)
class TextInPicture(_ByReader):
    """Share of the quoted text that can be read: 1 - min(Levenshtein, n) / n, in [0, 1].

    1 also where the text is contained in what is read.
    """

    @property
    def declaration(self) -> Declaration:
        """What to know before its scores are compared with others."""
        return Declaration(
            scale="share of the quoted text's letters that are read, 0 to 1",
            licence="Apache-2.0",
            version="PP-OCRv6 small, in rapidocr 3.10",
            source="Flow-GRPO, arXiv 2505.05470",
            preprocessing=self._preprocessing,
        )

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """One number for each picture.

        Raises:
            ValueError: a prompt quotes no text.
            ImportError: rapidocr or onnxruntime is not installed.
        """
        require_inputs(images, prompts)
        wanted = [quoted_text(prompt) for prompt in prompts]
        shares = map(share_read, self.texts(images), wanted)
        return torch.tensor(list(shares), dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class ReadableText(_ByReader):
    """1 where exactly the quoted text is read, nothing more and nothing less, else 0."""

    @property
    def declaration(self) -> Declaration:
        """What to know before its scores are compared with others."""
        return Declaration(
            scale="1 if exactly the quoted text is read, else 0",
            licence="Apache-2.0",
            version="PP-OCRv6 small, in rapidocr 3.10",
            source="https://github.com/RapidAI/RapidOCR",
            preprocessing=self._preprocessing,
        )

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """One number for each picture.

        Raises:
            ValueError: a prompt quotes no text.
            ImportError: rapidocr or onnxruntime is not installed.
        """
        require_inputs(images, prompts)
        wanted = [quoted_text(prompt) for prompt in prompts]
        same = [text == want for text, want in zip(self.texts(images), wanted, strict=True)]
        return torch.tensor(same, dtype=torch.float32)


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()


@cache
def _reader(detection_side: int, threads: int) -> Any:
    """A recogniser with the models inside its package; ``detection_side`` 0: whole pictures."""
    try:
        import onnxruntime  # noqa: F401  # rapidocr itself would only print that it is missing
        import rapidocr  # heavy, and an extra
    except ImportError as error:
        raise ImportError(
            "rewards of text in pictures need rapidocr and onnxruntime: "
            "pip install ctrl-diffusion[ocr]"
        ) from error
    models = Path(rapidocr.__file__).parent / "models"
    settings: dict[str, Any] = {
        "Global.log_level": "critical",
        "Global.text_score": 0.0,  # as published: whatever is read counts
        "Det.model_path": str(models / "PP-OCRv6_det_small.onnx"),  # so nothing is downloaded
        "Rec.model_path": str(models / "PP-OCRv6_rec_small.onnx"),
        "EngineConfig.onnxruntime.intra_op_num_threads": min(threads, os.cpu_count() or 1),
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    if detection_side:
        settings["Det.limit_side_len"] = detection_side
    else:
        settings["Rec.rec_img_shape"] = [3, 48, 48]  # no wider than the picture
    return rapidocr.RapidOCR(params=settings)
