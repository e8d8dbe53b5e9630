"""Files of strangers are data: nothing in them runs, none leads elsewhere, none says its own size.

What is promised is in SECURITY.md. Servers are in ``tests/diffusion_envs/rewards``, what a page or
a card shows in ``tests/diffusion_envs/runs/test_markup.py``.
"""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion_envs.cifar10.plain_pickle import read_plain
from diffusion_envs.models import folders, text_to_image_pipeline
from diffusion_envs.models.existing_lora import LoraFile
from diffusion_envs.models.unconditional_unet import UnconditionalUNet
from diffusion_envs.preferences import Recorded
from diffusion_envs.rewards import weights
from diffusion_envs.rewards.classifier import load_classifier
from diffusion_envs.runs import checkpoint, presets
from diffusion_envs.runs.contact_sheet import tiles
from diffusion_envs.runs.inception import load_inception
from diffusion_envs.runs.prompts import read_prompts
from diffusion_envs.runs.run_folder import read_settings
from diffusion_envs.runs.sample_quality import Features, RealStatistics
from diffusion_envs.runs.settings import rebuild
from diffusion_envs.runs.tracking import read_metrics
from tests.diffusion_envs.models.small_pipelines import small_pipeline

pytestmark = pytest.mark.filterwarnings("default")  # diffusers and transformers deprecate freely

ROOT = Path(__file__).parent.parent
PACKAGES = ("ctrl", "diffusion_envs", "verification", "benchmarks", "examples")

# -- no source reads or writes a pickle ------------------------------------------------------------

PICKLING = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
PICKLING |= {"multiprocessing"}
CALLS = {"eval", "exec", "gather_object", "broadcast_object_list", "all_gather_object"}
CALLS |= {"scatter_object_list", "broadcast_object", "send_object_list", "recv_object_list"}
REASONS = {
    ("diffusion_envs/cifar10/plain_pickle.py", "import pickle"): "reads CIFAR-10's batches; "
    "names nothing that can be called",
    ("diffusion_envs/rewards/weights.py", "torch.load(weights_only)"): "published weights; "
    "tensors alone are read",
    (
        "diffusion_envs/models/text_to_image_pipeline.py",
        "from_pretrained without use_safetensors",
    ): "tokenizers, which have no weights",
    ("benchmarks/figures/three.py", "import multiprocessing"): "between a program and the "
    "processes that it starts itself",
    ("benchmarks/mutants/run.py", "exec"): "our own source, with a mistake",
    ("benchmarks/tutorials.py", "exec"): "our own tutorials",
    ("benchmarks/tutorials.py", "eval"): "the last line of a cell of theirs",
    (
        "examples/tutorials/fine_tune.py",
        "from_pretrained without use_safetensors",
    ): "what a user of plain diffusers types, on the embedded model",
}


OPTIONS = ("trust_remote_code", "allow_pickle", "shell")
FILES = ("torch.save", "os.system", "os.popen", "np.load", "numpy.load")
WORDS = re.compile("|".join([*PICKLING, *CALLS, *OPTIONS, *FILES, "torch.load", "from_pretrained"]))


def dangers(source: str) -> Iterator[str]:
    """What in a source reads, writes or runs what is not data."""
    if not WORDS.search(source):
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            for top in {module.partition(".")[0] for module in modules} & PICKLING:
                yield f"import {top}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        name, where = called.rpartition(".")[2], called.rpartition(".")[0]
        told = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in CALLS and (where == "" or name not in ("eval", "exec")):
            yield name
        if called == "torch.load":
            safe = told.get("weights_only") == "True"
            yield "torch.load(weights_only)" if safe else "torch.load"
        if called in FILES:
            yield called
        weightless = where.endswith(("Tokenizer", "Scheduler"))
        if name == "from_pretrained" and not weightless and "use_safetensors" not in told:
            yield "from_pretrained without use_safetensors"
        for option in OPTIONS:
            if told.get(option, "False") != "False":
                yield option


