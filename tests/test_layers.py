"""The architecture: one ordered list of all modules; each may import only what stands before it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ctrl", "diffusion_envs", "verification")

# From the ground up. A package's name stands for its __init__, which comes after what it
# re-exports.
MODULES = """
ctrl.devices ctrl.reused_memory ctrl.compiled_normals ctrl.counter_normals ctrl.drawn_ahead
ctrl.estimate ctrl.user_functions ctrl.jumps ctrl.sde ctrl.stopping ctrl.problem
ctrl.policy ctrl.squashed_policy ctrl.memory ctrl.time_homogeneity ctrl.exploration ctrl.noise
ctrl.paths ctrl.returns ctrl.recorded ctrl.solvers ctrl.noise_sources
ctrl.torchsde_solver ctrl.simulate
ctrl.girsanov ctrl.transitions ctrl.value
ctrl.advantages ctrl.martingale ctrl.q_learning ctrl.off_policy ctrl.trust_region
ctrl.policy_gradient
ctrl.linear.reading ctrl.linear.collocation ctrl.linear.exponential
ctrl.linear.hamiltonian ctrl.linear.margin
ctrl.linear.lyapunov
ctrl.linear.lq ctrl.linear.gaussian ctrl.linear.kl_control
ctrl.linear.riccati ctrl.linear ctrl.regimes ctrl.phibe ctrl.risk_sensitive ctrl.chains
ctrl.mean_field ctrl.adjoint_matching ctrl.state_grid ctrl.action_grid ctrl.wide_stencil
ctrl.markov_chain ctrl.bellman ctrl.hjb ctrl.pendulum ctrl.problems
ctrl.agents.descent ctrl.agents.online ctrl.agents.policy_evaluation ctrl.agents.actor_critic
ctrl.agents.q_learning ctrl.agents.cppo ctrl.agents.policy_iteration ctrl.agents
ctrl.gym ctrl.plots ctrl
diffusion_envs diffusion_envs.ranges diffusion_envs.prompt diffusion_envs.whole_files
diffusion_envs.digests diffusion_envs.training.phase diffusion_envs.training.memory
diffusion_envs.noise_schedules diffusion_envs.frontier diffusion_envs.denoising
diffusion_envs.samplers.gaussian_steps diffusion_envs.samplers.flow_sde
diffusion_envs.samplers.ddim diffusion_envs.samplers.few_steps
diffusion_envs.samplers.diffusers_scheduler
diffusion_envs.samplers
diffusion_envs.cifar10.plain_pickle diffusion_envs.cifar10.formats diffusion_envs.cifar10.data
diffusion_envs.cifar10.pictures
diffusion_envs.rewards.contract diffusion_envs.rewards.rounding
diffusion_envs.rewards.daemon_threads diffusion_envs.rewards.time_limit
diffusion_envs.rewards.overlapped
diffusion_envs.rewards.preprocessing diffusion_envs.rewards.declaration
diffusion_envs.rewards.weights diffusion_envs.rewards.weighted
diffusion_envs.rewards.transformed diffusion_envs.rewards.jpeg
diffusion_envs.rewards.colour diffusion_envs.rewards.classifier
diffusion_envs.rewards.clip diffusion_envs.rewards.clip_score
diffusion_envs.rewards.pick_score diffusion_envs.rewards.hps
diffusion_envs.rewards.aesthetic diffusion_envs.rewards.image_reward
diffusion_envs.rewards.text_in_picture diffusion_envs.rewards.picture_formats
diffusion_envs.rewards.http diffusion_envs.rewards.remote
diffusion_envs.rewards.vlm_judge diffusion_envs.rewards.registry
diffusion_envs.rewards.fetching diffusion_envs.rewards diffusion_envs.rewards.serve
diffusion_envs.rewards.__main__
diffusion_envs.models.protocol diffusion_envs.models.kept_conditions
diffusion_envs.models.text_condition
diffusion_envs.models.available_memory
diffusion_envs.models.counting diffusion_envs.models.speed
diffusion_envs.models.adapters diffusion_envs.models.folders
diffusion_envs.models.execution
diffusion_envs.models.guidance_schedule diffusion_envs.models.noise_table
diffusion_envs.models.exports diffusion_envs.models.existing_lora
diffusion_envs.training.sharded diffusion_envs.models.trainable
diffusion_envs.models.latent_decoder diffusion_envs.models.text_to_image_family
diffusion_envs.models.stable_diffusion diffusion_envs.models.stable_diffusion_xl
diffusion_envs.models.text_to_image_pipeline
diffusion_envs.models.text_to_image_unet diffusion_envs.models.unconditional_unet
diffusion_envs.models.exact diffusion_envs.models
diffusion_envs.rollout diffusion_envs.environment
diffusion_envs.preferences diffusion_envs.objectives.protocol diffusion_envs.objectives.preflight
diffusion_envs.objectives.path_steps diffusion_envs.objectives.noised_data
diffusion_envs.objectives.last_steps
diffusion_envs.objectives.adjoint_matching diffusion_envs.objectives.ram
diffusion_envs.objectives.score_as_action diffusion_envs.objectives.ddpo
diffusion_envs.objectives.dpok diffusion_envs.objectives.grpo diffusion_envs.objectives.tdpo
diffusion_envs.objectives.pcpo diffusion_envs.objectives.flow_dppo
diffusion_envs.objectives.grpo_guard
diffusion_envs.objectives.d3po diffusion_envs.objectives.dense_reward
diffusion_envs.objectives.nft diffusion_envs.objectives.distributional
diffusion_envs.objectives.tilted_regression diffusion_envs.objectives.diffusion_dpo
diffusion_envs.objectives.reward_backpropagation diffusion_envs.objectives.dxmi
diffusion_envs.objectives.dxmi_from_data
diffusion_envs.objectives
diffusion_envs.training.update_size diffusion_envs.training.loss_scale
diffusion_envs.training.refusal
diffusion_envs.training.process_watch diffusion_envs.training.parallel
diffusion_envs.training.kl_controller diffusion_envs.training.value_network
diffusion_envs.training.critic diffusion_envs.training.energy
diffusion_envs.training.path_metric
diffusion_envs.training.optimisers.protocol diffusion_envs.training.optimisers.adamw
diffusion_envs.training.optimisers.adamw_8bit
diffusion_envs.training.optimisers.running_mean diffusion_envs.training.optimisers.trust_region
diffusion_envs.training.optimisers.natural_gradient
diffusion_envs.training.optimisers.diagonal_metric
diffusion_envs.training.optimisers.bounded_adamw diffusion_envs.training.optimisers.scaled_lora
diffusion_envs.training.optimisers
diffusion_envs.training.requirements diffusion_envs.training.gradients
diffusion_envs.training.update_numbers diffusion_envs.training.trainer
diffusion_envs.training.rehearsal
diffusion_envs.training
diffusion_envs.exact.gaussian diffusion_envs.exact.linear_policy
diffusion_envs.exact.rewards diffusion_envs.exact.problems diffusion_envs.exact
diffusion_envs.runs.checkpoint diffusion_envs.runs.settings diffusion_envs.runs.run_folder
diffusion_envs.runs.prompts diffusion_envs.runs.interruption diffusion_envs.runs.callbacks
diffusion_envs.runs.progress
diffusion_envs.runs.caption_fonts diffusion_envs.runs.contact_sheet
diffusion_envs.runs.tracking diffusion_envs.runs.plots diffusion_envs.runs.charts
diffusion_envs.runs.human_choices
diffusion_envs.runs.perceptual
diffusion_envs.runs.evaluation diffusion_envs.runs.early_stopping diffusion_envs.runs.options
diffusion_envs.runs.frechet diffusion_envs.runs.inception diffusion_envs.runs.precision_recall
diffusion_envs.runs.sample_quality
diffusion_envs.runs.distances diffusion_envs.runs.over_optimisation
diffusion_envs.runs.report_words diffusion_envs.runs.prompt_statistics
diffusion_envs.runs.report_pictures diffusion_envs.runs.report_prompts
diffusion_envs.runs.report_settings diffusion_envs.runs.report
diffusion_envs.runs.further_samples diffusion_envs.runs.run_frontier
diffusion_envs.runs.monitoring diffusion_envs.runs.resuming diffusion_envs.runs.refused
diffusion_envs.runs.exported
diffusion_envs.runs.model_card diffusion_envs.runs.publishing
diffusion_envs.runs.summary
diffusion_envs.runs.method_names diffusion_envs.runs.arguments
diffusion_envs.runs.estimate
diffusion_envs.runs.finetune diffusion_envs.runs.repeating diffusion_envs.runs.transfer
diffusion_envs.runs.presets
diffusion_envs.runs.option_words diffusion_envs.runs.command_line diffusion_envs.runs.fit
diffusion_envs.runs
diffusion_envs.tiny.captions diffusion_envs.tiny.train_classifier
diffusion_envs.tiny.train_autoencoder diffusion_envs.tiny.train_denoiser
diffusion_envs.tiny diffusion_envs.tiny.measure diffusion_envs.tiny.__main__
diffusion_envs.words.signs diffusion_envs.words.train_autoencoder
diffusion_envs.words.train_denoiser diffusion_envs.words diffusion_envs.words.measure
diffusion_envs.words.__main__
diffusion_envs.sd15.stable_diffusion
diffusion_envs.sd15 diffusion_envs.sd15.__main__
diffusion_envs.cifar10.networks diffusion_envs.cifar10.pretrain diffusion_envs.cifar10.family
diffusion_envs.cifar10.measure
diffusion_envs.cifar10 diffusion_envs.cifar10.__main__
verification verification.answers verification.statistics verification.planting
verification.shared_mistakes
verification.mistakes verification.claim
verification.tolerances verification.kernels verification.running verification.record
verification.symbolic
""".split()  # noqa: SIM905  # a list literal of fifty strings reads worse


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Every one of our modules that this source imports, at any depth of its functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in MODULES else base)
    return {name for name in found if name.split(".")[0] in PACKAGES}


def violations(source: str, module: str, is_package: bool = False) -> set[str]:
    """What this source imports without being allowed to."""
    place = MODULES.index(module)
    return {
        name
        for name in imported(source, module, is_package)
        if name not in MODULES[:place] and name != module and not _siblings(name, module)
    }


# Pieces of one kind that do not know each other, but for the few that all share: they are listed
# here, the others are those that there are.
FIRST = {
    "verification.closed_form": ["complex_steps", "extrapolation", "gaussian_law", "vp_gaussian"],
    "verification.problems": ["backward_induction"],
}
PIECES = {
    "verification.closed_form": "verification.cubature",
    "verification.problems": "",
    "verification.claims": "verification.measuring verification.coverage verification.margins "
    "verification.report "
    "verification.document verification.__main__",
}
for package, after in PIECES.items():
    folder = ROOT / package.replace(".", "/")
    inner = [p.relative_to(folder).with_suffix("") for p in folder.rglob("*.py")]
    stems = sorted(".".join(p.parts) for p in inner if p.name != "__init__")
    first = FIRST.get(package, [])
    names = [*first, *(stem for stem in stems if stem not in first)]
    packages = sorted({name.rpartition(".")[0] for name in names} - {""})
    whole = [f"{package}.{name}" for name in [*packages, *names]]
    # Problems start from what their package holds; what closed forms and claims are is in them.
    MODULES += [package, *whole] if package == "verification.problems" else [*whole, package]
    MODULES += after.split()


def _siblings(one: str, other: str) -> bool:
    return any(
        one.startswith(f"{package}.") and other.startswith(f"{package}.") for package in PIECES
    )


FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_modules_import_only_what_stands_before_them(path):
    module = module_name(path)
    assert module in MODULES, f"{module} has no place in the architecture"
    assert not violations(path.read_text(), module, path.name == "__init__.py")


def test_nothing_in_the_list_is_imaginary():
    assert set(MODULES) == {module_name(path) for path in FILES}


@pytest.mark.parametrize(
    "line",
    [
        "import diffusion_envs.denoising",
        "import ctrl.girsanov as g",
        "from ctrl import girsanov",
        "from ctrl.girsanov import path_kl",
        "from . import girsanov",
        "from .girsanov import path_kl",
        "def f():\n    from diffusion_envs.training import loop",
        "if True:\n    import verification",
    ],
)
def test_planted_violations_are_seen(line):
    assert violations(line, "ctrl.solvers")


def test_importing_ctrl_is_light():
    import subprocess
    import sys

    code = (
        "import sys, ctrl; heavy = "
        "{'diffusers', 'transformers', 'matplotlib', 'peft', 'torchsde'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
