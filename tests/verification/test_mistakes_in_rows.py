"""Kinds of mistakes in the order of rows, and in what is compared with what."""

import pytest
import torch
from torch import Tensor

import ctrl
from diffusion_envs.runs import evaluation, further_samples
from diffusion_envs.runs.early_stopping import EarlyStopping, StopRule
from diffusion_envs.runs.evaluation import HELD_OUT, WATCHED, by_prompt, evaluate
from diffusion_envs.runs.monitoring import Evaluations
from diffusion_envs.runs.options import RunOptions
from tests.verification.kinds_of_mistakes import WORTH, Kinds, by_words
from verification.claim import Setting
from verification.problems.training_loop import PROMPTS, trainer

KINDS = Kinds()
SETTING = Setting()


@KINDS.sees(r"""
diffusion_envs.environment.Environment.sample
    denoised pictures with prompts in another order | self._rewards(guesses, _each(prompts, steps)
        => self._rewards(guesses, prompts * steps
diffusion_envs.environment.Environment._answers
    denoised pictures in threads with prompts in another order | words, which = _each(prompts, steps)
        => words, which = prompts * steps
diffusion_envs.environment.Environment._pretrained_scores
    pretrained model with prompts in another order | condition.repeat_interleave(steps) => condition.repeat(steps)
diffusion_envs.training.critic.Critic.shown
    value network with prompts in another order | .repeat_interleave(nodes, 0) => .repeat(nodes, 1)
diffusion_envs.environment.Environment._scored
    every piece with the first prompts | prompts[c], samples[c]) => prompts[: len(images[c])], samples[c])
""")
def every_row_has_its_own_prompt(folder) -> None:
    """Rewards, denoised rewards, the pretrained model and the critic: row by row."""
    for overlap in (0, 1):
        made = trainer(SETTING)
        environment = made.environment
        environment.reward, environment.overlap, environment.batch = by_words, overlap, 4
        condition = torch.tensor([2, 0, 1, 1, 0])

        def policy(mean, _):
            return ctrl.DeterministicPolicy(mean)

        sample = environment.sample(policy, range(5), condition, stream="train", denoised=True)
        rollout, steps = sample.rollout, environment.steps
        for p, k in enumerate(condition.tolist()):
            word, states = PROMPTS[k], rollout.states[p, :-1]
            single = torch.full((len(states),), k)
            with torch.no_grad():
                guess = steps.denoised(states[None], rollout.means[p : p + 1])[0]
                picture = environment.model.decode(torch.cat([guess, rollout.states[p, -1:]]))
                with environment.pretrained():
                    scores = environment.action(states, torch.arange(len(states)), single)
                features = environment.features_of(single[:1])[0]
            expected = picture.mean((1, 2, 3)) * WORTH[word]
            torch.testing.assert_close(sample.denoised_rewards[p], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rollout.reference_scores[p], scores, rtol=1e-4, atol=1e-5)
            nodes = rollout.states.shape[1]
            shown = made.critic.shown(rollout)[2].view(5, nodes, -1)
            torch.testing.assert_close(shown[p], features.expand(nodes, -1))


@KINDS.sees(r"""
diffusion_envs.runs.evaluation.sample_in_turn
    prompts in turn from the first in every batch | for i in samples]) => for i in range(len(samples))])
diffusion_envs.training.trainer.Trainer.sample
    training's samples the same in every update | first = self.update * samples => first = 0
diffusion_envs.runs.further_samples.further_rewards
    further samples the same in every batch | some = indices[own.start : own.stop] => some = own
diffusion_envs.runs.evaluation._judged
    judges see the pictures in another order | ask(judge, images[c] => ask(judge, images.flip(0)[c]
    judges are told prompts in another order | prompts[c]), => prompts[::-1][c]),
diffusion_envs.runs.evaluation.by_prompt
    differences of other samples | "difference": after.rewards - before.rewards
        => "difference": after.rewards - before.rewards.flip(0)
    one prompt's rewards for another's | .append(row) => .append(len(after.prompts) - 1 - row)
diffusion_envs.runs.evaluation.require_same_rewards
    stored pictures scored with prompts in another order | stored.prompts[c.start : c.stop]
        => stored.prompts[::-1][c.start : c.stop]
""")
def every_sample_has_the_prompt_of_its_index(folder) -> None:
    """Whatever the batch, the process and the update; and judges see what the reward saw."""
    made = trainer(SETTING)
    environment = made.environment
    environment.reward = by_words
    judge = evaluate(environment, 5, judges={"same": by_words}, batch=2)
    assert judge.prompts == ["one", "two", "three", "one", "two"]
    direct = by_words(judge.images, judge.prompts)
    torch.testing.assert_close(judge.rewards, direct, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(judge.judged["same"], direct, rtol=1e-4, atol=1e-5)
    evaluation.require_same_rewards(judge, environment, {}, 2, folder / "before")
    before = evaluate(environment, 5, batch=3, pretrained=True)
    rows = {p: [k for k, each in enumerate(judge.prompts) if each == p] for p in judge.prompts}
    for prompt, told in by_prompt(before, judge).items():
        for part, values in (
            ("after", judge.rewards),
            ("difference", judge.rewards - before.rewards),
        ):
            assert told[part].mean == pytest.approx(values[rows[prompt]].mean().item(), rel=1e-4)
    few = further_samples.further_rewards(environment, 5, folder / "few", batch=2)
    many = further_samples.further_rewards(environment, 5, folder / "many", batch=5)
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5)
    made.update = 1
    states, other = made.sample().rollout.states, trainer(SETTING).sample().rollout
    assert not torch.isclose(states[:, 0], other.states[:, 0]).any()