def test_no_source_reads_or_writes_a_pickle_or_runs_what_it_reads():
    seen = {
        (str(path.relative_to(ROOT)), danger)
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for danger in dangers(path.read_text(encoding="utf-8"))
    }
    assert seen == REASONS.keys()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as p",
        "def f():\n    from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(x, path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "accelerate.utils.gather_object(x)",
        "UNet2DModel.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_sees_a_planted_danger(source):
    assert list(dangers(source))


# -- pickles that are programs ---------------------------------------------------------------------


class Program:
    """Makes a folder where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def zipped(program: Any) -> bytes:
    """As torch.save has it."""
    file = io.BytesIO()
    torch.save({"a": torch.ones(2), "b": [program]}, file)
    return file.getvalue()


def legacy(program: Any) -> bytes:
    """As torch.save had it before zip."""
    file = io.BytesIO()
    torch.save({"a": program}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def npy(program: Any) -> bytes:
    """An array of numpy that holds an object."""
    file = io.BytesIO()
    np.save(file, np.array([program], dtype=object), allow_pickle=True)
    return file.getvalue()


def npz(program: Any) -> bytes:
    """Several of them."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, a=np.array([program], dtype=object))
    return file.getvalue()


PROGRAMS: dict[str, Callable[[Any], bytes]] = {
    **{f"protocol {k}": lambda program, k=k: pickle.dumps(program, k) for k in range(6)},
    "nested": lambda program: pickle.dumps({"state_dict": [{"a": (1, program)}]}),
    "torch": zipped,
    "torch, as it was": legacy,
    "npy": npy,
    "npz": npz,
}


def _checkpoint(place: Path, name: str, content: bytes) -> Path:
    """A checkpoint whose digests are right, one of whose files is this."""
    path = checkpoint.save(place / "checkpoints", 1, {"a": torch.ones(2)})
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text()) if name != "manifest.json" else {}
    if manifest:
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
        (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def _run(place: Path, content: bytes) -> Path:
    place.mkdir(exist_ok=True)
    (place / "config.json").write_bytes(content)
    return place


def _written(place: Path, name: str, content: bytes) -> Path:
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(content)
    return place / name


Reader = Callable[[Path, bytes], Any]
IN_TEXT = ("prompts.txt",)  # a pickle of protocol 0 is text: it may be taken for prompts
READERS: dict[str, Reader] = {
    **{
        name: lambda p, c, n=name: weights.read_state(_written(p, n, c))
        for name in ("w.pt", "w.pth", "w.bin", "w.safetensors")
    },
    "inception.pth": lambda p, c: load_inception(_written(p, "inception.pth", c)),
    "classifier.safetensors": lambda p, c: load_classifier(
        _written(p, "classifier.safetensors", c)
    ),
    **{
        name: lambda p, c, n=name: text_to_image_pipeline.find(_written(p, n, c))
        for name in ("m.ckpt", "m.pt", "m.pth", "m.bin", "m.npz", "m.safetensors")
    },
    "lora.safetensors": lambda p, c: LoraFile.at(_written(p, "lora.safetensors", c)),
    "lora.bin": lambda p, c: LoraFile.at(_written(p, "lora.bin", c)),
    **{
        f"checkpoint {name}": lambda p, c, n=name: checkpoint.load(_checkpoint(p, n, c))
        for name in ("tensors.safetensors", "state.json", "manifest.json")
    },
    **{
        name: lambda p, c, n=name: read_prompts(_written(p, n, c))
        for name in ("prompts.txt", "prompts.json", "prompts.jsonl", "prompts.csv")
    },
    "metrics.jsonl": lambda p, c: read_metrics(_written(p, "metrics.jsonl", c + b"\n")),
    "config.json": lambda p, c: read_settings(_run(p, c)),
    "model settings": lambda p, c: folders.read_settings(_written(p, "config.json", c)),
    "preset.toml": lambda p, c: presets.options(_written(p, "preset.toml", c)),
    "statistics": lambda p, c: RealStatistics.load(
        _written(p, "s.safetensors", c), Features("means", 3, lambda x: x.float().mean((2, 3)))
    ),
    "sheet.png": lambda p, c: tiles(_written(p, "sheet.png", c)),
    "choices.jsonl": lambda p, c: Recorded(_written(p, "choices.jsonl", c))._orders(),
    "CIFAR-10": lambda p, c: read_plain(_written(p, "data_batch_1", c)),
}


def test_the_programs_run_where_they_are_unpickled(tmp_path):
    for name, made in PROGRAMS.items():
        mark = tmp_path / name
        if name.startswith(("protocol", "nested")):
            pickle.loads(made(Program(mark)))
        elif name.startswith("np"):
            stored = np.load(io.BytesIO(made(Program(mark))), allow_pickle=True)
            _ = stored["a"] if name == "npz" else stored
        else:
            torch.load(io.BytesIO(made(Program(mark))), weights_only=False)
        assert mark.is_dir(), name


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_a_program_and_each_names_the_file(tmp_path, reader):
    mark = tmp_path / "executed"
    for name, made in PROGRAMS.items():
        place = tmp_path / name.replace(" ", "-")
        place.mkdir()
        words = "nothing"
        try:
            READERS[reader](place, made(Program(mark)))
        except (ValueError, checkpoint.CheckpointError, OSError) as error:
            words = str(error)
        assert not mark.exists(), name
        assert str(place) in words or (reader in IN_TEXT and words == "nothing"), (name, words)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small pipeline in diffusers' own layout."""
    folder = tmp_path_factory.mktemp("models") / "small"
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path) -> Path:
    """Of it, to be spoilt."""
    return shutil.copytree(model, tmp_path / "model")


