"""What this machine has: cards, their memory, the CPU, and which dtype it computes in best.

Knows NVML, torch's view of CUDA, psutil and the CPU's instruction sets; changes no setting of a
card. Doesn't know models, profiles or what any of the memory is for.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pynvml
import torch

from .errors import HardwareError

MIB = 1 << 20
GIB = 1 << 30

BF16_INSTRUCTIONS = {
    "amx_bf16": "AMX-BF16",
    "avx512_bf16": "AVX512-BF16",
    "bf16": "Arm BF16",
}
"""Capability names of torch, best first, whose CPUs multiply bfloat16 natively."""

_CGROUP = Path("/sys/fs/cgroup")

T = TypeVar("T")


@dataclass(frozen=True)
class Card:
    """One NVIDIA card.

    index: NVML's, in PCI order; CUDA_VISIBLE_DEVICES may make torch count differently
    compute_capability: (major, minor), or None if the driver doesn't say
    total_mib, free_mib: MiB, or None where the driver doesn't say (cards that share host memory)
    tensor_cores: number formats that its tensor cores multiply, or "none"
    memory_bandwidth_gb_per_s: theoretical, 1e9 bytes per second, or None if unknown
    driver: version of the NVIDIA driver, or None if NVML could not be asked
    """

    index: int
    name: str
    compute_capability: tuple[int, int] | None
    total_mib: int | None
    free_mib: int | None
    tensor_cores: str
    memory_bandwidth_gb_per_s: float | None
    driver: str | None


@dataclass(frozen=True)
class CpuFacts:
    """The CPU and host memory that this process may use.

    logical_cores: those in the process's affinity mask
    total_gib, available_gib: GiB, the control group's limit included
    bf16: bfloat16 products are native, not emulated
    """

    model: str
    physical_cores: int
    logical_cores: int
    total_gib: float
    available_gib: float
    bf16: bool
    avx512: bool


def cards() -> list[Card]:
    """All NVIDIA cards of the machine, also ones that torch can't use; see `why_no_gpu`."""
    try:
        with _nvml():
            driver = str(pynvml.nvmlSystemGetDriverVersion())
            return [_nvml_card(i, driver) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        # Some systems have CUDA without NVML.
        return [_torch_card(i) for i in range(torch.cuda.device_count())] if _cuda() else []


def why_no_gpu() -> str | None:
    """Why torch can't compute on a GPU here and what would change that; None if it can."""
    if _cuda():
        return None
    try:
        with _nvml():
            driver = str(pynvml.nvmlSystemGetDriverVersion())
            count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return (
            f"no NVIDIA driver answers ({error}). Install the driver if this machine has an NVIDIA "
            "card, and start a container with --gpus all."
        )
    if not count:
        return f"the NVIDIA driver {driver} is there and sees no card."
    if torch.version.cuda is None:
        return (
            f"the NVIDIA driver {driver} is there, and this torch ({torch.__version__}) is a build "
            "without CUDA. Install a CUDA build: https://pytorch.org/get-started/locally/"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every card. Unset it."
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and can't start it with "
        f"the NVIDIA driver {driver} (CUDA_VISIBLE_DEVICES: {visible!r}). Update the driver, or "
        "install a torch built for an older CUDA."
    )


def tensor_core_formats(capability: tuple[int, int] | None, name: str = "") -> str:
    """Formats that tensor cores of a compute capability multiply (CUDA programming guide)."""
    if capability is None:
        return "unknown"
    # The GTX 16 series is Turing (7.5) without tensor cores.
    if capability < (7, 0) or "GTX 16" in name:
        return "none"
    if capability < (8, 0):
        return "fp16"
    if capability < (8, 9):
        return "fp16, bf16, tf32"
    if capability < (10, 0):
        return "fp16, bf16, tf32, fp8"
    return "fp16, bf16, tf32, fp8, fp4"


def fast_bf16() -> str | None:
    """The instruction set that multiplies bfloat16 natively here, or None.

    `torch.ops.mkldnn._is_mkldnn_bf16_supported` alone is not enough: it is true on any AVX-512
    CPU, where oneDNN emulates bfloat16 and is slower than in float32.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    capabilities = _capabilities()
    return next((text for flag, text in BF16_INSTRUCTIONS.items() if capabilities.get(flag)), None)


def cpu_facts() -> CpuFacts:
    """The CPU and the host memory as they are now."""
    capabilities = _capabilities()
    logical = psutil.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        logical = len(os.sched_getaffinity(0))
    total, available = _host_memory()
    return CpuFacts(
        model=str(capabilities.get("cpu_name") or platform.processor() or platform.machine()),
        physical_cores=min(psutil.cpu_count(logical=False) or logical, logical),
        logical_cores=logical,
        total_gib=total / GIB,
        available_gib=available / GIB,
        bf16=fast_bf16() is not None,
        avx512=bool(capabilities.get("avx512_f")),
    )


def resolve_device(asked: str) -> str:
    """`auto` settled, and any other device that can be used, as it is: `cpu`, `cuda` or `cuda:N`.

    Raises `HardwareError` for a GPU that was asked for and can't be used.
    """
    if asked == "auto":
        return "cuda" if cards() and why_no_gpu() is None else "cpu"
    if asked != "cpu" and (reason := why_no_gpu()):
        raise HardwareError(f"--device {asked}: {reason} See python -m libortho check-gpu.")
    return asked


def device_name(device: str) -> str:
    """What a device is called in results: `cpu`, or the card's name."""
    if device == "cpu":
        return "cpu"
    found = cards()
    index = int(device.partition(":")[2] or 0)
    return found[index].name if index < len(found) else device


def default_compute_dtype(device: str | torch.device) -> tuple[torch.dtype, str]:
    """The floating-point type to compute in on a device, and the reason in words.

    Raises `HardwareError` for a CUDA device that torch can't use.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if (reason := why_no_gpu()) is not None:
            raise HardwareError(
                f"The device {device} was asked for, and there is no usable GPU: {reason} Or run "
                "with --device cpu."
            )
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"auto-detected: compute capability {major}.{minor} has bfloat16"
        return torch.float16, f"auto-detected: compute capability {major}.{minor} has no bfloat16"
    if device.type == "cpu" and (instructions := fast_bf16()) is not None:
        return torch.bfloat16, f"auto-detected: the CPU has {instructions}"
    if device.type == "cpu":
        return torch.float32, "auto-detected: the CPU has no native bfloat16"
    return torch.float32, f"float32 is the safe choice on {device.type}"


def reset_peak(device: str | torch.device) -> None:
    """Start a new measurement of `peak_mib`; does nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mib(device: str | torch.device) -> float | None:
    """Most MiB that torch reserved on a CUDA device since `reset_peak`; None on a CPU.

    A CPU has no such counter: the peak of the resident set is the whole process's and can't be
    reset, so it can't be given to one arm of a comparison. See `process_peak_rss_mib`.
    """
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.max_memory_reserved(device) / MIB


def process_peak_rss_mib() -> float:
    """Most MiB of host memory that this process held at once since it started."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / MIB
    import resource  # noqa: PLC0415 - not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def free_bytes(device: str | torch.device) -> int:
    """Memory that can still be had on a CUDA device, or on the host for any other one.

    On a CUDA device what torch has reserved and doesn't use counts, and a cap on the process's
    memory is heeded: the driver knows nothing of it.
    """
    if torch.device(device).type != "cuda":
        return _host_memory()[1]
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    free, total = torch.cuda.mem_get_info(index)
    allocated = torch.cuda.memory_allocated(index)
    unused = torch.cuda.memory_reserved(index) - allocated
    cap = total * torch.cuda.get_per_process_memory_fraction(index)
    return max(0, min(free + unused, int(cap) - allocated))


def release_memory() -> None:
    """Collect garbage, and give torch's cached GPU memory back if CUDA was started."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _cuda() -> bool:
    return torch.cuda.is_available()


@contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _asked(question: Callable[..., T], *arguments: Any) -> T | None:
    """An answer of NVML, or None where this card or driver doesn't give it."""
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None


def _nvml_card(index: int, driver: str) -> Card:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = str(_asked(pynvml.nvmlDeviceGetName, handle) or "unknown")
    found = _asked(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    capability = None if found is None else (int(found[0]), int(found[1]))
    memory = _asked(pynvml.nvmlDeviceGetMemoryInfo, handle)
    clock_mhz = _asked(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM)
    bus_bits = _asked(pynvml.nvmlDeviceGetMemoryBusWidth, handle)
    # Two transfers a clock: NVML's memory clock is that of a double data rate.
    bandwidth = 2 * clock_mhz * 1e6 * bus_bits / 8 / 1e9 if clock_mhz and bus_bits else None
    return Card(
        index=index,
        name=name,
        compute_capability=capability,
        total_mib=None if memory is None else int(memory.total) // MIB,
        free_mib=None if memory is None else int(memory.free) // MIB,
        tensor_cores=tensor_core_formats(capability, name),
        memory_bandwidth_gb_per_s=bandwidth,
        driver=driver,
    )


def _torch_card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    capability = (int(properties.major), int(properties.minor))
    free, total = torch.cuda.mem_get_info(index)
    return Card(
        index=index,
        name=properties.name,
        compute_capability=capability,
        total_mib=total // MIB,
        free_mib=free // MIB,
        tensor_cores=tensor_core_formats(capability, properties.name),
        memory_bandwidth_gb_per_s=None,
        driver=None,
    )


def _capabilities() -> dict[str, Any]:
    # Empty on a torch that can't tell; nothing is then assumed of the CPU.
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def _host_memory() -> tuple[int, int]:
    """Total and available bytes: the machine's, or the container's where that is less."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or the limit is the word "max"
        return total, available
    return min(total, limit), max(0, min(available, limit - used))
