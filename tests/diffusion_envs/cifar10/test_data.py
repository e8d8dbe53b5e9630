"""CIFAR-10 in each of its formats, and files that are none of them."""

import builtins
import contextlib
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_envs.cifar10.data import CLASSES, load
from diffusion_envs.cifar10.plain_pickle import ForbiddenGlobal, read_plain

DATA = Path(__file__).parents[4] / "shared" / "data" / "cifar10"
TRAIN = [f"data_batch_{k}" for k in range(1, 6)]


def pictures(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Planes and labels; the first ten rows show each class once, then again."""
    values = np.random.default_rng(n).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    return values, np.arange(n) % 10


def png(planes: np.ndarray, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(planes.transpose(1, 2, 0)).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path, images, labels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row if row is None or isinstance(row, bytes) else png(row) for row in images]
    img = [{"bytes": row, "path": f"{k}.png"} for k, row in enumerate(rows)]
    labels = pyarrow.array([None if k is None else int(k) for k in labels], pyarrow.int64())
    parquet.write_table(pyarrow.table({"img": img, "label": labels}), path)


def python_batch(images, labels, protocol: int = 2) -> bytes:
    batch = {
        b"batch_label": b"a batch",
        b"labels": [int(k) for k in labels],
        b"data": images.reshape(len(images), -1),
        b"filenames": [b"one.png"] * len(labels),
    }
    return pickle.dumps(batch, protocol)


def python_2_batch(images, labels) -> bytes:
    """What Python 2's cPickle wrote: 8-bit strings, numpy.core, no _codecs."""

    def string(text: bytes) -> bytes:
        return b"T" + len(text).to_bytes(4, "little") + text

    def number(value: int) -> bytes:
        return b"J" + int(value).to_bytes(4, "little", signed=True)

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85"
    array += string(b"b") + b"\x87R(" + number(1) + number(len(images)) + number(3072) + b"\x86"
    array += b"cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + b"\x87R("
    array += number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array += b"\x89" + string(images.tobytes()) + b"tb"
    labels = b"](" + b"".join(number(k) for k in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + labels + b"u."


def write_python(folder: Path, images, labels, write=python_batch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    share = len(labels) // 5
    for k, name in enumerate(TRAIN):
        rows = slice(k * share, (k + 1) * share)
        (folder / name).write_bytes(write(images[rows], labels[rows]))


def binary_batch(images, labels) -> bytes:
    return np.concatenate([labels[:, None].astype(np.uint8), images.reshape(-1, 3072)], 1).tobytes()


def write_binary(folder: Path, images, labels) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    share = len(labels) // 5
    for k, name in enumerate(TRAIN):
        rows = slice(k * share, (k + 1) * share)
        (folder / f"{name}.bin").write_bytes(binary_batch(images[rows], labels[rows]))


def write_folders(folder: Path, images, labels) -> None:
    for k, (planes, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / "train" / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{k:04d}.png").write_bytes(png(planes))


def write_shards(folder: Path, images, labels) -> None:
    half = len(labels) // 2
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", images[:half], labels[:half])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", images[half:], labels[half:])


WRITERS = {
    "parquet": lambda folder, *rows: write_parquet(folder / "train.parquet", *rows),
    "hub": lambda folder, *rows: write_parquet(
        folder / "plain_text" / "train-00000-of-00001.parquet", *rows
    ),
    "shards": write_shards,
    "python": write_python,
    "python, inside": lambda folder, *rows: write_python(folder / "cifar-10-batches-py", *rows),
    "python 2": lambda folder, *rows: write_python(folder, *rows, write=python_2_batch),
    "binary": write_binary,
    "binary, inside": lambda folder, *rows: write_binary(folder / "cifar-10-batches-bin", *rows),
    "folders": write_folders,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("limit", [None, 13])
def test_every_format_gives_the_same_pictures(tmp_path, name, limit):
    images, labels = pictures(20)
    WRITERS[name](tmp_path, images, labels)
    read = load(tmp_path, "train", limit)
    assert torch.equal(read.images, torch.from_numpy(images)[:limit])
    assert torch.equal(read.labels, torch.from_numpy(labels)[:limit])
    assert read.images.is_contiguous()


def test_a_limited_image_folder_has_every_class_equally_often(tmp_path):
    images, labels = pictures(30)
    write_folders(tmp_path, images, np.sort(labels))  # written class by class
    assert torch.bincount(load(tmp_path, limit=20).labels).tolist() == [2] * 10


def test_the_splits_are_told_apart(tmp_path):
    images, labels = pictures(20)
    write_binary(tmp_path, images, labels)
    (tmp_path / "test_batch.bin").write_bytes(binary_batch(images[3:4], labels[3:4]))
    assert load(tmp_path, "test").labels.tolist() == [3]
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match="must hold the test split"):
        load(tmp_path, "test")


@pytest.mark.parametrize("other", ["parquet", "hub", "python", "binary, inside", "folders"])
def test_two_copies_are_refused(tmp_path, other):
    rows = pictures(20)
    WRITERS["binary"](tmp_path, *rows)
    WRITERS[other](tmp_path, *rows)
    with pytest.raises(ValueError, match=r"(?s)once, but .*binary batches in .*name the folder"):
        load(tmp_path)


def test_an_empty_folder_says_what_may_lie_in_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)train\.parquet.*cifar-10-batches-py"):
        load(tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"unpack cifar-10-python\.tar\.gz first"):
        load(tmp_path)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(Exception, match="split"):  # in tests the annotation refuses it first
        load(tmp_path, "validation")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load(tmp_path, limit=0)


@pytest.mark.parametrize("write", ["python", "binary"])
def test_missing_and_unequal_batches_are_named(tmp_path, write):
    suffix = "" if write == "python" else ".bin"
    images, labels = pictures(20)
    WRITERS[write](tmp_path, images, labels)
    encode = python_batch if write == "python" else binary_batch
    (tmp_path / f"data_batch_3{suffix}").write_bytes(encode(images[:3], labels[:3]))
    with pytest.raises(ValueError, match=f"data_batch_3{suffix} has 3 rows, but data_batch_1"):
        load(tmp_path)
    for k in (2, 3):
        (tmp_path / f"data_batch_{k}{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks data_batch_2{suffix}, data_batch_3"):
        load(tmp_path)


# -- bad files -------------------------------------------------------------------------------------


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=path.name) as caught:
        load(path.parent, "test")
    return str(caught.value)


def test_bad_binary_batches_are_refused(tmp_path):
    path = tmp_path / "test_batch.bin"
    images, labels = pictures(3)
    whole = binary_batch(images, labels)
    assert "3073 bytes a row" in refusal(path, whole[:-1])
    assert "empty" in refusal(path, b"")
    assert "CIFAR-100" in refusal(path, bytes(3074 * 2))
    assert "row 1 has 10" in refusal(path, whole[:3073] + b"\x0a" + whole[3074:])


def test_bad_python_batches_are_refused(tmp_path):
    path = tmp_path / "test_batch"
    images, labels = pictures(3)
    data, listed = images.reshape(3, -1), labels.tolist()
    whole = python_batch(images, labels)
    assert "not a whole pickle" in refusal(path, whole[:-40])
    assert "not a whole pickle" in refusal(path, b"")
    assert "not a whole pickle" in refusal(path, b"<html>not found</html>")
    assert "goes on for 3 bytes" in refusal(path, whole + b"abc")
    for batch, message in [
        ([1, 2], "dictionary"),
        ({"data": data}, "lacks labels"),
        ({"labels": listed}, "lacks data"),
        ({"data": data, "fine_labels": listed}, "CIFAR-100"),
        ({"data": data[:, :-1], "labels": listed}, r"[3, 3071]"),
        ({"data": data.astype(np.int64), "labels": listed}, "int64"),
        ({"data": data.tolist(), "labels": listed}, "list"),
        ({"data": data, "labels": listed[:2]}, "3 pictures and 2 labels"),
        ({"data": data, "labels": [0, 1, -1]}, "row 2 has -1"),
        ({"data": data, "labels": [0, 1, 2.0]}, "row 2 has 2.0"),
        ({"data": data, "labels": [0, True, 2]}, "row 1 has True"),
        ({"data": data, "labels": None}, "list of labels"),
        ({"data": data[:0], "labels": []}, "at least one"),
    ]:
        assert message in refusal(path, pickle.dumps(batch, 4))


def test_labels_may_be_an_array_of_whole_numbers(tmp_path):
    images, labels = pictures(3)
    batch = {"data": images.reshape(3, -1), "labels": labels}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, 4))
    assert load(tmp_path, "test").labels.tolist() == [0, 1, 2]
    turned = {"data": np.asfortranarray(images.reshape(3, -1)), "labels": labels.astype(">i4")}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(turned, 2))
    assert torch.equal(load(tmp_path, "test").images, torch.from_numpy(images))


