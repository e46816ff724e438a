"""What `libortho.hardware` reports, on machines that are made up through NVML and torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch

from libortho import hardware
from libortho.errors import HardwareError

RTX_4050 = {
    "name": "NVIDIA GeForce RTX 4050 Laptop GPU",
    "capability": (8, 9),
    "total_mib": 6141,
    "free_mib": 5800,
    "clock_mhz": 8001,
    "bus_bits": 96,
}
H200 = {
    "name": "NVIDIA H200",
    "capability": (9, 0),
    "total_mib": 143_771,
    "free_mib": 143_000,
    "clock_mhz": 3201,
    "bus_bits": 6144,
}


@pytest.fixture
def install_cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make NVML report these cards; a missing key is an answer that the driver refuses."""
    calls = SimpleNamespace(shutdowns=0)

    def install(*cards: dict[str, Any]) -> SimpleNamespace:
        def answer(key: str, position: int = 0) -> Any:
            def ask(*arguments: Any) -> Any:
                if key not in arguments[position]:
                    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
                return arguments[position][key]

            return ask

        def memory(handle: dict[str, Any]) -> Any:
            if "total_mib" not in handle:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return SimpleNamespace(total=handle["total_mib"] << 20, free=handle["free_mib"] << 20)

        def shutdown() -> None:
            calls.shutdowns += 1

        for function, fake in {
            "nvmlInit": lambda: None,
            "nvmlShutdown": shutdown,
            "nvmlSystemGetDriverVersion": lambda: "580.65.06",
            "nvmlDeviceGetCount": lambda: len(cards),
            "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
            "nvmlDeviceGetName": answer("name"),
            "nvmlDeviceGetCudaComputeCapability": answer("capability"),
            "nvmlDeviceGetMemoryInfo": memory,
            "nvmlDeviceGetMaxClockInfo": answer("clock_mhz"),
            "nvmlDeviceGetMemoryBusWidth": answer("bus_bits"),
        }.items():
            monkeypatch.setattr(pynvml, function, fake)
        return calls

    return install


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    use_cuda(monkeypatch, available=False)


def use_cuda(
    monkeypatch: pytest.MonkeyPatch, *, available: bool, capability: tuple[int, int] = (8, 9)
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def use_cpu(monkeypatch: pytest.MonkeyPatch, *capabilities: str, onednn: bool = True) -> None:
    found = dict.fromkeys(capabilities, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)


def test_a_4050_is_described_by_its_driver(install_cards: Any) -> None:
    calls = install_cards(RTX_4050)
    (card,) = hardware.cards()
    assert card == hardware.Card(
        index=0,
        name="NVIDIA GeForce RTX 4050 Laptop GPU",
        compute_capability=(8, 9),
        total_mib=6141,
        free_mib=5800,
        tensor_cores="fp16, bf16, tf32, fp8",
        memory_bandwidth_gb_per_s=pytest.approx(192.0, rel=0.001),
        driver="580.65.06",
    )
    assert calls.shutdowns == 1


def test_every_card_is_listed_and_an_h200_has_its_published_bandwidth(install_cards: Any) -> None:
    install_cards(RTX_4050, H200)
    cards = hardware.cards()
    assert [card.index for card in cards] == [0, 1]
    assert cards[1].memory_bandwidth_gb_per_s == pytest.approx(4_917, rel=0.001)


def test_answers_that_a_driver_refuses_are_unknown_and_not_errors(install_cards: Any) -> None:
    install_cards({"name": "NVIDIA GB10"})
    (card,) = hardware.cards()
    assert (card.compute_capability, card.total_mib, card.free_mib) == (None, None, None)
    assert card.memory_bandwidth_gb_per_s is None
    assert card.tensor_cores == "unknown"


def test_a_card_that_is_lost_between_counting_and_asking_ends_in_no_cards(
    install_cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install_cards(RTX_4050)

    def lost(index: int) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lost)
    use_cuda(monkeypatch, available=False)
    assert hardware.cards() == []
    assert calls.shutdowns == 1


@pytest.mark.usefixtures("no_driver")
def test_without_nvml_torch_describes_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cuda(monkeypatch, available=True)
    properties = SimpleNamespace(name="Orin", major=8, minor=7)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 << 30, 8 << 30))
    (card,) = hardware.cards()
    assert (card.name, card.total_mib, card.free_mib) == ("Orin", 8192, 3072)
    assert card.tensor_cores == "fp16, bf16, tf32"
    assert card.driver is None


@pytest.mark.usefixtures("no_driver")
def test_no_driver_means_no_cards_and_says_so() -> None:
    assert hardware.cards() == []
    assert "no NVIDIA driver" in str(hardware.why_no_gpu())


@pytest.mark.parametrize(
    ("cuda_build", "visible", "expected"),
    [
        (None, None, "without CUDA"),
        ("13.0", "", "hides every card"),
        ("13.0", "-1", "hides every card"),
        ("13.0", None, "Update the driver"),
    ],
)
def test_with_a_driver_the_reason_is_torch_s(
    install_cards: Any,
    monkeypatch: pytest.MonkeyPatch,
    cuda_build: str | None,
    visible: str | None,
    expected: str,
) -> None:
    install_cards(RTX_4050)
    use_cuda(monkeypatch, available=False)
    monkeypatch.setattr(torch.version, "cuda", cuda_build)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert expected in str(hardware.why_no_gpu())


