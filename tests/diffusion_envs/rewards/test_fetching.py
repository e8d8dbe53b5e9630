import fnmatch
import inspect
import shutil

import huggingface_hub
import pytest
import torch

from diffusion_envs.rewards import image_reward
from diffusion_envs.rewards.__main__ import LEARNED, main
from diffusion_envs.rewards.fetching import convert, fetch
from diffusion_envs.rewards.image_reward import WEIGHTS, ImageReward
from tests.diffusion_envs.rewards import plain_blip
from tests.diffusion_envs.rewards.learned import CASES

PROMPTS = ["a cat", "red dogs"]


@pytest.fixture
def published(tmp_path, generator):
    """The two published repositories, with a small model."""
    whole = plain_blip.write(tmp_path / "published", plain_blip.state(generator))
    for repository, files in WEIGHTS.repositories.items():
        for name in files:
            place = tmp_path / "hub" / repository
            place.mkdir(parents=True)
            shutil.copyfile(whole / name, place / name)
            (place / "pytorch_model.bin").write_text("not asked for")
    return tmp_path / "hub"


@pytest.fixture
def hub(published, monkeypatch):
    """A hub of those; calls to it by repository, and repositories that cannot be reached."""
    calls, unreachable = [], set()

    real = inspect.signature(huggingface_hub.snapshot_download)

    def snapshot_download(repository, **options):
        real.bind(repository, **options)
        allow_patterns, local_dir = options["allow_patterns"], options["local_dir"]
        calls.append(repository)
        if repository in unreachable:
            raise OSError("the connection was lost\nand more")
        local_dir.mkdir(parents=True, exist_ok=True)
        for file in (published / repository).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, local_dir / file.name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls, unreachable


@pytest.fixture
def images(generator):
    return torch.rand(2, 3, 40, 40, generator=generator)


def test_what_is_fetched_is_in_one_folder_that_the_reward_loads(hub, tmp_path, images, capsys):
    folder = tmp_path / "mine"
    assert main(["fetch", "image-reward", "--output", str(folder)]) == 0
    assert {file.name for file in folder.iterdir()} == {"ImageReward.pt", "vocab.txt"}
    published = ImageReward(tmp_path / "published")(images, PROMPTS)
    assert torch.equal(ImageReward(folder)(images, PROMPTS), published)
    assert f"--reward image-reward --reward-model {folder}" in capsys.readouterr().out


def test_an_interrupted_fetch_goes_on(hub, tmp_path, capsys):
    calls, unreachable = hub
    folder = tmp_path / "mine"
    words = ["fetch", "image-reward", "--output", str(folder)]
    unreachable.add("THUDM/ImageReward")
    assert main(words) == 2
    complaint = capsys.readouterr().err
    assert f"not complete in {folder}: it lacks ImageReward.pt of THUDM/ImageReward " in complaint
    assert "(THUDM/ImageReward: the connection was lost). The same command goes on" in complaint
    assert "copy into one folder ImageReward.pt of THUDM/ImageReward; vocab.txt of" in complaint
    unreachable.clear()
    calls.clear()
    assert main(words) == 0
    assert calls == ["THUDM/ImageReward"]  # the vocabulary was there
    calls.clear()
    assert main(words) == 0
    assert not calls


def test_a_repository_that_lacks_a_file_is_named(hub, published, tmp_path):
    (published / "THUDM/ImageReward/ImageReward.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks ImageReward\.pt of THUDM/ImageReward\. "):
        fetch(WEIGHTS, tmp_path / "mine")


