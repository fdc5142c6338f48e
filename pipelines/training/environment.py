"""With what a run was made: machines, libraries and the commit."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

_LIBRARIES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "pillow")


def environment_facts() -> dict[str, str]:
    """Machine, interpreter, libraries and, in a git checkout, the commit."""
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{library: version(library) for library in _LIBRARIES},
    }
    if torch.version.cuda:
        facts["CUDA"] = torch.version.cuda
    commit = _commit()
    return facts | {"commit": commit} if commit else facts


def machine_name(device: torch.device) -> tuple[str, str]:
    """The name of this machine, and what computes in it."""
    if device.type == "cuda":
        return socket.gethostname(), torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return socket.gethostname(), f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""  # no git, or not a checkout: an installed package
    return f"{commit} with local changes" if changed.strip() else commit
