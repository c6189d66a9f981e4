"""Statistics of batches against NumPy: merged in order, however the batches arrive."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dump_activations.dtypes import TensorSpec
from dump_activations.storage.statistics import (
    RunningStatistics,
    merge_stored,
    statistics_specs,
)
from reference.statistics import as_float64, numpy_statistics

DTYPES = {
    "float64": np.dtype("f8"),
    "float32": np.dtype("f4"),
    "float16": np.dtype("f2"),
    "bfloat16": np.dtype("u2"),
}


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 values to a dtype; bfloat16 as its bits, cut off."""
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(DTYPES[dtype])


def running(values: np.ndarray, dtype: str, layers: int | None) -> RunningStatistics:
    specs = statistics_specs("x", layers=layers, width=values.shape[-1])
    return RunningStatistics([TensorSpec("x", dtype, values.shape), *specs])


def batches_of(statistics: RunningStatistics, values: np.ndarray, rows: int) -> list:
    batches = [values[start : start + rows] for start in range(0, len(values), rows)]
    return [{"x": statistics.measure("x", b.reshape(-1).view(np.uint8))} for b in batches]


def statistics_of(
    values: np.ndarray, dtype: str = "float32", layers: int | None = None, rows: int = 100
) -> dict[str, np.ndarray]:
    """Take the statistics of values (N, ..., F) in batches of `rows` rows."""
    statistics = running(values, dtype, layers)
    for batch, moments in enumerate(batches_of(statistics, values, rows)):
        statistics.add(batch, moments)
    return {name.removeprefix("stats/x/"): found for name, found in statistics.tensors().items()}


def assert_equal(found: dict, expected: dict, **tolerance: float):
    for name, values in expected.items():
        np.testing.assert_allclose(
            found[name].reshape(np.shape(values)), values, err_msg=name, **tolerance
        )


def same_bits(found: dict, expected: dict) -> bool:
    return {k: v.tobytes() for k, v in found.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }


KINDS = {
    "normal": lambda x: x,
    "a thousand deviations from zero": lambda x: x + 1e3,
    "a million deviations from zero": lambda x: 1e-3 * x + 1e3,
    "softmax": lambda x: np.exp(9 * x) / np.exp(9 * x).sum(-1, keepdims=True),
    "outliers": lambda x: np.where(abs(x) > 3, 1e4 * x, x),
    "an outlier first": lambda x: np.where(np.arange(len(x))[:, None, None, None] == 0, 6e4, x),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_any_kind_agree_with_numpy(dtype, kind):
    values = stored(KINDS[kind](np.random.default_rng(0).normal(size=(1000, 3, 5, 33))), dtype)
    found = statistics_of(values, dtype, layers=3, rows=301)
    for layer in range(3):
        vectors_VF = as_float64(values[:, layer]).reshape(-1, 33)
        of_layer = {name: of[layer] for name, of in found.items()}
        expected = numpy_statistics(vectors_VF)
        assert_equal(of_layer, expected, rtol=1e-9, atol=1e-12 * expected["norm_mean"])
        assert_equal(of_layer, {"variance": vectors_VF.var(0)}, rtol=1e-9)


@pytest.mark.parametrize("width", [1, 8, 300, 4097, 9000])
def test_vectors_of_any_width_agree_with_numpy(width):
    values = np.random.default_rng(0).normal(size=(300, width)).astype(np.float32)
    expected = numpy_statistics(values.astype(np.float64))
    assert_equal(statistics_of(values, rows=290), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e30, 1e4 / 3])
def test_a_constant_feature_has_its_mean_and_no_variance(constant):
    values = np.random.default_rng(0).normal(size=(999, 7, 9)).astype(np.float32)
    values[..., 4] = constant
    found = statistics_of(values, rows=70)
    assert found["variance"][4] == 0
    assert found["mean"][4] == np.float32(constant)


