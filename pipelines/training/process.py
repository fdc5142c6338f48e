"""What a training process needs around it: the environment DeepSpeed reads, threads, a device, seeds."""

from __future__ import annotations

import logging
import random
import warnings

import numpy as np
import ray.train.torch
import torch
import transformers

from pipelines.training.compiler import build_cpu_operator


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
