"""How much memory the cache of a batch may take."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def cache_budget(device: torch.device, memory_gb: float | None) -> int:
    """Bytes: memory_gb x 10**9 if given, else half of the free host memory, or 0.8 of the GPU's."""
    if memory_gb is not None:
        return int(memory_gb * 1e9)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(0.8 * free)
    return available_memory() // 2


def available_memory() -> int:
    """Bytes this process may still take: the machine's, or its container's where less."""
    available = 4 * 10**9
    meminfo = _read("/proc/meminfo")
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for limit_path, usage_path in _CGROUPS:
        limit, usage = _read(limit_path).strip(), _read(usage_path).strip()
        if limit.isdigit() and usage.isdigit():
            available = min(available, max(int(limit) - int(usage), 0))
    return available


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
