"""The operator that DeepSpeed's communication needs on a CPU, and its compiler. Imports torch only to compile."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path


class CompilerError(ValueError):
    """DeepSpeed's CPU operator cannot be built here; the message says what to install."""


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
