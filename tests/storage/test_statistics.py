"""Statistics of vectors, however these come: exact, and as NumPy has them."""

import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dump_activations.dtypes import TensorSpec
from dump_activations.statistics import STATISTICS, statistics_specs
from dump_activations.storage.statistics import RunningStatistics, vectors_of
from reference.statistics import as_float64, exact_statistics, numpy_statistics

DTYPES = {"float32": np.dtype("f4"), "float16": np.dtype("f2"), "bfloat16": np.dtype("u2")}


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 values to a dtype; bfloat16 as its bits, cut off."""
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(DTYPES[dtype])


def running(values: np.ndarray, dtype: str, *, layers: int | None = None) -> RunningStatistics:
    spec = TensorSpec("x", dtype, values.shape)
    specs = statistics_specs("x", layers=layers, width=values.shape[-1])
    return RunningStatistics(vectors_of([spec, *specs]))


def taken(statistics: RunningStatistics) -> dict[str, np.ndarray]:
    return statistics.values()["x"]


def statistics_of(values: np.ndarray, dtype: str, layers: int | None = None):
    found = running(values, dtype, layers=layers)
    found.add("x", 0, values.reshape(-1).view(np.uint8))
    return taken(found)


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 0.0):
    for name, values in expected.items():
        np.testing.assert_allclose(
            found[name].reshape(np.shape(values)), values, rtol=rtol, atol=0, err_msg=name
        )


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
    assert {name: values.tobytes() for name, values in found.items()} == {
        name: values.tobytes() for name, values in expected.items()
    }


@st.composite
def tensors(draw, *, finite: bool) -> tuple[np.ndarray, str]:
    """Values (N, V, F) of any sizes and any bits, or of lanes far from and near to one another."""
    dtype = draw(st.sampled_from([*DTYPES]))
    shape = (draw(st.integers(1, 300)), draw(st.integers(1, 3)), draw(st.integers(1, 35)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        bits = generator.integers(0, 1 << 32, shape, np.uint32)
        values = bits if dtype == "float32" else (bits >> 16).astype(np.uint16)
        values = values.view(DTYPES[dtype])
        if finite:
            values = np.where(np.isfinite(as_float64(values)), values, DTYPES[dtype].type(1))
        return values, dtype
    scales = 10.0 ** generator.integers(-30, 30, shape[-1])
    means = 10.0 ** generator.integers(-2, 7, shape[-1])
    spread = generator.normal(size=shape) * generator.integers(0, 2, shape[-1])
    limit = 60_000 if dtype == "float16" else 3e38
    values = stored(np.clip((spread + means) * scales, -limit, limit), dtype)
    return values, dtype


@settings(max_examples=60, deadline=None)
@given(tensors(finite=True))
def test_means_and_variances_are_the_exact_ones_rounded_once(tensor):
    values, dtype = tensor
    found = statistics_of(values, dtype)
    vectors_VF = as_float64(values).reshape(-1, values.shape[-1])
    assert_equal(found, exact_statistics(vectors_VF))
    # NumPy rounds as it goes.
    expected = numpy_statistics(vectors_VF)
    del expected["variance"]
    assert_equal(found, expected, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(tensors(finite=True))
def test_sums_are_exact_to_their_last_bit(tensor):
    """A vector by itself is summed without rounding, whatever is done with many."""
    values, dtype = tensor
    vectors = values.reshape(-1, values.shape[-1])
    whole, one_by_one = running(values, dtype), running(values, dtype)
    whole.add("x", 0, vectors.reshape(-1).view(np.uint8))
    for number, vector in enumerate(vectors):
        one_by_one.add("x", number * vector.nbytes, vector.view(np.uint8))
    assert whole.state() == one_by_one.state()


@settings(max_examples=30, deadline=None)
@given(tensors(finite=False))
def test_nan_and_infinite_values_count_as_in_numpy(tensor):
    values, dtype = tensor
    vectors_VF = as_float64(values).reshape(-1, values.shape[-1])
    expected = numpy_statistics(vectors_VF)
    finite = np.isfinite(vectors_VF).all(0)
    found = statistics_of(values, dtype)
    assert_equal(
        {"variance": found["variance"][~finite]}, {"variance": np.full((~finite).sum(), np.nan)}
    )
    del expected["variance"]
    # A sum of both signs may come out as any small number in NumPy.
    with np.errstate(invalid="ignore"):
        cancelled = np.abs(expected["mean"]) < 1e-6 * np.abs(vectors_VF).max(0)
    found["mean"][cancelled] = expected["mean"][cancelled]
    assert_equal(found, expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "off centre", "softmax", "constant", "outliers"])
def test_activations_of_any_kind_agree_with_numpy(dtype, kind):
    generator = np.random.default_rng(0)
    normal = generator.normal(size=(5000, 33))
    values = {
        "normal": normal,
        "off centre": normal * 1e-3 + 1e3,
        "softmax": np.exp(9 * normal) / np.exp(9 * normal).sum(1, keepdims=True),
        "constant": np.broadcast_to(np.float64(0.1), normal.shape),
        "outliers": np.where(generator.random(normal.shape) < 1e-3, 1e4 * normal, normal),
    }[kind]
    values = stored(values, dtype)
    found = statistics_of(values, dtype)
    assert_equal(found, numpy_statistics(as_float64(values)), rtol=1e-9)
    if kind == "constant":
        assert not found["variance"].any()


def test_a_spread_of_a_millionth_of_the_mean_is_seen():
    values = (1 + 1e-6 * np.random.default_rng(0).normal(size=(20_000, 4))).astype(np.float32)
    found = statistics_of(values, "float32")
    assert_equal(found, {"variance": values.astype(np.float64).var(0)}, rtol=1e-9)


@pytest.mark.parametrize("layers", [None, 3])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_order_pieces_and_processes_do_not_matter(layers, data):
    dtype = data.draw(st.sampled_from([*DTYPES]))
    shape = (data.draw(st.integers(1, 40)), layers or 1, data.draw(st.integers(1, 20)), 18)
    bits = np.random.default_rng(data.draw(st.integers(0, 99))).integers(
        0, 1 << 32, shape, np.uint32
    )
    values = (bits if dtype == "float32" else (bits >> 16).astype(np.uint16)).view(DTYPES[dtype])
    expected = statistics_of(values, dtype, layers)
    if layers:
        by_layer = [statistics_of(np.ascontiguousarray(values[:, i]), dtype) for i in range(layers)]
        for name, of_layers in expected.items():
            assert_equal({name: of_layers}, {name: np.squeeze([each[name] for each in by_layer])})
    vectors = values.reshape(-1, 18)
    cuts = data.draw(st.lists(st.integers(0, len(vectors)), max_size=6).map(sorted))
    pieces = [*zip([0, *cuts], [*cuts, len(vectors)], strict=True)]
    pieces = data.draw(st.permutations([each for each in pieces if each[0] < each[1]]))
    processes = [running(values, dtype, layers=layers) for _ in range(data.draw(st.integers(1, 3)))]
    for start, stop in pieces:
        process = processes[data.draw(st.integers(0, len(processes) - 1))]
        process.add("x", start * vectors[0].nbytes, vectors[start:stop].reshape(-1).view(np.uint8))
    whole = running(values, dtype, layers=layers)
    for process in data.draw(st.permutations(processes)):
        whole.merge(process.state())
    assert_same_bits(taken(whole), expected)


def test_a_state_of_other_tensors_is_refused():
    ours, others = (running(np.zeros((2, width), np.float32), "float32") for width in (3, 4))
    with pytest.raises(ValueError, match="of other tensors"):
        ours.merge(others.state())


def test_what_is_read_from_a_file_is_digested_and_added():
    values = np.random.default_rng(0).normal(size=(9000, 3, 40)).astype(np.float32)
    with tempfile.TemporaryFile() as file:
        file.write(b"before" + values.tobytes())
        file.flush()
        found = running(values, "float32")
        digest = found.read("x", "float32", file.fileno(), offset=6, nbytes=values.nbytes, start=0)
        other = running(np.zeros((1, 1), np.float32), "float32")
        expected = other.read(
            "y", "float32", file.fileno(), offset=6, nbytes=values.nbytes, start=0
        )
    assert digest == expected
    assert_same_bits(taken(found), statistics_of(values, "float32"))


def test_zeros_are_positive_and_nan_is_one_value():
    bits = np.array([[0x8000_0000, 0xFFC0_0001], [0, 0x7F80_0001]], np.uint32)
    for order in ([0, 1], [1, 0]):
        found = statistics_of(bits[order].view(np.float32), "float32")
        assert found["min"].tobytes() == found["max"].tobytes()
        assert found["min"].tobytes() == np.array([0.0, np.nan]).tobytes()


def test_outliers_are_beyond_six():
    beyond = np.nextafter(np.float32(6), np.float32(7))
    values = np.array([[6, beyond], [-6, -beyond], [np.inf, np.nan]], np.float32)
    np.testing.assert_array_equal(statistics_of(values, "float32")["outliers"], [1, 2])


def test_every_statistic_is_taken_and_no_other():
    found = statistics_of(np.ones((3, 2), np.float32), "float32")
    assert [*found] == [each.name for each in STATISTICS]
