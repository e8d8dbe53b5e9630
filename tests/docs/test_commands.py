"""Commands that would not do are seen, and none is carried out."""

from importlib.util import cache_from_source
from pathlib import Path

import pytest

from tests.docs import commands


@pytest.mark.parametrize(
    "command",
    [
        "python -m diffusion_envs.sd15 --no-such-option 1 --output runs/x",
        "python -m diffusion_envs.sd15 --updates three --output runs/x",
        "python -m diffusion_envs.sd15 evaluate runs/x --steps ten",
        "python -m diffusion_envs.rewards no-such-command",
        "python -m verification --no-such-option",
        "python -m benchmarks.no_such_module",
        "python -m benchmarks.leaderboard --problem no-such-problem",
        "python -m benchmarks.faults --no-such-option",
        "python -m no_such_program",
        "python no_such_script.py",
        "python -m pytest tests/no_such_test.py",
        "make no-such-target",
        "make demo NO_SUCH_VARIABLE=1",
        "torchrun --no-such-option -m diffusion_envs.sd15 --output runs/x",
        "torchrun --nproc-per-node 2 -m diffusion_envs.sd15 --no-such-option --output runs/x",
        "accelerate launch --no-such-option -m diffusion_envs.sd15 --output runs/x",
        "pip install .[no-such-extra]",
        "no-such-program",
        "cat no-such-file",
    ],
)
def test_what_would_fail_is_refused(command, tmp_path, capsys):
    with pytest.raises(commands.NotACommandError):
        commands.check(command, tmp_path)
    capsys.readouterr()


@pytest.mark.parametrize(
    "command",
    [
        "OMP_NUM_THREADS=1 python -m diffusion_envs.sd15 --updates 3 --output runs/x",
        "python -m diffusion_envs.sd15 --objective grpo --group 8 --clip 0.5 --output runs/x",
        "python -m diffusion_envs.sd15 evaluate runs/x --steps 10 25",
        "python -m diffusion_envs.rewards list",
        "python -m verification --claim path-kl",
        "python -m benchmarks.faults processes --sample",
        "python -m benchmarks.peers --help",
        "torchrun --nproc-per-node 2 -m diffusion_envs.sd15 --updates 3 --output runs/x",
        "make demo REWARD=jpeg-compressibility OUTPUT=runs/jpeg",
        "pip install .[gym,plots]",
    ],
)
def test_what_would_do_is_read_and_not_done(command, tmp_path, capsys):
    commands.check(command, tmp_path)
    capsys.readouterr()
    assert not list(tmp_path.iterdir())


def test_no_code_is_kept_that_only_a_process_with_the_import_hook_can_run(tmp_path, capsys):
    kept = Path(cache_from_source(str(commands.ROOT / "diffusion_envs/rewards/__main__.py")))
    kept.unlink(missing_ok=True)
    commands.check("python -m diffusion_envs.rewards list", tmp_path)
    capsys.readouterr()
    assert not kept.is_file() or b"Typechecker" not in kept.read_bytes()


def test_a_block_is_its_commands():
    source = "# a comment\nmake demo   # why\npython -m a \\\n    --b c && make test\n$ make lint\n"
    assert list(commands.commands(source)) == [
        "make demo",
        "python -m a      --b c",
        "make test",
        "make lint",
    ]