@KINDS.sees(r"""
diffusion_envs.runs.evaluation.evaluate
    held-out samples of training's stream | own[c], stream) => own[c], "train")
    the pretrained model with the adapter on | environment.pretrained() if pretrained else nullcontext()
        => nullcontext()
diffusion_envs.runs.further_samples.further_rewards
    the frontier from held-out samples | sample_in_turn(environment, some, STREAM
        => sample_in_turn(environment, some, "held-out"
diffusion_envs.runs.further_samples.further_rewards
    the frontier with the adapter on | environment.pretrained(), => ``
diffusion_envs.environment.Environment._pretrained_scores
    path KL from the adapted model | with self.model.pretrained(): => if True:
diffusion_envs.environment.Environment.pretrained_mean
    the pretrained mean with the adapter on | with self.model.pretrained(): => if True:
diffusion_envs.runs.evaluation.evaluate_pretrained
    the stored "before" of the adapted model | pretrained=True => pretrained=False
""")
def evaluations_are_of_their_own_samples_and_model(folder) -> None:
    """No start is shared by two purposes, and what is called pretrained is."""
    made = trainer(SETTING)
    environment = made.environment
    environment.reward = lambda images, prompts: images.flatten(1)[:, 0]
    training = environment.sample(
        lambda mean, _: ctrl.DeterministicPolicy(mean),
        range(4),
        torch.arange(4) % 3,
        stream="train",
    ).rollout
    seen = [training.rewards]
    seen += [evaluate(environment, 4, stream=each).rewards for each in (HELD_OUT, WATCHED)]
    adapted = seen[1]
    for one in range(3):
        for two in range(one):
            assert not torch.isclose(seen[one], seen[two], rtol=1e-5).any()
    assert torch.isfinite(training.costs).all()
    assert (training.costs > 0).all()
    with torch.no_grad():
        state, at = training.states[:, 0], torch.zeros(4, dtype=torch.int64)
        step = torch.zeros(4, dtype=torch.int64)
        means = [environment.pretrained_mean(0, state, at)]
        for parameter in environment.model.parameters:
            parameter.zero_()  # the adapter does nothing: the same as off
        means.append(environment.steps.mean(step, state, environment.action(state, 0, at)))
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)
    bare = evaluate(environment, 4).rewards
    fresh = trainer(SETTING).environment
    fresh.reward = environment.reward
    assert not torch.isclose(adapted, bare, rtol=1e-5).all()
    torch.testing.assert_close(evaluate(fresh, 4, pretrained=True).rewards, bare)
    path = folder / "before.safetensors"
    stored = evaluation.evaluate_pretrained(fresh, 4, path, judges={}, batch=4)
    torch.testing.assert_close(stored.rewards, bare)
    further = further_samples.further_rewards(fresh, 4, folder / "further", batch=4)
    assert not torch.isclose(further, bare, rtol=1e-5).any()
    again = further_samples.further_rewards(environment, 4, folder / "bare", batch=4)
    torch.testing.assert_close(further, again)


@KINDS.sees(r"""
diffusion_envs.runs.early_stopping.EarlyStopping.of
    the pretrained model's scores of the adapted one | pretrained=pretrained => pretrained=False
    watched samples are the held-out ones | stream=WATCHED => stream="held-out"
    the current weights where their mean is exported | with trainer.averaged(): => if True:
diffusion_envs.runs.monitoring.Evaluations._evaluate
    evaluated the current weights, exported their mean | with self._trainer.averaged(): => if True:
diffusion_envs.runs.evaluation.Evaluation.first
    the last samples for the first | rewards=self.rewards[:n] => rewards=self.rewards[-n:]
""")
def what_is_compared_is_alike(folder) -> None:
    """Before and after: the same samples and weights as are exported, and not what stops a run."""
    made = trainer(SETTING, average=0.5)
    for mean, now in zip(made.mean, made.parameters, strict=True):
        mean.copy_(0.3 * now.detach())
    environment = made.environment

    def measured(pretrained: bool = False, stream: str = HELD_OUT) -> Tensor:
        with made.averaged():
            return evaluate(environment, 4, pretrained=pretrained, stream=stream).rewards

    stopping = EarlyStopping.of(StopRule(samples=4), made, environment, folder, {}, 4)
    for pretrained in (False, True):
        got = stopping._measure(3, pretrained).rewards
        torch.testing.assert_close(got, measured(pretrained, WATCHED))
    options = RunOptions(evaluation_samples=4)
    evaluations = Evaluations(made, environment, None, folder, options, 4, 5)
    whole = evaluations._evaluate(4)
    torch.testing.assert_close(whole.rewards, measured())
    torch.testing.assert_close(whole.first(2).rewards, whole.rewards[:2])


test_the_right_code_is_right, test_the_planted_mistake_is_seen = KINDS.tests()
