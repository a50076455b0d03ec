"""Habits of the repository: packages, pins, paths and documents agree with each other."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SPARE = ("kernels", "tiers", "packaging", "systemd", "tests")  # names that installed packages use too


def project(path: str = "pyproject.toml") -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def normal(requirement: str) -> str:
    """The name of a requirement as indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9_.-]", requirement)[0]).lower()


def test_every_package_is_listed() -> None:
    setuptools = project()["tool"]["setuptools"]
    places = {name: setuptools["package-dir"].get(name, name.replace(".", "/")) for name in setuptools["packages"]}
    client = project("clients/python/pyproject.toml")["tool"]["setuptools"]["packages"]
    places |= {name: "clients/python/" + name.replace(".", "/") for name in client}
    found = {path.parent.relative_to(ROOT).as_posix() for path in tracked("*/__init__.py")}
    assert found == set(places.values())


@pytest.mark.parametrize("name", SPARE)
def test_folders_that_would_shadow_a_package_are_none(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.slow
def test_the_wheel_holds_daemon_and_model_and_nothing_else(tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    for path in tracked("pyproject.toml", "README.md", "LICENSE", "atlasd", "kernels", "tiers", "packaging", "tests"):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        copy,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    listed = {path.relative_to(ROOT).as_posix() for path in tracked("atlasd/*.py", "atlasd/**/*.py")}
    assert listed <= names
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja", "LICENSE-PSF.txt"):
        assert f"atlas_demo_model/{name}" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "atlasd",
        "atlas_tiers",
        "atlas_kernels",
        "atlas_demo_model",
    }
    assert not [name for name in names if "training/" in name or "/test_" in name]


def test_every_requirement_is_pinned() -> None:
    client = project("clients/python/pyproject.toml")["project"]
    daemon = project()["project"]
    wanted = daemon["dependencies"] + daemon["optional-dependencies"]["dev"] + client["dependencies"]
    wanted += client["optional-dependencies"]["cli"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    pinned = {normal(line): line for line in lines}
    assert {normal(name) for name in wanted} - {"atlas-client"} <= set(pinned)
    assert pinned["torch"] == "torch==2.13.0"
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda", "triton"))]


def test_no_file_names_a_machine() -> None:
    private = re.compile(rb"/(?:home|Users)/[a-z][\w-]*/|/root/|/work/|/tmp/(?:venv|tmp\.)|/opt/(?:wheels|pypi)")
    self = Path(__file__).resolve()
    text = [path for path in tracked() if path.suffix not in {".safetensors", ".u16"} and path.resolve() != self]
    assert [path for path in text if private.search(path.read_bytes())] == []


def documents() -> list[Path]:
    return tracked("*.md")


def test_every_make_target_that_is_mentioned_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in documents():
        code = re.findall(r"`(make [^`]*)`|^(make .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        for line in ("".join(pair) for pair in code):
            words = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word and word[0] != "["]
            assert set(words) <= targets, f"{path.name}: {line}"


def test_every_file_that_a_document_links_to_exists() -> None:
    for path in documents():
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert "://" in link or (path.parent / link).exists(), f"{path.name} links to {link}"


def test_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_readme_lists_every_option() -> None:
    """The section "## Options" holds a table; its first column names flags."""
    from atlasd.config import keys

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Options\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no section '## Options'"
    rows = [line.split("|")[1] for line in section[1].splitlines() if line.startswith("|")]
    flags = {flag for cell in rows for flag in re.findall(r"--([a-z][a-z-]*)", cell)}
    assert flags - {"config", "help", "version"} == {key.name.replace("_", "-") for key in keys()}


def test_the_changelog_has_this_version() -> None:
    assert project()["project"]["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert project()["project"]["version"] == project("clients/python/pyproject.toml")["project"]["version"]