PARTS = {
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
}


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_a_model_are_never_pickles(copy, tmp_path, part):
    """A pickle beside tensors is left alone; without them the model is refused by its name."""
    mark, name = tmp_path / "executed", PARTS[part]
    file = copy / part / f"{'pytorch_model' if name == 'model' else name}.bin"
    file.write_bytes(zipped(Program(mark)))
    text_to_image_pipeline.load_pipeline(copy)
    (copy / part / f"{name}.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{part}/\w+\.bin is a pickle, which can run code"):
        text_to_image_pipeline.load_pipeline(copy)
    assert not mark.exists()


def test_weights_of_an_unconditional_model_are_never_pickles(copy, tmp_path):
    mark = tmp_path / "executed"
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(zipped(Program(mark)))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is a pickle"):
        UnconditionalUNet.load(copy)
    assert not mark.exists()


# -- settings that name code -----------------------------------------------------------------------

SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a class of the model's own": (
        "text_encoder/config.json",
        {"auto_map": {"AutoModel": "payload.Model"}},
        r"text_encoder/config\.json asks for code of the model's own by auto_map",
    ),
    "a kernel of the hub": (
        "text_encoder/config.json",
        {"attn_implementation": "somebody/kernel"},
        "asks for code .* by attn_implementation",
    ),
    "a kernel further down": (
        "text_encoder/config.json",
        {"text_config": [{"_attn_implementation": {"a": "somebody/kernel@main"}}]},
        "asks for code .* by _attn_implementation",
    ),
    "a module": (
        "model_index.json",
        {"tokenizer": ["payload", "Tokenizer"]},
        "part 'tokenizer' of the module 'payload', which would be imported",
    ),
    "a part that no pipeline has": (
        "model_index.json",
        {"more": ["os", "system"]},
        "part 'more' of the module 'os'",
    ),
    "a pipeline of its own": (
        "model_index.json",
        {"_class_name": ["payload", "Pipeline"]},
        "is a .*payload.*, which is not supported",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_name_code_are_refused_before_anything_is_imported(
    copy, monkeypatch, tmp_path, name
):
    file, settings, message = SETTINGS[name]
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    for place in (copy, copy / "tokenizer"):
        (place / "payload.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})")
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend("")
    with pytest.raises(ValueError, match=message):
        text_to_image_pipeline.load_pipeline(copy)
    assert not (tmp_path / "executed").exists()


def test_a_scheduler_is_a_scheduler(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "logging"}))
    with pytest.raises(ValueError, match="a scheduler of class 'logging'"):
        text_to_image_pipeline.find(copy).scheduler()


