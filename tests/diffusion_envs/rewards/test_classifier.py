from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from diffusion_envs import rewards
from diffusion_envs.cifar10.data import CLASSES, class_of
from diffusion_envs.rewards import ClassConfidence, PromptAlignment
from diffusion_envs.rewards.classifier import CifarClassifier, load_classifier

CIFAR = Path(__file__).parents[4] / "shared" / "data" / "cifar10"


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_shipped_classifiers_give_log_probabilities_of_the_prompted_class(generator, name):
    images = torch.rand(4, 3, 32, 32, generator=generator)
    logits = load_classifier(name)(images).double()
    prompts = ["a photo of a cat", "two ships at sea", "A RED CAR", "the plane"]
    labels = [3, 8, 1, 0]
    expected = torch.stack(
        [
            -functional.cross_entropy(row, torch.tensor(k))
            for row, k in zip(logits, labels, strict=True)
        ]
    )
    found = PromptAlignment(name)(images, prompts)
    # float32 log-softmax of ten logits below 30: a few roundings of 30 * 2^-24
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    assert (found <= 0).all()


def test_the_probabilities_of_all_classes_sum_to_one(generator):
    image = torch.rand(1, 3, 32, 32, generator=generator).expand(10, -1, -1, -1)
    found = PromptAlignment()(image, [f"a {name}" for name in CLASSES])
    assert found.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_picture_is_judged_alike_in_any_batch_and_by_its_own_prompt(generator):
    images = torch.rand(6, 3, 32, 32, generator=generator)
    prompts = [f"a {CLASSES[k]}" for k in (9, 2, 4, 4, 0, 7)]
    reward = PromptAlignment()
    whole = reward(images, prompts)
    alone = torch.cat([reward(i[None], [p]) for i, p in zip(images, prompts, strict=True)])
    # float32 convolutions may sum in another order for another batch
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [8, 32, 64, 100])
def test_images_of_any_size_are_judged(generator, side):
    images = torch.rand(2, 3, side, side + 4, generator=generator)
    assert torch.isfinite(rewards.score(PromptAlignment(), images, ["a cat", "a dog"])).all()


def test_its_gradient_reaches_the_pixels_and_climbs(generator):
    images = torch.rand(3, 3, 32, 32, generator=generator).requires_grad_()
    reward, prompts = PromptAlignment(), ["a horse", "a frog", "a truck"]
    assert reward.differentiable
    before = reward(images, prompts)
    (slope,) = torch.autograd.grad(before.sum(), images)
    step = 1e-3 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    gain = reward(images + step, prompts) - before
    # directional derivative: |slope| * 1e-3 to first order; curvature and rounding well below half
    torch.testing.assert_close(gain, 1e-3 * slope.flatten(1).norm(dim=1), rtol=0.5, atol=2e-5)


def test_the_network_is_frozen():
    network = load_classifier("reward")
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    "prompt", ["a photo", "a cat and a dog", "category", "carpet", "a scary shipment", ""]
)
def test_a_prompt_that_names_no_class_or_two_is_refused(prompt):
    assert class_of(prompt) is None
    with pytest.raises(ValueError, match=f"prompt '{prompt}' must name exactly one of .*airplane"):
        PromptAlignment()(torch.rand(2, 3, 32, 32), ["a cat", prompt])


@pytest.mark.parametrize("classifier", ["jury", "", "weights.safetensors"])
def test_an_unknown_classifier_is_refused(classifier):
    with pytest.raises(ValueError, match="classifier must be 'reward', 'judge' or a Path"):
        PromptAlignment(classifier)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must be a file, but .*none\.safetensors is"):
        PromptAlignment(tmp_path / "none.safetensors")


def test_a_file_of_weights_makes_the_same_reward(tmp_path, generator):
    path = tmp_path / "mine.safetensors"
    save_file({k: v.contiguous() for k, v in load_classifier("judge").state_dict().items()}, path)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    prompts = ["a deer", "an automobile"]
    assert torch.equal(
        PromptAlignment(path)(images, prompts), PromptAlignment("judge")(images, prompts)
    )


def test_the_classifiers_are_two_networks():
    one, two = (load_classifier(name).head.weight for name in ("reward", "judge"))
    assert not torch.equal(one, two)
    assert sum(p.numel() for p in CifarClassifier().parameters()) < 1_000_000  # 2 MB in fp16


@pytest.mark.skipif(not (CIFAR / "test.parquet").is_file(), reason="needs CIFAR-10")
@pytest.mark.parametrize("name", ["reward", "judge"])
def test_the_shipped_classifiers_know_cifar(name):
    from diffusion_envs.cifar10.data import load

    images, labels = load(CIFAR, "test", limit=500)
    found = load_classifier(name)(images / 255).argmax(1)
    # trained to 80 % or better; 500 pictures have a standard error of 1.8 %, five of them are 9 %
    assert (found == labels).double().mean() > 0.71


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_confidence_is_the_alignment_with_the_likeliest_class(name, generator):
    images = torch.rand(5, 3, 32, 32, generator=generator)
    asked = torch.stack(
        [PromptAlignment(name)(images, [f"a {word}"] * 5).double() for word in CLASSES]
    )
    found = ClassConfidence(name)(images, ["whatever"] * 5)
    torch.testing.assert_close(found.double(), asked.amax(0), rtol=1e-6, atol=1e-6)
    assert (found >= -torch.tensor(10.0).log()).all()
    assert (found <= 0).all()


def test_confidence_climbs_along_its_gradient(generator):
    images = torch.rand(2, 3, 32, 32, generator=generator)
    reward = ClassConfidence()
    leaf = images.clone().requires_grad_()
    value = rewards.differentiable_score(reward, leaf, ["", ""])
    slope = torch.autograd.grad(value.sum(), leaf)[0]
    length = slope.flatten(1).norm(dim=1)
    gain = reward(images + 1e-3 * slope / length.view(-1, 1, 1, 1), ["", ""]) - value.detach()
    torch.testing.assert_close(gain, 1e-3 * length, rtol=0.5, atol=2e-5)
    assert reward.embedding(images).shape == PromptAlignment().embedding(images).shape


def test_confidence_refuses_what_is_no_classifier(tmp_path):
    with pytest.raises(ValueError, match="classifier must be 'reward', 'judge' or a Path"):
        ClassConfidence("jury")
    with pytest.raises(ValueError, match="is none"):
        ClassConfidence(tmp_path / "nowhere")
