"""How the CPU kernels are compiled, kept, checked and done without."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from atlas_client.cli.doctor import kernels
from atlas_kernels.cpu import library as made
from atlas_kernels.cpu.library import Library, Unavailable, find, find_compiler, obtain

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return obtain(tmp_path_factory.mktemp("cache") / "kernels")


@pytest.fixture
def cache(built: Path, tmp_path: Path) -> Path:
    """A cache of its own with a copy of the library."""
    place = tmp_path / "kernels"
    place.mkdir(mode=0o700)
    shutil.copy2(built, place / built.name)
    return place


@needs_compiler
@pytest.mark.parametrize("compiler", made.COMPILERS)
def test_the_source_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    strict = ["-Wall", "-Wextra", "-Werror", "-o", str(tmp_path / "out.so"), str(made.HERE / "atlas.cpp")]
    done = subprocess.run([compiler, *made.FLAGS, *strict], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@needs_compiler
def test_what_is_built_is_private_named_by_content_and_used_again(built: Path) -> None:
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    assert sorted(path.name for path in built.parent.iterdir()) == [built.name, "lock"]
    before = built.stat().st_mtime_ns
    assert obtain(built.parent) == built
    assert built.stat().st_mtime_ns == before
    assert Library(built).best >= made.Level.PORTABLE


@needs_compiler
def test_another_source_has_another_name(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made.HERE, source)
    with (source / "atlas.cpp").open("a") as file:
        file.write("// changed\n")
    made._stem.cache_clear()
    monkeypatch.setattr(made, "HERE", source)
    try:
        assert find(cache, find_compiler()) is None
        assert find(cache, None) is None
    finally:
        made._stem.cache_clear()


@needs_compiler
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "more"])
def test_a_damaged_library_is_never_loaded(cache: Path, built: Path, damage: str) -> None:
    path = cache / built.name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-1], "empty": b"", "more": data + b"x"}.get(damage, bytes(data)))
    assert find(cache, find_compiler()) is None
    assert find(cache, None) is None
    if damage == "flip":
        assert obtain(cache) == path  # compiled again
        assert Library(path).best >= made.Level.PORTABLE


@needs_compiler
def test_two_processes_at_once_make_one_library(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "atlas_kernels.cpu.library"]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=280)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(said) == 1
    path = Path(said.pop())
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, "lock"]
    assert find(path.parent, find_compiler()) == path


@needs_compiler
def test_a_cache_that_others_can_write_to_is_refused(cache: Path) -> None:
    cache.chmod(0o777)
    assert find(cache, find_compiler()) is None
    with pytest.raises(Unavailable, match="chmod 700"):
        obtain(cache)
    cache.chmod(0o700)
    cache.parent.chmod(0o777)
    with pytest.raises(Unavailable, match="others can write"):
        obtain(cache)
    cache.parent.chmod(0o1777)  # as /tmp: nobody can put another directory in its place
    assert find(cache, find_compiler()) is not None


@needs_compiler
def test_a_link_is_not_followed(cache: Path, built: Path) -> None:
    (cache / built.name).unlink()
    (cache / built.name).symlink_to(built)
    assert find(cache, find_compiler()) is None


@needs_compiler
@pytest.mark.parametrize("place", ["/proc/self/atlas", "file"])
def test_a_cache_that_cannot_be_made(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="writable"):
        obtain(tmp_path / place / "kernels")


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_cache_still_serves_what_it_has(cache: Path, built: Path) -> None:
    cache.chmod(0o500)
    assert obtain(cache) == cache / built.name
    cache.chmod(0o700)
    (cache / built.name).unlink()
    cache.chmod(0o500)
    with pytest.raises(Unavailable, match="writable"):
        obtain(cache)


def test_without_a_compiler_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler.*apt install") as caught:
        obtain(tmp_path / "kernels")
    assert "g++" in caught.value.next_step
    assert not (tmp_path / "kernels").exists()
    said = kernels()
    assert (said.state, said.mend) == ("warning", "`sudo apt install g++`")
    assert "no C++ compiler" in said.found


FALLBACK = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout)
from atlas_kernels.dispatch import quantized_linear
from atlas_kernels.reference import linear
from atlasd.quant.formats import Recipe
from atlasd.quant.quantize import quantize
weight, x = quantize(torch.randn(40, 200), Recipe()).weight, torch.randn(2, 200)
for _ in range(3):
    assert torch.allclose(quantized_linear(x, weight, None), linear(x, weight, None), atol=1e-4)
"""


def test_without_a_compiler_linear_layers_run_in_torch_and_it_is_said_once(tmp_path: Path) -> None:
    env = os.environ | {"PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FALLBACK], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no C++ compiler") == 1


@needs_compiler
def test_without_a_compiler_what_was_built_is_used(monkeypatch: pytest.MonkeyPatch, cache: Path, built: Path) -> None:
    monkeypatch.setenv("PATH", "")
    assert obtain(cache) == cache / built.name


@needs_compiler
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "g++").write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho "cannot do that" >&2\nexit 1\n')
    (tools / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(Unavailable, match="cannot do that"):
        obtain(tmp_path / "kernels")
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == ["lock"]


def test_the_library_module_imports_no_torch() -> None:
    code = "import sys, atlas_kernels.cpu.library; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