def test_bad_parquet_files_are_refused(tmp_path):
    path = tmp_path / "test.parquet"
    images, labels = pictures(3)
    write_parquet(path, images, labels)
    whole = path.read_bytes()
    assert "not a whole parquet file" in refusal(path, whole[:-100])
    assert "not a whole parquet file" in refusal(path, b"")
    assert "not a whole parquet file" in refusal(path, b"PAR1" + bytes(100) + b"PAR1")
    parquet.write_table(pyarrow.table({"img": [b"1"], "label": [1]}), path)
    assert "struct" in refusal(path, path.read_bytes())
    parquet.write_table(pyarrow.table({"image": [b"1"], "label": [1]}), path)
    assert "lacks the columns ['img']" in refusal(path, path.read_bytes())
    wide = np.zeros((3, 32, 33), np.uint8)
    good = png(images[1])
    for rows, marks, message in [
        ([images[0], wide], [0, 1], "row 1 must be an RGB picture of 32 x 32, got RGB of 33 x 32"),
        ([images[0], png(images[1], "L")], [0, 1], "got L of 32 x 32"),
        ([images[0], png(images[1], "RGBA")], [0, 1], "got RGBA of 32 x 32"),
        ([images[0], good[: len(good) // 2]], [0, 1], "row 1 is not a whole picture"),
        ([images[0], b"nothing"], [0, 1], "row 1 is not a whole picture"),
        ([images[0], None], [0, 1], "row 1 has no picture"),
        ([images[0], images[1]], [0, None], "row 1 has None"),
        ([images[0], images[1]], [-1, 3], "row 0 has -1"),
        ([], [], "rows"),
    ]:
        if rows:
            write_parquet(path, rows, marks)
        else:
            table = parquet.read_table(io.BytesIO(whole)).slice(0, 0)
            parquet.write_table(table, path)
        assert message in refusal(path, path.read_bytes())


def test_missing_and_mixed_shards_are_named(tmp_path):
    write_shards(tmp_path, *pictures(4))
    (tmp_path / "data" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="lacks train-00000-of-00002"):
        load(tmp_path)
    write_shards(tmp_path, *pictures(4))
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", *pictures(4))
    with pytest.raises(ValueError, match="two copies"):
        load(tmp_path)


def test_bad_image_folders_are_refused(tmp_path):
    images, labels = pictures(10)
    write_folders(tmp_path, images, labels)
    (tmp_path / "train" / ".DS_Store").touch()
    assert len(load(tmp_path).labels) == 10
    (tmp_path / "train" / "lion").mkdir()
    with pytest.raises(ValueError, match="holds lion"):
        load(tmp_path)
    (tmp_path / "train" / "lion").rmdir()
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes\.txt is no \.png or \.jpg"):
        load(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").unlink()
    (tmp_path / "train" / "cat" / "0003.png").write_bytes(png(images[3], "P"))
    with pytest.raises(ValueError, match=r"0003\.png must be an RGB picture"):
        load(tmp_path)
    (tmp_path / "train" / "cat" / "0003.png").unlink()
    with pytest.raises(ValueError, match="no pictures of the class cat"):
        load(tmp_path)


# -- pickles that are programs ---------------------------------------------------------------------


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Persistent(pickle.Pickler):
    def persistent_id(self, obj):
        return "somewhere else" if isinstance(obj, Call) else None


ATTACKS = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(builtins.eval, f"open({str(mark)!r}, 'w').close()"),
    "exec": lambda mark: Call(builtins.exec, f"open({str(mark)!r}, 'w').close()"),
    "import": lambda mark: Call(__import__, "os"),
    "open": lambda mark: Call(open, str(mark), "w"),
    "numpy function": lambda mark: Call(np.save, str(mark), np.zeros(1)),
    "numpy load": lambda mark: Call(np.load, str(mark), None, True),
    "memory map": lambda mark: Call(np.memmap, str(mark), "u1", "w+", 0, (1,)),
    "nested": lambda mark: Call(list, [Call(dict, [(1, Call(os.system, f"touch {mark}"))])]),
    "path": lambda mark: Call(Path.touch, mark),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_nothing_in_a_pickle_is_executed(tmp_path, attack, protocol):
    mark = tmp_path / "executed.npy"
    images, _ = pictures(3)
    batch = {"data": images.reshape(3, -1), "labels": [ATTACKS[attack](mark)]}
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps(batch, protocol))
    with pytest.raises(ForbiddenGlobal, match=rf"{path} asks for \w+.*\w, which plain batches"):
        load(tmp_path, "test")
    assert not mark.exists()


def test_the_attacks_would_work_on_an_ordinary_unpickler(tmp_path):
    mark = tmp_path / "executed.npy"
    for attack in ("eval", "numpy function", "memory map", "nested"):
        pickle.loads(pickle.dumps(ATTACKS[attack](mark), 2))
        assert mark.exists(), attack
        mark.unlink()


def test_the_forbidden_name_is_in_the_error(tmp_path):
    path = tmp_path / "test_batch"
    assert "posix.system" in refusal(path, pickle.dumps(Call(os.system, "true"), 2))
    assert "asks for os.system" in refusal(path, b"cos\nsystem\n(S'true'\ntR.")  # by hand
    assert "asks for os.system" in refusal(path, b"(S'true'\nios\nsystem\n.")  # INST
    assert "numpy.core.multiarray.scalar" in refusal(path, b"cnumpy.core.multiarray\nscalar\n.")
    assert "numpy._reconstruct" in refusal(path, b"cnumpy\n_reconstruct\n.")
    dotted = b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93."
    assert "numpy.ndarray.dump" in refusal(path, dotted)


def test_persistent_ids_are_refused(tmp_path):
    stream = io.BytesIO()
    Persistent(stream, 2).dump({"data": Call(os.system, "true")})
    assert "persistent id" in refusal(tmp_path / "test_batch", stream.getvalue())


@pytest.mark.parametrize(
    "values",
    [
        np.array([{}, []], dtype=object),
        np.zeros(2),
        np.array(["a"]),
        np.zeros(2, [("a", "u1")]),
        np.zeros(2, "M8[s]"),
    ],
)
def test_only_arrays_of_whole_numbers_are_read(tmp_path, values):
    content = pickle.dumps({"data": values, "labels": []}, 2)
    assert "whole numbers" in refusal(tmp_path / "test_batch", content)


@pytest.mark.parametrize(
    "program",
    [
        b"cnumpy\nndarray\n(J\x00\x00\x00\x40\x85tR.",  # a gigabyte, by calling ndarray
        b"cnumpy\nndarray\n}S'_call'\nS'x'\nsb.",  # changes what the name stands for
        b"cnumpy\nndarray\n)\x81.",  # NEWOBJ
        b"cnumpy.core.multiarray\n_reconstruct\n(c_codecs\nencode\ntR.",
        b"c_codecs\nencode\n(S'a'\nS'idna'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\ntR.",  # without content
        b"Nr\xff\xff\xff\x7f.",  # a memo of two thousand million places
        b"\x80\x02\x82\x01.",  # an extension
    ],
)
def test_what_stands_for_numpy_does_nothing(tmp_path, program):
    (tmp_path / "test_batch").write_bytes(program)
    with pytest.raises(ValueError, match="test_batch"):
        load(tmp_path, "test")


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=6), st.integers(0, 2)
)
def test_damaged_pickles_are_read_or_refused(tmp_path_factory, damages, protocol):
    images, labels = pictures(1)
    content = bytearray(python_batch(images[:, :, :1, :2], labels, (0, 2, 4)[protocol]))
    for place, value in damages:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(content))
    with contextlib.suppress(ValueError):  # nothing else may come out of it
        read_plain(path)


@given(st.integers(1, 4), st.integers(0, 3072))
def test_a_cut_binary_batch_is_never_read(tmp_path_factory, rows, cut):
    folder = tmp_path_factory.getbasetemp()
    images, labels = pictures(rows)
    whole = binary_batch(images, labels)
    (folder / "test_batch.bin").write_bytes(whole[: len(whole) - cut])
    if cut:
        with pytest.raises(ValueError, match="bytes a row"):
            load(folder, "test")
    else:
        assert len(load(folder, "test").labels) == rows


@pytest.mark.skipif(not DATA.is_dir(), reason="CIFAR-10 is not there")
def test_the_real_files_are_read():
    read = load(DATA, "test", 1500)
    assert read.images.shape == (1500, 3, 32, 32)
    assert (torch.bincount(read.labels) > 100).all()  # 150 each, standard deviation 12
    assert 115 < read.images.float().mean().item() < 127  # 0.4733 of 255 for all of CIFAR-10