@st.composite
def tensors_of_any_bits(draw) -> tuple[np.ndarray, str, int | None]:
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    layers = draw(st.sampled_from([None, 1, 2]))
    shape = (
        draw(st.integers(1, 150)),
        layers or 1,
        draw(st.integers(1, 6)),
        draw(st.integers(1, 20)),
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits = generator.integers(0, 1 << 32, shape, np.uint32)
    values = (bits if dtype == "float32" else (bits >> 16).astype(np.uint16)).view(DTYPES[dtype])
    if draw(st.booleans()):  # few that are not finite: features with one or none
        finite = np.isfinite(as_float64(values)) | (generator.random(shape) < 0.05)
        values = np.where(finite, values, DTYPES[dtype].type(1))
    return values, dtype, layers


@settings(max_examples=60, deadline=None)
@given(tensors_of_any_bits(), st.integers(1, 200))
def test_nan_and_infinite_values_propagate_as_in_numpy(tensor, rows):
    values, dtype, layers = tensor
    found = statistics_of(values, dtype, layers, rows)
    for layer in range(values.shape[1]):
        vectors_VF = as_float64(values[:, layer]).reshape(-1, values.shape[-1])
        of_layer = {name: of[layer] if layers else of for name, of in found.items()}
        expected = numpy_statistics(vectors_VF)
        scale = np.abs(np.where(np.isfinite(vectors_VF), vectors_VF, 0)).max(0)
        mean, expected_mean = of_layer["mean"], expected.pop("mean")
        finite = np.isfinite(expected_mean)
        np.testing.assert_array_equal(mean[~finite], expected_mean[~finite])
        assert (np.abs(mean - expected_mean)[finite] <= 1e-12 * scale[finite]).all()
        assert_equal(of_layer, expected, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(tensors_of_any_bits(), st.data())
def test_the_order_of_arrival_leaves_no_trace(tensor, data):
    values, dtype, layers = tensor
    rows = data.draw(st.integers(1, max(1, len(values) // 3)))
    in_order, other = (running(values, dtype, layers) for _ in range(2))
    batches = batches_of(in_order, values, rows)
    for batch, moments in enumerate(batches):
        assert in_order.next_batch == batch
        in_order.add(batch, moments)
    arrival = data.draw(st.permutations(range(len(batches))))
    with ThreadPoolExecutor(2) as executor:
        [*executor.map(lambda batch: other.add(batch, batches[batch]), arrival)]
    assert other.next_batch == len(batches)
    assert same_bits(other.tensors(), in_order.tensors())


@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("cuts", [[1], [300, 301, 900], range(10, 1000, 10)])
def test_shards_merge_into_the_statistics_of_the_whole(layers, offset, cuts):
    values = np.random.default_rng(1).normal(size=(1000, 3, 4, 9)) + offset
    values[0, 0, 0, :2] = np.nan, np.inf
    values[..., 3] = offset
    values = values.astype(np.float32)
    whole = statistics_of(values, layers=layers)
    shards = [statistics_of(shard, layers=layers) for shard in np.split(values, cuts)]
    merged = merge_stored(shards)
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in whole.items()}
    assert_equal(merged, whole, rtol=1e-12, atol=1e-12)
    for exact in ("count", "min", "max", "count_abs_gt_6"):
        np.testing.assert_array_equal(merged[exact], whole[exact])
    assert not merged["variance"][..., 3].any()


def test_the_statistics_of_one_file_stay_to_the_bit():
    stored = statistics_of(np.zeros((3, 2), np.float32)) | {"variance": np.array([0.1, 0.7])}
    assert same_bits(merge_stored([stored]), stored)  # 0.1 * 3 / 3 is another number


def test_zeros_are_positive_and_nan_is_one_value():
    bits = np.array([[0x8000_0000, 0xFFC0_0001], [0, 0x7F80_0001]], np.uint32)
    for order in ([0, 1], [1, 0]):
        found = statistics_of(bits[order].view(np.float32), rows=1)
        assert found["min"].tobytes() == found["max"].tobytes()
        assert found["min"].tobytes() == np.array([0.0, np.nan]).tobytes()


def test_values_beyond_six_are_counted():
    beyond = np.nextafter(np.float32(6), np.float32(7))
    values = np.array([[6, beyond], [-6, -beyond], [np.inf, np.nan]], np.float32)
    np.testing.assert_array_equal(statistics_of(values)["count_abs_gt_6"], [1, 2])