def test_fetch_has_a_folder_if_none_is_named(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fetch", "image-reward"]) == 0
    assert (tmp_path / "reward-models" / "image-reward" / "vocab.txt").is_file()


def test_converted_weights_score_the_same_bit_for_bit(published, tmp_path, images, capsys):
    source, folder = tmp_path / "published", tmp_path / "converted"
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in torch.load(source / "ImageReward.pt").items()
    }
    torch.save({"state_dict": half}, source / "ImageReward.pt")
    scores = ImageReward(source)(images, PROMPTS)
    assert main(["convert", "image-reward", str(source), str(folder)]) == 0
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "vocab.txt"}
    (source / "ImageReward.pt").unlink()
    assert torch.equal(ImageReward(folder)(images, PROMPTS), scores)
    numbers = sum(value.numel() for value in half.values())
    assert (folder / "model.safetensors").stat().st_size < 3 * numbers  # still half precision


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_reward_is_the_same_from_converted_files(case, tmp_path, generator):
    source = tmp_path / "published"
    source.mkdir()
    case.write(source, case.state(generator))
    images, prompts = torch.rand(4, 3, 41, 58, generator=generator), list(case.prompts)
    scores = case.make(source)(images, prompts)
    if not any(file.suffix in (".pt", ".pth", ".bin") for file in source.iterdir()):
        with pytest.raises(ValueError, match="nothing is left to convert"):
            convert(case.weights, source, tmp_path / "converted")
        return
    convert(case.weights, source, tmp_path / "converted")
    assert torch.equal(case.make(tmp_path / "converted")(images, prompts), scores)


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_fetched_is_what_the_reward_needs(name, hub, published, tmp_path):
    weights = LEARNED[name].weights
    for repository, files in weights.repositories.items():
        (published / repository).mkdir(parents=True, exist_ok=True)
        for file in files:
            (published / repository / file).write_text("")
    if name == "aesthetic-v1":
        with pytest.raises(FileNotFoundError, match=r"linear\.pth is on no hub; put it there by"):
            fetch(weights, tmp_path / "mine")
        (tmp_path / "mine" / "sa_0_4_vit_l_14_linear.pth").write_text("")
    assert fetch(weights, tmp_path / "mine").keys() == weights.files.keys()
    assert LEARNED[name].make(str(tmp_path / "mine"))


def test_convert_overwrites_nothing(published, tmp_path, capsys):
    source = tmp_path / "published"
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "vocab.txt").write_text("mine")
    assert main(["convert", "image-reward", str(source), str(tmp_path / "converted")]) == 2
    assert "vocab.txt would be overwritten; name another folder" in capsys.readouterr().err
    assert (tmp_path / "converted" / "vocab.txt").read_text() == "mine"
    assert not (tmp_path / "converted" / "model.safetensors").exists()


def test_convert_works_in_the_folder_of_the_source(published, tmp_path, images):
    source = tmp_path / "published"
    before = ImageReward(source)(images, PROMPTS)
    image_reward._loaded.cache_clear()
    assert convert(WEIGHTS, source, source) == [source / "model.safetensors"]
    (source / "ImageReward.pt").unlink()
    assert torch.equal(ImageReward(source)(images, PROMPTS), before)
    with pytest.raises(ValueError, match="holds safetensors already: nothing is left to convert"):
        convert(WEIGHTS, source, tmp_path / "converted")


def test_convert_refuses_a_pickle_that_calls(tmp_path, published):
    import os

    class Calls:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"a": Calls()}, tmp_path / "published" / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"it names (posix|nt)\.mkdir to be called"):
        convert(WEIGHTS, tmp_path / "published", tmp_path / "converted")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "converted" / "model.safetensors").exists()


def test_the_table_shows_every_reward_without_reading_anything(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for words in ("image-reward", "ImageReward-v1.0", "Apache-2.0", "224 x 224", "vocab.txt"):
        assert words in shown
    for name in LEARNED:
        assert f" {name} " in shown
    assert "text-in-picture" in shown


@pytest.mark.parametrize("command", ["fetch", "convert"])
def test_an_unknown_reward_is_refused(command, capsys, tmp_path):
    words = [] if command == "fetch" else ["here", str(tmp_path)]
    assert main([command, "image-rewards", *words]) == 2
    assert "did you mean 'image-reward'?" in capsys.readouterr().err


def test_a_missing_source_is_said(tmp_path, capsys):
    assert main(["convert", "image-reward", str(tmp_path / "none"), str(tmp_path)]) == 2
    assert "does not exist; get them with: python -m diffusion_envs.rewards" in (
        capsys.readouterr().err
    )
