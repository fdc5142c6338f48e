"""What a training process needs around it: the environment DeepSpeed reads, a compiler where there is no GPU."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import ray.train.torch
import torch
import transformers


class CompilerError(ValueError):
    """DeepSpeed's CPU operator cannot be built here; the message says what to install."""


def worker_environment(cpus_per_worker: int, on_gpu: bool) -> dict[str, str]:
    """Environment variables that must be set before a worker imports torch and DeepSpeed."""
    environment = {
        "OMP_NUM_THREADS": str(cpus_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # prints every line a second time, through a logger
    }
    if not on_gpu:
        # DeepSpeed chooses its accelerator when it is imported; with a CUDA build of torch it would choose CUDA.
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        # By default glibc gives each step's activations back and faults them in anew at the next: 7 % of a tiny step.
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    return environment


def prepare_process(cpus_per_worker: int, on_gpu: bool) -> torch.device:
    """Set threads and the device of this worker, and quieten what no one acts on."""
    torch.set_num_threads(cpus_per_worker)
    # DeepSpeed 0.19 calls collectives that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    transformers.utils.logging.disable_progress_bar()
    # Ray Train sets the root logger to INFO and reports each checkpoint through it, from every rank.
    logging.getLogger().setLevel(logging.WARNING)
    if on_gpu:
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
        return device
    build_cpu_operator()
    return torch.device("cpu")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of seed, step and rank: a resumed run then draws what the uninterrupted one drew."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def seed_start(seed: int) -> None:
    """Seed what new parameters are drawn from; the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_cpu_operator() -> None:
    """Compile the operator that DeepSpeed's communication needs on a CPU; later calls find it compiled.

    Raises:
        CompilerError: A compiler, ninja or Python's headers are missing.
    """
    # ninja comes from a wheel, into the folder of this interpreter, which need not be on PATH.
    tools = os.path.dirname(sys.executable)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([tools, os.environ.get("PATH", "")])
    require_compiler()
    from deepspeed.accelerator import get_accelerator

    folder = _own_build_folder()
    with (folder / "flashsloth.lock").open("w") as held:
        # Two ranks of one machine would race for the build. torch's own lock is a file that a killed process leaves
        # behind, on which all later ones then wait for ever; this one dies with its holder. Nobody else builds in this
        # folder, so whoever holds it knows that torch's is left over.
        fcntl.flock(held, fcntl.LOCK_EX)
        for left_over in folder.glob("*/lock"):
            left_over.unlink()
        if not any(folder.glob("*/*.so")):
            print("compiling DeepSpeed's CPU operator (once, about half a minute)", flush=True)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


def _own_build_folder() -> Path:
    """Where torch compiles for this environment from now on, and for no other.

    Compilers are given the paths of the environment, so two that share a folder rebuild what the other one has built.
    """
    from torch.utils.cpp_extension import _get_build_directory

    name = f"flashsloth-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}"
    folder = Path(_get_build_directory("deepspeed_shm_comm", False)).parent
    if folder.name != name:
        folder /= name
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_compiler() -> None:
    """Raise `CompilerError` unless a C++ extension can be compiled here."""
    compiler = os.environ.get("CXX", "c++")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    missing = []
    if shutil.which(compiler) is None:
        missing.append(f"a C++ compiler ({compiler}; Debian and Ubuntu: apt-get install g++)")
    if shutil.which("ninja") is None:
        missing.append("ninja (pip install ninja)")
    if not headers.exists():
        missing.append(f"Python's headers ({headers}; Debian and Ubuntu: apt-get install python3-dev)")
    if missing:
        raise CompilerError("training on the CPU compiles an operator of DeepSpeed; missing: " + "; ".join(missing))
