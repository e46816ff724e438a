"""The choice of what multiplies, its operators and its configs; the kernels' own tests by proxy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from libortho import stream
from libortho.config import NO_LATTICE
from libortho.kernels import autotune, configs, dispatch, int4pack
from libortho.kernels.configs import DecodeConfig, Shape, reasoned, word_layout
from libortho.lattice import PER_ROW, Lattice, dequantize, groups_per_row, quantize
from libortho.linear import OrthoLinear
from libortho.product import backend_of

LLAMA_3_8B = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
"""(out_features, in_features) of q and o, k and v, gate and up, down."""
some = settings(max_examples=40)
shapes = st.builds(
    Shape,
    out_features=st.integers(1, 20000),
    in_features=st.integers(1, 20000),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([2, 6, 16, 32, 48, 64, 128, PER_ROW]),
)


def make_layer(out_features: int, in_features: int, **options: Any) -> OrthoLinear:
    """A layer with a residual and a private stream."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=True)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    layer = OrthoLinear.from_linear(
        linear,
        **({"bits": 4, "group_size": 32, "residual_density": 0.01} | options),
        importance=torch.ones(in_features),
        search=False,
    )
    columns = stream.select(torch.rand(out_features, in_features, generator=generator), 3)
    layer.set_private(columns, torch.randn(3, out_features, generator=generator).half())
    return layer


# --- the kernels --------------------------------------------------------------------------------


def test_the_kernels_agree_with_float64_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds; not with this")
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/interpreted_kernels.py"],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    # Every one of them: the summary counts nothing else.
    assert re.search(r"\n\d+ passed in [^,]*$", done.stdout.rstrip()), done.stdout[-1000:]


POINTERS = {
    torch.uint8: "*u8",
    torch.uint16: "*u16",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


def compiled(kernel: Any, arguments: dict[str, Any], capability: int) -> tuple[Any, str, str]:
    """A kernel built for a card that need not be here: metadata, resources and machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": arguments.pop("num_warps")}
    parameters = {parameter.name: parameter for parameter in kernel.params}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if parameters[name].is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        # As at a launch: what is divisible by 16 is known to be.
        whole = isinstance(value, Tensor) or value % 16 == 0
        if whole and not parameters[name].do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        texts = [
            subprocess.run(
                [str(tools / tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        ]
    return built.metadata, texts[0], texts[1]


def unreal(
    out_features: int, in_features: int, group_size: int = 128, density: float = 0.005
) -> tuple[Lattice, tuple[Tensor, Tensor], Tensor]:
    """A lattice, a stream and alpha without memory: shapes and dtypes only."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    groups = groups_per_row(in_features, group_size)
    scales = empty(out_features, groups, dtype=torch.float16)
    packed = empty(out_features, in_features // 2, dtype=torch.uint8)
    slots = stream.slots_per_row(in_features, density)
    entries = (
        empty(slots, out_features, dtype=torch.uint16),
        empty(slots, out_features, dtype=torch.float16),
    )
    lattice = Lattice(packed, scales, scales, 4, group_size, in_features)
    return lattice, entries, empty(dtype=torch.float32)


@pytest.fixture(scope="module")
def _compiler() -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds; not with this")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets here instead of compiling")


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336)])
def test_a_decode_thread_reads_16_bytes_and_keeps_them(
    capability: int, shape: tuple[int, int]
) -> None:
    from libortho.kernels.decode import _decode_kernel, kernel_arguments

    lattice, entries, alpha = unreal(*shape)
    config = reasoned(Shape.of(lattice), 1, multiprocessors=132)
    x = torch.empty(1, shape[1], dtype=torch.float16, device="meta")
    y = torch.empty(1, shape[0], dtype=torch.float16, device="meta")
    grid, arguments = kernel_arguments(x, lattice, entries, entries, alpha, None, y, config)
    assert grid[0] * config.rows >= shape[0]
    metadata, resources, code = compiled(_decode_kernel, arguments, capability)
    assert "STACK:0" in resources, resources  # no register was spilled
    assert len(re.findall(r"LDG\.E\.EF\.128", code)) >= config.rows
    # Words that changed threads would do so through shared memory; only final sums do.
    assert metadata.shared <= 16 * config.rows * config.warps


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("capability", [89, 90])
def test_composing_writes_16_bytes_at_once(capability: int) -> None:
    from libortho.kernels.compose import _compose_kernel, compose_arguments

    lattice, entries, alpha = unreal(14336, 4096)
    weight = torch.empty(14336, 4096, dtype=torch.bfloat16, device="meta")
    _, arguments = compose_arguments(lattice, entries, entries, alpha, weight)
    metadata, resources, code = compiled(_compose_kernel, arguments, capability)
    assert "STACK:0" in resources, resources
    assert "STG.E.128" in code
    assert metadata.shared == 0


# --- configs ------------------------------------------------------------------------------------


