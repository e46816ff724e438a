"""The sparse streams against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libortho import stream
from libortho.errors import ShapeError

some = settings(max_examples=40)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, torch.Generator]:
    """Columns, float16 values, in_features, and a generator for what goes with them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    in_features, out_features = draw(st.integers(1, 60)), draw(st.integers(1, 12))
    k = draw(st.integers(0, in_features))
    columns = stream.select(torch.rand(out_features, in_features, generator=generator), k)
    values = torch.randn(k, out_features, generator=generator).half()
    return columns, values, in_features, generator


Streams = tuple[Tensor, Tensor, int, torch.Generator]


def dense(columns: Tensor, values: Tensor, in_features: int) -> Tensor:
    """What a stream stands for, written as plainly as can be, float64 `[out, in]`."""
    matrix = torch.zeros(columns.shape[1], in_features, dtype=torch.float64)
    for j in range(columns.shape[0]):
        for o in range(columns.shape[1]):
            matrix[o, int(columns[j, o])] = values[j, o].double()
    return matrix


@some
@given(streams())
def test_selected_columns_are_the_highest_and_well_formed(
    drawn: tuple[Tensor, Tensor, int, torch.Generator],
) -> None:
    _, values, in_features, generator = drawn
    k, out_features = values.shape
    # Few distinct scores, so that there are ties.
    scores = torch.randint(0, 4, (out_features, in_features), generator=generator).float()
    columns = stream.select(scores, k)
    assert columns.dtype == torch.uint16
    stream.check(columns, values, in_features, out_features, "selection")
    for row in range(out_features):
        ranked = sorted(range(in_features), key=lambda i: (-float(scores[row, i]), i))
        assert columns[:, row].tolist() == sorted(ranked[:k])