def test_a_driver_without_a_card_is_named(
    install_cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_cards()
    use_cuda(monkeypatch, available=False)
    assert "sees no card" in str(hardware.why_no_gpu())


def test_a_usable_gpu_has_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cuda(monkeypatch, available=True)
    assert hardware.why_no_gpu() is None


@pytest.mark.parametrize(
    ("capability", "name", "formats"),
    [
        ((6, 1), "GTX 1080", "none"),
        ((7, 0), "V100", "fp16"),
        ((7, 5), "RTX 2060", "fp16"),
        ((7, 5), "NVIDIA GeForce GTX 1650", "none"),
        ((8, 6), "RTX 3060", "fp16, bf16, tf32"),
        ((8, 9), "RTX 4050", "fp16, bf16, tf32, fp8"),
        ((9, 0), "H200", "fp16, bf16, tf32, fp8"),
        ((12, 0), "RTX 5090", "fp16, bf16, tf32, fp8, fp4"),
    ],
)
def test_tensor_cores_by_generation(capability: tuple[int, int], name: str, formats: str) -> None:
    assert hardware.tensor_core_formats(capability, name) == formats


def test_emulated_bfloat16_is_not_taken_for_native(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU with AVX-512 and without AVX512-BF16, on which oneDNN nevertheless says "supported".
    use_cpu(monkeypatch, "avx512_f", "avx512_bw", "avx512_vl", onednn=True)
    assert hardware.fast_bf16() is None
    dtype, reason = hardware.default_compute_dtype("cpu")
    assert dtype == torch.float32
    assert "no native bfloat16" in reason
    assert not hardware.cpu_facts().bf16
    assert hardware.cpu_facts().avx512


@pytest.mark.parametrize(
    ("flag", "name"),
    [("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX-BF16"), ("bf16", "Arm BF16")],
)
def test_native_bfloat16_is_used_and_its_source_named(
    monkeypatch: pytest.MonkeyPatch, flag: str, name: str
) -> None:
    use_cpu(monkeypatch, flag)
    dtype, reason = hardware.default_compute_dtype("cpu")
    assert dtype == torch.bfloat16
    assert name in reason


def test_bfloat16_that_onednn_can_t_use_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cpu(monkeypatch, "avx512_bf16", onednn=False)
    assert hardware.default_compute_dtype("cpu")[0] == torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16)],
)
def test_the_dtype_of_a_card_follows_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    use_cuda(monkeypatch, available=True, capability=capability)
    found, reason = hardware.default_compute_dtype("cuda:0")
    assert found == dtype
    assert ".".join(map(str, capability)) in reason


@pytest.mark.usefixtures("no_driver")
def test_asking_for_a_gpu_that_is_not_there_says_why_and_what_to_do() -> None:
    with pytest.raises(HardwareError, match=r"no NVIDIA driver.*--device cpu"):
        hardware.default_compute_dtype("cuda")


def test_a_container_s_memory_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    unlimited = hardware.cpu_facts()
    (tmp_path / "memory.max").write_text(f"{64 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{16 << 20}\n")
    limited = hardware.cpu_facts()
    assert limited.total_gib == 64 / 1024
    assert limited.available_gib == 48 / 1024
    assert hardware.free_bytes("cpu") == 48 << 20
    assert unlimited.total_gib > limited.total_gib
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.cpu_facts().total_gib == unlimited.total_gib


def test_a_cap_and_torchs_unused_blocks_count_for_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gib = 1 << 30
    for name, value in (
        ("mem_get_info", (60 * gib, 80 * gib)),
        ("memory_allocated", gib),
        ("memory_reserved", 3 * gib),
        ("get_per_process_memory_fraction", 1.0),
        ("current_device", 0),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert hardware.free_bytes("cuda") == 62 * gib
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 5 / 80)
    assert hardware.free_bytes("cuda:0") == 4 * gib
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 6 * gib)
    assert hardware.free_bytes("cuda") == 0


def test_the_peak_of_the_process_lies_between_what_it_holds_and_what_there_is() -> None:
    now_mib = psutil.Process().memory_info().rss / (1 << 20)
    assert 0.99 * now_mib <= hardware.process_peak_rss_mib()
    assert hardware.process_peak_rss_mib() <= psutil.virtual_memory().total / (1 << 20)


def test_a_cpu_has_no_peak_of_its_own() -> None:
    hardware.reset_peak("cpu")
    assert hardware.peak_mib("cpu") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
def test_the_peak_of_a_card_is_of_the_time_since_the_reset() -> None:
    large = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    assert (hardware.peak_mib("cuda") or 0) >= 64
    del large
    hardware.release_memory()
    hardware.reset_peak("cuda")
    assert (hardware.peak_mib("cuda") or 0) < 64
