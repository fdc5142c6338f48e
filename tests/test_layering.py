"""The rules of the house, read off the imports: jobs -> pipelines -> flashsloth, and nothing upwards.

Imports are read from the syntax tree, wherever they stand, so a late import inside a function counts as well.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.preparation.code import code_files

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("flashsloth", "pipelines", "jobs")

# What a core install brings: the model library has to make do with it.
CORE = {"torch", "transformers", "tokenizers", "huggingface_hub", "PIL", "numpy", "numba", "safetensors"}
# Rooms of pipelines that know nothing of each other; prepare, feed, training and serving put them together.
ROOMS = ("pipelines.corpora", "pipelines.shards", "pipelines.encode")
# What takes seconds and hundreds of megabytes to import. A job asks for it once its flags are read; these never do.
MODEL_LIBRARIES = ("torch", "transformers", "flashsloth")
LIGHT = ("pipelines.annotate", "pipelines.serve", "pipelines.serving.app", "pipelines.preparation.indexing")
# What the modules that decide a row import beside each other, and what decides neither a row nor a shard's bytes: what
# is told of them, how they are stored, and what a plan's identity holds anyhow.
DECIDE_NO_ROW = {
    *("flashsloth", "flashsloth.backbones", "flashsloth.collation", "pipelines", "pipelines.device_errors"),
    *(f"pipelines.preparation.{name}" for name in ("facts", "image_pins", "plan", "settings")),
    *(f"pipelines.shards.{name}" for name in ("integrity", "manifest", "receipts")),
    *("pipelines.ray_tasks", "pipelines.storage", "pipelines.storage.faults", "pipelines.storage.states"),
}
TOP_LEVEL = {
    *("flashsloth", "pipelines", "jobs", "cluster", "tests", "pyproject.toml", "README.md"),
    *("Makefile", "LICENSE", ".ci", ".github", ".gitignore", ".pre-commit-config.yaml"),
}


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, at_once: bool = False) -> Iterator[str]:
    """Full names of what `file` imports; `from a import b` gives both a and a.b, since b may be a module.

    With `at_once` only what is imported whenever the file is, and not by a function later.
    """
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def sources(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (REPOSITORY / package).rglob("*.py"))


@functools.cache
def at_once(file: Path) -> tuple[str, ...]:
    return tuple(imports_of(file, at_once=True))


def imported_with(module: str) -> set[str]:
    """Names of all that is imported whenever `module` is, of others than ours as they stand there."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        parts = waiting.pop().split(".")
        for name in (".".join(parts[:length]) for length in range(1, len(parts) + 1)):
            if name in found:
                continue
            found.add(name)
            path = REPOSITORY.joinpath(*name.split("."))
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if file.is_file() and not is_inside(name, "flashsloth"):
                    waiting.extend(at_once(file))
    return found


def violations(files: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{file.relative_to(REPOSITORY)} imports {name}"
        for file in files
        for name in imports_of(file)
        if any(is_inside(name, package) for package in forbidden)
    ]


def test_every_package_has_sources() -> None:
    """The rules below hold for nothing at all if the folders move."""
    for package in PACKAGES:
        assert sources(package), package


def test_the_model_library_imports_only_what_a_core_install_brings() -> None:
    allowed = CORE | set(sys.stdlib_module_names) | {"flashsloth"}
    found = [
        f"{file.relative_to(REPOSITORY)} imports {name}"
        for file in sources("flashsloth")
        for name in imports_of(file)
        if name.split(".")[0] not in allowed
    ]
    assert not found


def test_pipelines_never_import_jobs() -> None:
    assert not violations(sources("pipelines"), ("jobs",))


def test_nobody_imports_the_tests() -> None:
    assert not violations(sources(*PACKAGES), ("tests",))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_nothing_of_each_other(room: str) -> None:
    files = [file for file in sources("pipelines") if is_inside(module_name(file), room)]
    assert not violations(files, tuple(other for other in ROOMS if other != room))


@pytest.mark.parametrize("module", [*LIGHT, *(module_name(file) for file in sources("jobs"))])
def test_the_model_s_libraries_wait_until_they_are_needed(module: str) -> None:
    assert not imported_with(module) & set(MODEL_LIBRARIES)


def test_no_module_that_decides_a_row_is_missing_from_the_identity_of_the_code() -> None:
    """One that is split off another would decide rows unnoticed by a run that goes on."""
    files = code_files()
    ours = {module_name(file) for file in sources(*PACKAGES)}
    imported = {name for file in files for name in imports_of(file)} & ours
    assert imported - {module_name(file) for file in files} == DECIDE_NO_ROW


def test_what_is_imported_at_once_is_found_through_others() -> None:
    assert {"torch", "flashsloth", "pipelines.serving.prompts"} <= imported_with("pipelines.serving.service")


def test_the_import_reader_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    file = tmp_path / "pipelines" / "shards" / "reader.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ..corpora import spans\ndef late():\n    import jobs.train\n    from . import schema\n")
    assert {"pipelines.corpora", "pipelines.corpora.spans", "jobs.train", "pipelines.shards.schema"} <= set(
        imports_of(file)
    )


def test_the_model_library_imports_with_no_ray_installed() -> None:
    blocked = ("ray", "pyarrow", "pydantic", "deepspeed", "fsspec", "pipelines", "jobs")
    script = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\nimport flashsloth"
    run = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_clusters_are_described_without_python() -> None:
    assert not list((REPOSITORY / "cluster").rglob("*.py"))


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert not [file for file in sources(*PACKAGES, "tests") if file.name in drawers]


def test_source_files_stay_readable_in_one_sitting() -> None:
    long = {str(f.relative_to(REPOSITORY)): len(f.read_text().splitlines()) for f in sources(*PACKAGES)}
    assert not {name: lines for name, lines in long.items() if lines > 400}


def test_the_top_level_is_fixed() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no git checkout: what is tracked cannot be told from what was built")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert {name.split("/")[0] for name in tracked.stdout.split("\0") if name} <= TOP_LEVEL
