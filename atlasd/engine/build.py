"""Puts an engine together: threads, model, tiers, worker. Memory limits are checked before anything is allocated."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import psutil
import torch
import transformers
from atlas_client.errors import ErrorCode, ErrorReply
from atlas_kernels.dispatch import compiled
from atlas_tiers.base import BLOCK_TOKENS, KVStore, PageLayout
from atlas_tiers.disk import DiskConfig
from atlas_tiers.errors import StoreLocked, TooManyParts
from atlas_tiers.lanes import LanedStore, lane_directories, others_bytes, split_blocks
from atlas_tiers.store import TieredStore

from atlasd.config import Config

from . import selftest
from .link import Link
from .messages import EngineSpec
from .model import LoadedModel, Report, load
from .worker import Worker

log = logging.getLogger(__name__)

GIB = 1024**3
RAM_SHARE = 0.8  # of the available RAM that page pools may take
VRAM_SHARE = 0.85  # of the VRAM left after the weights, when --kv-vram-gb gives no figure


def build_worker(spec: EngineSpec, directory: Path, config: Config, link: Link, report: Report) -> Worker:
    """Loads the model in `directory` and opens the tiers. Raises ErrorReply."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    loaded = load(spec.model, directory, config, report)
    if loaded.device.type == "cpu":
        compiled()  # ten seconds or more the first time on a machine: now, not in the first request
    selftest.check(loaded)
    info = loaded.info
    log.info("%s on %s (%s), %d layers quantized", info.architecture, info.device, info.dtype, info.layers_quantized)
    return Worker(loaded, open_store(loaded, config), link, config)


def open_store(loaded: LoadedModel, config: Config) -> KVStore:
    """The tiers as configured. On a CPU without --kv-vram-gb the device pool takes the RAM budget; no RAM tier then."""
    on_cpu = loaded.device.type == "cpu"
    one_pool = on_cpu and not config.kv_vram_gb
    device_bytes = int(GIB * (config.kv_ram_gb if one_pool else config.kv_vram_gb))
    if not device_bytes and not on_cpu:
        device_bytes = _free_vram(loaded)
    host_bytes = 0 if one_pool or config.kv_vram_only else int(GIB * config.kv_ram_gb)
    if one_pool:
        device_bytes = min(device_bytes, int(RAM_SHARE * psutil.virtual_memory().available))
    _check_ram(host_bytes + (device_bytes if on_cpu else 0))
    lanes = loaded.layout.by_lane()
    blocks = split_blocks(lanes, device_bytes, loaded.max_context, config.prefill_chunk)
    if min(blocks) < 2:
        code = ErrorCode.OUT_OF_RAM if on_cpu else ErrorCode.OUT_OF_VRAM
        least = 2 * loaded.layout.page_bytes / GIB
        raise ErrorReply(
            code, f"the KV pool holds {min(blocks)} pages of {BLOCK_TOKENS} tokens; at least {least:.3f} GiB are needed"
        )
    try:
        return _open_lanes(loaded, lanes, blocks, host_bytes, config)
    except StoreLocked as error:
        raise ErrorReply(
            ErrorCode.INVALID_PARAMETER, str(error), "give every daemon a --kv-disk-path of its own"
        ) from None
    except TooManyParts as error:
        raise ErrorReply(ErrorCode.INVALID_PARAMETER, str(error), "start the daemon with --kv-disk-path none") from None


def _open_lanes(
    loaded: LoadedModel, lanes: list[PageLayout], blocks: list[int], host_bytes: int, config: Config
) -> KVStore:
    """A store for each kind of layers, the bytes of RAM and disk shared as the device's are."""
    sizes = [count * lane.page_bytes for count, lane in zip(blocks, lanes, strict=True)]
    page_sizes = [lane.page_bytes for lane in lanes]
    disks = _disks(config, page_sizes)
    event = threading.Event()
    stores: list[TieredStore] = []
    try:
        for n, lane in enumerate(lanes):
            stores.append(
                TieredStore(
                    lane,
                    bytes.fromhex(loaded.identity),
                    device_blocks=blocks[n],
                    host_bytes=int(host_bytes * sizes[n] / sum(sizes)),
                    disk=disks[n],
                    device=str(loaded.device),
                    policy=config.kv_policy,
                    event=event,
                )
            )
    except BaseException:
        for store in stores:
            store.close()
        raise
    return stores[0] if len(stores) == 1 else LanedStore(loaded.layout, stores)


def _disks(config: Config, page_sizes: list[int]) -> list[DiskConfig | None]:
    """Each lane's directory and its share of the cap; what models of the other kind left there counts."""
    directory = config.disk_dir
    if directory is None:
        return [None] * len(page_sizes)
    cap = int(GIB * config.kv_disk_gb)
    try:
        cap -= others_bytes(directory, len(page_sizes), cap)
    except OSError as error:
        log.warning("%s: %s", directory, error)  # the store says what follows from it
    paths = lane_directories(directory, len(page_sizes))
    return [
        DiskConfig(path, cap_bytes=int(cap * size / sum(page_sizes)))
        for path, size in zip(paths, page_sizes, strict=True)
    ]


def _free_vram(loaded: LoadedModel) -> int:
    return int(VRAM_SHARE * torch.cuda.mem_get_info(loaded.device)[0])


def _check_ram(wanted: int) -> None:
    available = psutil.virtual_memory().available
    if wanted > available:
        raise ErrorReply(
            ErrorCode.OUT_OF_RAM,
            f"KV pools of {wanted / GIB:.1f} GiB were asked for, {available / GIB:.1f} GiB are available",
        )
