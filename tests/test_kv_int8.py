"""int8 pages: what goes in comes out within half a step, and a session over them resumes as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from atlas_client import Client
from atlas_kernels import kv
from conftest import Daemon
from families import make
from test_long_context import ids, turn


@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_a_value_is_off_by_half_a_step_at_most(spread: float) -> None:
    x = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(3)) * spread
    x[0, 0] = 0.0
    codes, scales = kv.quantize(x)
    assert (codes.dtype, scales.dtype, tuple(scales.shape)) == (torch.int8, torch.float16, (3, 50))
    off = (codes.float() * scales.float()[..., None] - x).abs()
    step = x.abs().amax(-1, keepdim=True) / 127
    rounded = step * 2**-11 * 127 + 2**-25 * 127  # the scale itself is rounded to float16
    assert bool((off <= 0.5 * step * (1 + 2**-10) + rounded).all())
    assert not codes[0, 0].any()


def test_huge_values_stay_finite() -> None:
    codes, scales = kv.quantize(torch.tensor([[3e38, -1e30, 0.0, 1.0]]))
    assert bool(torch.isfinite(scales).all())
    assert codes[0].tolist()[:2] == [127, -127]


def test_append_and_gather_are_inverse_for_each_type() -> None:
    generator = torch.Generator().manual_seed(5)
    key, value = torch.randn(2, 2, 5, 8, generator=generator)
    page, offset = torch.tensor([1, 1, 3, 3, 0]), torch.tensor([62, 63, 0, 1, 7])
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        values = torch.zeros(4, 2, 2, 64, 8, dtype=dtype)
        scales = torch.zeros(4, 2, 2, 64, dtype=torch.float16) if dtype is torch.int8 else None
        kv.append(values, scales, page, offset, key, value)
        both = kv.gather(values, scales, torch.tensor([3, 1]), torch.float32)
        assert tuple(both.shape) == (2, 2, 2, 64, 8)
        close = {torch.float32: 0.0, torch.bfloat16: 2e-2, torch.int8: 3e-2}[dtype]
        for which, wanted in enumerate((key, value)):
            assert float((both[which, :, 0, 0] - wanted[:, 2]).abs().max()) <= close
            assert float((both[which, :, 1, 63] - wanted[:, 1]).abs().max()) <= close


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon"])
def test_a_session_over_int8_pages_resumes_as_if_undisturbed(root: Path, family: str) -> None:
    model = make(family, root / "model", max_position_embeddings=4000)
    flags = ("--quant", "none", "--threads", "1", "--kv-dtype", "int8", "--prefill-chunk", "256")
    (root / "undisturbed").mkdir()
    other = Daemon(root / "undisturbed", *flags, model=str(model)).start()
    undisturbed = [turn(other, "one", ids(1500), 20), turn(other, "one", ids(60, seed=2), 20)]
    other.kill()
    daemon = Daemon(root, *flags, model=str(model))
    try:
        daemon.start()
        first = turn(daemon, "two", ids(1500), 20)
        daemon.kill()
        daemon.start()
        second = turn(daemon, "two", ids(60, seed=2), 20)
        assert [first[1], second[1]] == [each[1] for each in undisturbed]
        assert second[0].usage.restored == 1500 + 19
        with Client(daemon.socket) as client:
            found = client.status().model
        assert found is not None
        floats = {"llama": 3 * 2 * 2 * 32, "gemma2": 4 * 2 * 2 * 32, "falcon": 3 * 2 * 1 * 32}[family]
        assert found.kv_bytes_per_token == floats + 2 * floats // 32  # a byte each, two a vector
        daemon.kill()
        daemon.flags = [flag if flag != "int8" else "auto" for flag in daemon.flags]
        daemon.start()
        done, _ = turn(daemon, "two", ids(10, seed=3), 4)
        assert done.usage.restored == 0
        assert "another model, quantization or KV type" in done.reset_reason
    finally:
        daemon.kill()