@some
@given(shapes, st.sampled_from([1, 2, 4]))
def test_a_threads_columns_never_straddle_groups(shape: Shape, words: int) -> None:
    layout = word_layout(shape, words)
    if layout is None:  # not even one byte
        assert shape.bits == 4
        assert shape.group_size % 2
        return
    count, size = layout
    columns = count * size * 8 // shape.bits
    assert count * size <= 4 * words
    width = -(-shape.in_features * shape.bits // 8)
    assert width % size == 0
    one_group = shape.group_size == PER_ROW or shape.group_size >= shape.in_features
    assert one_group or shape.group_size % columns == 0


@some
@given(shapes, st.integers(1, configs.MAX_TOKENS), st.integers(1, 200))
def test_reasoned_configs_can_be_launched(shape: Shape, tokens: int, multiprocessors: int) -> None:
    config = reasoned(shape, tokens, multiprocessors)
    assert config.rows in (1, 2, 4, 8)
    assert config.warps in (1, 2, 4)
    assert config.words in (1, 2, 4)


@pytest.mark.parametrize(("out_features", "in_features"), LLAMA_3_8B)
def test_steps_leave_no_columns_over_at_llamas_shapes(out_features: int, in_features: int) -> None:
    config = reasoned(Shape(out_features, in_features, 4, 128), 1, 132)
    assert in_features % (32 * config.warps * 8 * config.words) == 0


def test_a_measured_config_goes_before_a_reasoned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = DecodeConfig(rows=2, warps=1, words=1, prefetch=True)
    monkeypatch.setitem(configs.MEASURED, (9, 0), {(64, 128, 4): measured})
    shape = Shape(64, 128, 4, 64)
    chosen = configs.default_config(shape, 3, (9, 0), 132)
    assert chosen == (measured, "measured on compute capability 9.0")
    for other in ((shape, 1, (9, 0)), (shape, 3, (8, 9)), (Shape(64, 128, 8, 64), 3, (9, 0))):
        assert "reasoned" in configs.default_config(*other, 132).source


def test_tuned_configs_survive_the_process_and_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernels" / "decode.json"
    monkeypatch.setattr(autotune, "_file", lambda device: path)
    key = Shape(64, 128, 4, 64), 4, torch.device("cuda", 0)
    config = DecodeConfig(rows=2, warps=1, words=4, prefetch=True)
    autotune._content.cache_clear()
    autotune._remember(key, config, 12.3456)
    autotune._content.cache_clear()
    assert autotune._remembered(key) == config
    assert autotune._remembered((key[0], 1, key[2])) is None
    for text in ("{", "[]", '{"64x128 int4 g64 4 tokens": {"config": {"rows": 1}}}'):
        path.write_text(text, encoding="utf-8")
        autotune._content.cache_clear()
        assert autotune._remembered(key) is None
    autotune._content.cache_clear()


@some
@given(shapes, st.sampled_from([1, 2, 4, 8]))
def test_candidates_are_distinct_and_few(shape: Shape, tokens: int) -> None:
    found = autotune.candidates(shape, tokens)
    assert len(set(found)) == len(found) <= 40
    assert bool(found) == (word_layout(shape, 1) is not None)


# --- the choice ---------------------------------------------------------------------------------


@pytest.fixture
def _undecided() -> Iterator[None]:
    caches = (dispatch._on_cuda, dispatch.composer, dispatch.why_no_triton)
    for cache in caches:
        cache.cache_clear()
    dispatch._timed.clear()
    yield
    for cache in caches:
        cache.cache_clear()
    dispatch._timed.clear()


CUDA = torch.device("cuda", 0)
SHAPE = Shape(256, 256, 4, 64)


@pytest.mark.usefixtures("_undecided")
@pytest.mark.parametrize(
    ("shape", "dtype", "tokens", "name", "reason"),
    [
        (SHAPE, torch.float16, 1, "triton-decode", "1 of at most 8 tokens in float16"),
        (SHAPE, torch.bfloat16, 8, "triton-decode", "8 of at most 8 tokens in bfloat16"),
        (SHAPE, torch.float16, 9, "triton-compose", "9 tokens are more"),
        (SHAPE, torch.float32, 1, "triton-compose", "float16 and bfloat16, not float32"),
        (Shape(256, 256, 4, 7), torch.float16, 1, "dequantize", "whole bytes"),
    ],
)
def test_on_a_gpu_with_triton(
    monkeypatch: pytest.MonkeyPatch,
    shape: Shape,
    dtype: torch.dtype,
    tokens: int,
    name: str,
    reason: str,
) -> None:
    monkeypatch.setattr(dispatch, "why_no_triton", lambda device: None)
    chosen = dispatch._on_cuda(shape, dtype, tokens, CUDA)
    assert chosen.name == name
    assert reason in chosen.reason


@pytest.mark.usefixtures("_undecided")
@pytest.mark.parametrize(
    ("shape", "dtype", "tokens", "name", "reason"),
    [
        (SHAPE, torch.bfloat16, 1, "int4pack", "no Triton"),
        (SHAPE, torch.float16, 1, "dequantize", "bfloat16, not float16"),
        (SHAPE, torch.bfloat16, 40, "dequantize", "40 tokens are worth a dense product"),
        (Shape(256, 256, 8, 64), torch.bfloat16, 1, "dequantize", "4 bits, not 8"),
        (Shape(256, 192, 4, 64), torch.bfloat16, 1, "dequantize", "256 x 192"),
        (Shape(256, 256, 4, PER_ROW), torch.bfloat16, 1, "dequantize", "not -1"),
    ],
)
def test_on_a_gpu_without_triton(
    monkeypatch: pytest.MonkeyPatch,
    shape: Shape,
    dtype: torch.dtype,
    tokens: int,
    name: str,
    reason: str,
) -> None:
    monkeypatch.setattr(dispatch, "why_no_triton", lambda device: "no Triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    chosen = dispatch._on_cuda(shape, dtype, tokens, CUDA)
    assert chosen.name == name
    assert reason in chosen.reason


@pytest.mark.usefixtures("_undecided")
@pytest.mark.parametrize("faster", ["int4pack", "dequantize"])
def test_on_a_cpu_what_measures_faster_is_taken(
    monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    timings = iter([1.0, 2.0] if faster == "int4pack" else [2.0, 1.0])
    monkeypatch.setattr(dispatch, "_least_ms", lambda call: next(timings))
    layer = make_layer(512, 512)
    first = backend_of(layer, 1)
    assert first.name == faster
    assert re.search(r"measured at 1 tokens.*int4pack \d.00 ms, dequantize \d.00 ms", first.reason)
    assert backend_of(layer, 1) == first  # the timings are used up: nothing is measured twice


@pytest.mark.usefixtures("_undecided")
def test_on_a_cpu_both_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(512, 512)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = {}
    for name in ("int4pack", "dequantize"):
        chosen = dispatch.Backend(name, "for the test")  # type: ignore[arg-type]
        monkeypatch.setattr("libortho.kernels.op.choose", lambda *_, c=chosen: c)
        y[name] = layer(x).double()
    # Scales, activations and results in bfloat16: 2**-9 each.
    error = (y["int4pack"] - y["dequantize"]).norm() / y["dequantize"].norm()
    assert 0 < float(error) < 4 * 2**-9


def test_other_calls_on_a_cpu_say_why_they_are_dequantised() -> None:
    layer = make_layer(64, 64)
    for dtype, tokens, reason in (
        (torch.float32, 1, "bfloat16, not float32"),
        (torch.bfloat16, 1, "nothing to gain"),
        (torch.bfloat16, 17, "worth a dense product"),
    ):
        chosen = backend_of(layer, tokens, dtype)
        assert chosen.name == "dequantize"
        assert reason in chosen.reason
    layer.hold(torch.bfloat16)
    assert backend_of(layer, 1).name == "held"
    assert backend_of(layer, 1, torch.float32).name == "dequantize"
    assert backend_of(make_layer(64, 64, bits=NO_LATTICE), 1).name == "torch"


def test_a_weight_written_in_place_is_repacked() -> None:
    generator = torch.Generator().manual_seed(2)
    lattice, other = (
        quantize(torch.randn(16, 64, generator=generator), group_size=32, search=False)
        for _ in range(2)
    )
    x = torch.randn(1, 64, generator=generator).bfloat16()
    before = int4pack.multiply(x, lattice)
    lattice.packed.copy_(other.packed)
    after = int4pack.multiply(x, lattice)
    assert not torch.equal(before, after)
    expected = x.float() @ dequantize(lattice).t()
    torch.testing.assert_close(after.float(), expected, rtol=2e-2, atol=5e-2)


# --- the operators ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8, NO_LATTICE])
@pytest.mark.parametrize("leading", [(1,), (2, 1), (40,)])
def test_a_layer_compiles_whole_and_once_for_all_alphas(
    bits: int, leading: tuple[int, ...]
) -> None:
    layer = make_layer(24, 64, bits=bits)
    x = torch.randn(*leading, 64, generator=torch.Generator().manual_seed(1))
    torch.compiler.reset()
    graphs = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        graphs(x)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for alpha in (1.0, 0.0, -2.0):
            layer.set_alpha(alpha)
            torch.testing.assert_close(graphs(x), layer(x))


@pytest.mark.parametrize("operator", ["product", "composed"])
def test_the_operators_keep_pytorchs_rules(operator: str) -> None:
    layer = make_layer(8, 64)
    weight = (
        *(layer.packed, layer.scales, layer.zeros),
        *(layer.residual_columns, layer.residual_values),
        *(layer.private_columns, layer.private_values),
        layer.alpha,
    )
    rest = (4, 32, 64)
    if operator == "product":
        arguments: tuple[Any, ...] = (torch.randn(2, 3, 64), *weight, layer.bias, *rest)
    else:
        arguments = (*weight, *rest, torch.bfloat16)
    torch.library.opcheck(
        getattr(torch.ops.libortho, operator).default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("bits", [4, NO_LATTICE])
def test_a_backward_keeps_no_dense_weight(bits: int) -> None:
    layer = make_layer(24, 64, bits=bits)
    kept: list[int] = []
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        y = layer(x)
    assert kept == [x.numel()]
    y.sum().backward()
    expected = layer.effective_weight(torch.float64).sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, expected)