@pytest.mark.parametrize("where", ["unet/config.json", "model_index.json"])
def test_settings_nested_without_end_are_refused_by_name(copy, where):
    (copy / where).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"{where} must hold a JSON object"):
        text_to_image_pipeline.find(copy)


@pytest.mark.parametrize("folder", [".", "runs/../..", ""])
def test_a_run_does_not_bring_its_own_code(tmp_path, monkeypatch, folder):
    """A setting's code is imported from where it was, not from wherever its run is now."""
    (tmp_path / "payload_of_a_run.py").write_text(
        f"import os; os.mkdir({str(tmp_path / 'executed')!r})\ndef reward(): ..."
    )
    monkeypatch.chdir(tmp_path)
    named = {"name": "reward", "folder": folder}
    for kind in ({"function": "payload_of_a_run:reward"}, {"loaded": "payload_of_a_run.py:reward"}):
        with pytest.raises(ValueError, match="reward is stored with code in the folder"):
            rebuild(named | kind, "reward")
    assert not (tmp_path / "executed").exists()


# -- sizes that are not true -----------------------------------------------------------------------


def lying(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, or these bytes of one."""
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(told) if length is None else length) + told + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
LIES: dict[str, bytes] = {
    "a header of 10 GB": lying({"a": ONE}, bytes(4), 10 * 2**30),
    "a header without end": lying({"a": ONE}, bytes(4), 2**64 - 1),
    "overlapping tensors": lying({"a": ONE, "b": ONE}, bytes(4)),
    "a tensor beyond the end": lying({"a": ONE | {"shape": [2], "data_offsets": [0, 8]}}, bytes(4)),
    "a negative offset": lying({"a": ONE | {"data_offsets": [-4, 0]}}, bytes(4)),
    "offsets turned round": lying({"a": ONE | {"data_offsets": [4, 0]}}, bytes(4)),
    "a negative side": lying({"a": ONE | {"shape": [-1]}}, bytes(4)),
    "another type": lying({"a": ONE | {"dtype": "F64"}}, bytes(4)),
    "a type that is none": lying({"a": ONE | {"dtype": "os.system"}}, bytes(4)),
    "sides beyond 64 bits": lying({"a": ONE | {"shape": [2**32, 2**32]}}, bytes(4)),
    "sides that wrap around": lying({"a": ONE | {"shape": [2**62 + 1, 4]}}, bytes(16)),
    "no rows of endless length": lying({"a": ONE | {"shape": [2**63, 0], "data_offsets": [0, 0]}}),
    "a gap": lying({"a": ONE | {"data_offsets": [4, 8]}}, bytes(8)),
    "more than is told": lying({"a": ONE}, bytes(8)),
    "a name twice": lying(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "nesting without end": lying(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "no JSON": lying(b"\x80\x04K."),
}
OF_TENSORS = ("w.safetensors", "classifier.safetensors", "m.safetensors", "lora.safetensors")
OF_TENSORS += ("checkpoint tensors.safetensors", "statistics")


@pytest.mark.parametrize("reader", OF_TENSORS)
def test_a_header_that_lies_is_refused_by_name(tmp_path, reader):
    for name, content in LIES.items():
        place = tmp_path / name.replace(" ", "-")
        place.mkdir()
        with pytest.raises((ValueError, checkpoint.CheckpointError)) as refused:
            READERS[reader](place, content)
        assert str(place) in str(refused.value), name


def archive(packing: int, repeated: int = 1, zeros: int = 4) -> bytes:
    """A file of torch's layout, packed; its largest part may be there several times over."""
    file, stored = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(zeros)}, stored)
    with zipfile.ZipFile(stored) as parts, zipfile.ZipFile(file, "w", packing) as packed:
        for part in parts.namelist():
            packed.writestr(part, parts.read(part))
        largest = max(packed.infolist(), key=lambda part: part.file_size)
        packed.filelist += [largest] * (repeated - 1)  # in the directory alone
    return file.getvalue()


