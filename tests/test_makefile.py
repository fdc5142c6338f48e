"""The Makefile says what is missing instead of failing somewhere inside pip."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """What `make setup` reads, and nothing else."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def put_command(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    command = folder / name
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    return command


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_an_old_python_is_refused(bare: Path) -> None:
    old = put_command(bare / "bin", "old-python", '[ "$1" = --version ] && echo Python 3.10.4; exit 1')
    run = make(bare, "setup", f"PYTHON={old}")
    assert run.returncode != 0
    assert "Python 3.11 or newer is needed" in run.stderr + run.stdout
    assert "Python 3.10.4" in run.stderr + run.stdout
    assert not (bare / ".venv").exists()


def test_a_missing_compiler_is_named(bare: Path) -> None:
    good = put_command(bare / "bin", "good-python", "exit 0")
    for tool in ("sh", "make", "uname"):
        (bare / "bin" / tool).symlink_to(shutil.which(tool))
    run = make(bare, "setup", f"PYTHON={good}", PATH=str(bare / "bin"))
    assert run.returncode != 0
    assert "no C++ compiler" in run.stderr + run.stdout
    assert not (bare / ".venv").exists()


def test_a_torch_that_pip_cannot_find_gets_advice(bare: Path) -> None:
    """And leaves no stamp, so that the next `make` tries again."""
    failing_pip = 'printf "#!/bin/sh\\nexit 1\\n" > .venv/bin/python && chmod +x .venv/bin/python'
    make_venv = f'[ "$2" = venv ] && mkdir -p .venv/bin && {failing_pip}; exit 0'
    good = put_command(bare / "bin", "good-python", make_venv)
    run = make(bare, "setup", f"PYTHON={good}", "TORCH=torch==0.0.0+none")
    assert run.returncode != 0
    assert "pip could not install torch==0.0.0+none" in run.stderr + run.stdout
    assert "make TORCH=torch==" in run.stderr + run.stdout
    assert not (bare / ".venv" / ".installed").exists()


@pytest.mark.parametrize(("gpu", "torch"), [(False, "torch=={}+cpu"), (True, "torch=={}")])
def test_cuda_wheels_are_installed_only_beside_a_gpu(bare: Path, gpu: bool, torch: str) -> None:
    for tool in ("sh", "make", "uname"):
        put_command(bare / "bin", tool, f'exec {shutil.which(tool)} "$@"')
    if gpu:
        put_command(bare / "bin", "nvidia-smi", "exit 0")
    run = make(bare, "--dry-run", "setup", PATH=str(bare / "bin"))
    version = next(
        line.split(":= ")[1] for line in (bare / "Makefile").read_text().splitlines() if "TORCH_VERSION :=" in line
    )
    assert f"'{torch.format(version)}'" in run.stdout
    assert f'"torch=={version}"' in (bare / "pyproject.toml").read_text()