@pytest.mark.parametrize(("shape", "k"), [((4,), 1), ((2, 3), 4), ((2, 3), -1)])
def test_selecting_what_is_not_there_is_refused(shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(ShapeError, match=f"k = {k}"):
        stream.select(torch.zeros(shape), k)


@some
@given(streams(), st.floats(-3, 3))
def test_scatters_agree_with_the_dense_matrix(
    drawn: tuple[Tensor, Tensor, int, torch.Generator], scale: float
) -> None:
    columns, values, in_features, generator = drawn
    matrix = torch.randn(columns.shape[1], in_features, generator=generator, dtype=torch.float64)
    sparse = dense(columns, values, in_features)
    slots = stream.mask(columns, in_features)
    assert int(slots.sum()) == columns.numel()
    assert bool((sparse[~slots] == 0).all())

    added = stream.scatter_add(matrix.clone(), columns, values.double(), scale)
    torch.testing.assert_close(added, matrix + scale * sparse)
    written = stream.scatter(matrix.clone(), columns, values)
    assert torch.equal(written, torch.where(slots, sparse, matrix))
    assert torch.equal(stream.gather(written, columns), values.double())


@some
@given(streams())
def test_a_paired_stream_is_the_same_stream(given: Streams) -> None:
    columns, values, in_features, generator = given
    both = stream.paired(columns, values)
    assert torch.equal(both[0], columns)
    assert torch.equal(both[1].view(torch.int16), values.view(torch.int16))  # NaN's bits as well
    assert stream.is_paired(*both) == bool(values.numel())
    assert stream.paired(*both)[1] is both[1]
    assert not stream.is_paired(columns, both[1])
    stream.check(*both, in_features, columns.shape[1], "stream")
    assert torch.equal(dense(*both, in_features), dense(columns, values, in_features))
    x = torch.randn(2, in_features, generator=generator)
    # Sums along other strides are made in another order.
    torch.testing.assert_close(stream.multiply(x, *both), stream.multiply(x, columns, values))
    masters = values.float()
    assert stream.paired(columns, masters)[1] is masters


def test_scatters_work_in_place() -> None:
    columns, values = torch.tensor([[1]], dtype=torch.uint16), torch.tensor([[2.0]])
    matrix = torch.zeros(1, 3)
    assert stream.scatter_add(matrix, columns, values) is matrix
    assert stream.scatter(matrix, columns, values) is matrix


@some
@given(streams(), st.sampled_from([(), (1,), (5,), (2, 3), (0,)]))
def test_multiply_agrees_with_the_dense_matrix(
    drawn: tuple[Tensor, Tensor, int, torch.Generator], leading: tuple[int, ...]
) -> None:
    columns, values, in_features, generator = drawn
    x = torch.randn(*leading, in_features, generator=generator)
    y = stream.multiply(x, columns, values)
    assert y.dtype == x.dtype
    expected = x.double() @ dense(columns, values, in_features).t()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_multiply_sums_in_float32() -> None:
    # 2048 + 1 in float16 is 2048: a float16 sum of these would stay at 2048.
    columns = torch.arange(65).to(torch.uint16)[:, None]
    values = torch.ones(65, 1).half()
    x = torch.ones(65).half()
    x[0] = 2048.0
    assert float(stream.multiply(x, columns, values)) == 2112.0


def test_the_last_of_65536_columns_can_be_addressed() -> None:
    scores = torch.zeros(1, stream.MAX_COLUMNS)
    scores[0, -1] = 1.0
    columns = stream.select(scores, 1)
    assert int(columns) == 65535
    x = torch.zeros(stream.MAX_COLUMNS)
    x[-1] = 3.0
    assert float(stream.multiply(x, columns, torch.tensor([[2.0]]))) == 6.0


@pytest.mark.parametrize(
    ("in_features", "density", "slots"),
    [
        (100, 0.0, 0),
        (100, 1e-6, 1),
        (100, 0.02, 2),
        (100, 1.0, 100),
        (1, 0.4, 1),
        (65536, 0.5, 32768),
    ],
)
def test_slots_per_row(in_features: int, density: float, slots: int) -> None:
    assert stream.slots_per_row(in_features, density) == slots


@pytest.mark.parametrize("density", [-0.01, 1.01, float("nan")])
def test_a_density_that_is_no_share_is_refused(density: float) -> None:
    with pytest.raises(ShapeError, match=str(density)):
        stream.slots_per_row(100, density)


def test_more_columns_than_16_bits_address_are_refused() -> None:
    with pytest.raises(ShapeError, match="found 65537"):
        stream.slots_per_row(stream.MAX_COLUMNS + 1, 0.01)


def u16(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).to(torch.uint16)


@pytest.mark.parametrize(
    ("columns", "values", "found"),
    [
        (u16([[0, 5], [1, 2]]), torch.zeros(2, 2), r"column 5 lies outside 0 \.\. 4"),
        (u16([[1, 0], [1, 2]]), torch.zeros(2, 2), "distinct and ascending"),
        (u16([[2, 0], [1, 2]]), torch.zeros(2, 2), "distinct and ascending"),
        (u16([[0, 1]]).int(), torch.zeros(1, 2), "int32"),
        (u16([[0, 1]]), torch.zeros(1, 2, dtype=torch.int16), "int16"),
        (u16([[0, 1]]), torch.zeros(2, 2), r"\(1, 2\) and \(2, 2\)"),
        (u16([[0, 1, 2]]), torch.zeros(1, 3), r"\[k, 2\]"),
    ],
)
def test_a_malformed_stream_is_refused(columns: Tensor, values: Tensor, found: str) -> None:
    with pytest.raises(ShapeError, match=f"the stream.*{found}"):
        stream.check(columns, values, in_features=5, out_features=2, name="the stream")


def test_an_empty_stream_is_well_formed() -> None:
    columns = torch.zeros(0, 2, dtype=torch.uint16)
    stream.check(columns, torch.zeros(0, 2), in_features=5, out_features=2, name="the stream")
