"""The README's commands are the ones that run: each is checked against the Makefile, the jobs and the recipes."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashsloth.configuration_flashsloth import FlashSlothConfig
from flashsloth.modeling_flashsloth import PARTS
from jobs.convert import main as convert
from jobs.evaluate import EvaluateSettings
from jobs.serve import ServeSettings
from pipelines.annotation.settings import AnnotateSettings
from pipelines.preparation.settings import PrepareSettings
from pipelines.settings import load_settings
from pipelines.training.settings import TrainSettings
from tests.flashsloth.test_modeling import count_parts

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = {
    "jobs/prepare.py": PrepareSettings,
    "jobs/train.py": TrainSettings,
    "jobs/serve.py": ServeSettings,
    "jobs/evaluate.py": EvaluateSettings,
    "jobs/annotate.py": AnnotateSettings,
}

SUBCOMMANDS = {
    "jobs/prepare.py": ("verify", "inspect", "gc"),
    "jobs/benchmark.py": ("data", "train", "serve", "annotate"),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(first: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == first]


def test_every_command_is_of_a_kind_that_is_checked() -> None:
    """Nothing in the README escapes the tests below."""
    total = sum(len([line for line in block.splitlines() if line.strip()]) for block in blocks("bash"))
    assert total == sum(len(commands(word)) for word in ("make", "python", "ray"))


@pytest.mark.parametrize("command", commands("make"), ids=" ".join)
def test_make_targets_exist(command: list[str]) -> None:
    subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=60)


def job_commands() -> list[list[str]]:
    submitted = [words[words.index("--") + 1 :] for words in commands("ray") if "--" in words]
    return [words[1:] for words in [*commands("python"), *submitted]]


@pytest.mark.parametrize("command", job_commands(), ids=" ".join)
def test_jobs_take_these_recipes_and_flags(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parsed by the models that the job itself uses: a renamed field or a missing recipe fails here."""
    monkeypatch.chdir(ROOT)
    script, *arguments = command
    assert (ROOT / script).is_file()
    if arguments[0] in SUBCOMMANDS.get(script, ()):
        main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
        with pytest.raises(SystemExit) as stopped:
            main([arguments[0], "--help"])
        assert stopped.value.code == 0
        assert arguments[0] in capsys.readouterr().out
    else:
        load_settings(SETTINGS[script], arguments)


@pytest.mark.parametrize(
    "script", sorted({*SETTINGS, "jobs/benchmark.py", "jobs/convert.py", "jobs/quickstart.py", "jobs/report.py"})
)
def test_jobs_run_as_scripts_and_explain_themselves(script: str) -> None:
    shown = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert "usage:" in shown.stdout


def test_the_library_example_answers(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second Python block, run as it stands; only the checkpoint is a smaller one."""
    (example,) = (block for block in blocks("python") if "from_pretrained" in block)
    monkeypatch.chdir(tmp_path)
    export = tmp_path / "outputs/quickstart/runs/instruct/export"
    export.parent.mkdir(parents=True)
    export.symlink_to(tiny_checkpoint)
    Image.fromarray(np.full((90, 120, 3), 200, np.uint8)).save("picture.png")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_files_that_the_readme_names_exist() -> None:
    for name in set(re.findall(r"`((?:flashsloth|pipelines|jobs|cluster|tests)/[\w./-]+)`", README)):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"`([\w-]+\.yaml)`", README)):
        assert (ROOT / "jobs" / "recipes" / name).exists(), name


def test_the_table_of_parameters_is_the_model_s() -> None:
    counts = count_parts(FlashSlothConfig.base())
    section = README.split("\n## The model\n")[1].split("\n## ")[0]
    rows = [int(n.replace(",", "")) for n in re.findall(r"^\| [^|]+ \| ([\d,]{5,}) \|", section, flags=re.MULTILINE)]
    assert rows == [*(counts[part] for part in PARTS), sum(counts.values())]


def test_convert_is_the_command_that_the_flow_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "`jobs/convert.py`" in README
    assert convert(["--reference", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "config.json is missing" in capsys.readouterr().err