@pytest.mark.parametrize(
    "bomb",
    [archive(zipfile.ZIP_DEFLATED, zeros=10**6), archive(zipfile.ZIP_STORED, 100, 10**4)],
    ids=["packed", "parts on top of each other"],
)
def test_an_archive_that_unpacks_to_more_than_it_is_is_not_unpacked(tmp_path, monkeypatch, bomb):
    path = _written(tmp_path, "w.pt", archive(zipfile.ZIP_STORED))
    weights.read_state(path)  # what torch itself writes is read
    path.write_bytes(bomb)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    for reader in (weights.read_state, load_inception):
        with pytest.raises(ValueError, match=r"w\.pt is refused: an archive of .* that unpacks to"):
            reader(path)


# -- paths that lead elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard", ["../../outside.safetensors", "/etc/passwd", "a\\b.safetensors", "x.bin", 3, None]
)
def test_an_index_of_shards_names_files_beside_it(copy, shard):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(copy / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors")
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"index\.json must name files of tensors beside it"):
        text_to_image_pipeline.find(copy)


@pytest.mark.parametrize("name", ["../prompts.txt", "/{outside}", "a/../../prompts.txt", "~/x"])
def test_a_preset_reads_files_beside_it_alone(tmp_path, name):
    outside = tmp_path / "prompts.txt"
    outside.write_text("somebody else's\n")
    folder = tmp_path / "presets"
    (folder / "a").mkdir(parents=True)
    (folder / "own.txt").write_text("a cat\n")
    preset = folder / "mine.toml"
    preset.write_text('prompts = "@own.txt"\n')
    assert presets.options(preset)["--prompts"] == ["--prompts", f"@{folder / 'own.txt'}"]
    named = name.format(outside=str(outside).lstrip("/"))
    preset.write_text(f"prompts = {json.dumps('@' + named)}\n")
    if name.startswith("~"):  # a folder of that name, beside it
        assert presets.options(preset)["--prompts"] == ["--prompts", f"@{named}"]
        return
    with pytest.raises(ValueError, match=r"mine\.toml names the file .* which is not beside it"):
        presets.options(preset)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "tensors.safetensors/.."]
)
def test_a_checkpoint_has_two_files_and_no_other(tmp_path, name):
    path = checkpoint.save(tmp_path, 1, {"a": torch.ones(2)})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("tensors.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CheckpointError, match="does not describe this checkpoint"):
        checkpoint.load(path)


STATES = ['{"~tensor": "../x"}', '{"~items": 3}', '{"~tuple": null}', '{"~items": [[[], 1]]}']


@pytest.mark.parametrize("state", [*STATES, "[" * 100_000])
def test_a_state_that_is_none_is_refused_by_name(tmp_path, state):
    path = _checkpoint(tmp_path, "state.json", state.encode())
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.json cannot be read"):
        checkpoint.load(path)


def test_old_checkpoints_go_and_what_a_link_leads_to_stays(tmp_path):
    outside = tmp_path / "outside" / "step-000001"
    save_file({"a": torch.ones(1)}, _written(outside.parent, "x", b"") and _made(outside))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-000001").symlink_to(outside)
    for step in (2, 3):
        checkpoint.save(folder, step, {"a": torch.ones(1)}, keep=1)
    assert (outside / "kept.safetensors").is_file()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder / "kept.safetensors"
