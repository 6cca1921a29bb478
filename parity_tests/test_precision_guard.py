"""The precision guard counts mantissa bits exactly; strict() sets both frameworks and undoes it."""

import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from flax_resblock.errors import InputError
from flax_resblock.nn.conv import convolve
from flax_resblock.parity.devices import (
    WORKSPACE,
    XLA_FLAG,
    accelerator,
    jax_device,
    make_xla_deterministic,
    settings_in_force,
    settings_sentence,
    strict,
    torch_device,
)
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.precision import (
    MeasuredPrecision,
    mantissa_bits,
    measure_precision,
    require,
)

BITS = {"float64": 52, "float32": 23, "bfloat16": 7}
DEVICES = {"flax": jax_device("cpu"), "torch": torch_device(None)}


def rounded(array, bits):
    """float32 to ``bits`` mantissa bits, nearest even, as a tensor core treats its operands."""
    integers = np.ascontiguousarray(array, np.float32).view(np.uint32)
    drop = np.uint32(23 - bits)
    integers = integers + (
        ((integers >> drop) & 1) + (np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1)
    )
    return (integers >> drop << drop).view(np.float32)


def cut(array, bits):
    """The same by truncation."""
    drop = np.uint32(23 - bits)
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> drop << drop).view(
        np.float32
    )


def three_passes(values, weights):
    """bfloat16x3: operands as sums of two bfloat16 numbers, less the product of the small parts."""
    (a, b), (c, d) = (
        (high, (x - high).astype(ml_dtypes.bfloat16).astype(np.float32))
        for x in (values, weights)
        for high in [x.astype(ml_dtypes.bfloat16).astype(np.float32)]
    )
    return a @ c + (a @ d + b @ c)


def accumulated_in(dtype):
    def operate(values, weights):
        total = np.zeros((len(values), weights.shape[1]), dtype)
        for channel in range(len(weights)):
            total = (
                total + (values[:, channel, None] * weights[None, channel]).astype(dtype)
            ).astype(dtype)
        return total.astype(values.dtype)

    return operate


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("side", DEVICES)
def test_the_cpu_keeps_every_bit(side, dtype):
    found = measure_precision(side, DEVICES[side], dtype)
    assert [one.operation for one in found] == ["convolution", "matrix product"]
    assert all(
        (one.mantissa_bits, one.expected_bits, one.dtype, one.side)
        == (BITS[dtype], BITS[dtype], dtype, side)
        for one in found
    )
    require(found)


CROPPED = {
    "operands rounded to TF32": (lambda v, w: rounded(v, 10) @ rounded(w, 10), 10, "TF32"),
    "operands cut to TF32": (lambda v, w: cut(v, 10) @ cut(w, 10), 10, "TF32"),
    "operands rounded to bfloat16": (lambda v, w: rounded(v, 7) @ rounded(w, 7), 7, "bfloat16"),
    "only the values rounded": (lambda v, w: rounded(v, 10) @ w, 10, "TF32"),
    "only the weights rounded": (lambda v, w: v @ rounded(w, 7), 7, "bfloat16"),
    "the result rounded": (lambda v, w: rounded(v @ w, 10), 10, "TF32"),
    "three bfloat16 passes": (three_passes, 16, "three bfloat16 passes"),
    "accumulated in float16": (accumulated_in(np.float16), 10, "float16"),
    "accumulated in bfloat16": (accumulated_in(ml_dtypes.bfloat16), 7, "bfloat16"),
    "the last bit lost": (lambda v, w: cut(v @ w, 22), 22, "22 of 23 mantissa bits"),
}


@pytest.mark.parametrize("case", CROPPED)
def test_lost_bits_are_counted_and_refused_by_name(case):
    operate, bits, name = CROPPED[case]
    assert mantissa_bits(operate, "float32") == bits
    with pytest.raises(InputError) as error:
        require(
            [
                MeasuredPrecision("torch", "cuda:0", "float32", "convolution", 23, 23),
                MeasuredPrecision("flax", "tpu:0", "float32", "matrix product", bits, 23),
            ]
        )
    message = str(error.value)
    assert f"flax on tpu:0: the float32 matrix product keeps {bits} of 23 mantissa bits" in message
    assert name in message
    assert "jax.default_matmul_precision('highest')" in message
    assert "convolution" not in message
    assert "\n" not in message


def test_a_sum_is_caught_though_every_product_is_exact():
    """Few bits in every operand: only the accumulator can lose some."""

    def only_sums_are_rounded(values, weights):
        several = (values != 0).sum(1, keepdims=True) * (weights != 0).any(0) > 1
        summing = bool((weights == 1).all())
        exact = values @ weights
        return np.where(several & summing, rounded(exact, 10), exact)

    assert mantissa_bits(only_sums_are_rounded, "float32") == 10
    assert mantissa_bits(lambda v, w: v @ w, "float32") == 23


def test_float64_without_x64_is_caught():
    assert mantissa_bits(lambda v, w: np.asarray(jnp.asarray(v) @ jnp.asarray(w)), "float64") == 23


def test_an_operation_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"to \(64, 64\), not to \(256, 64\)"):
        mantissa_bits(lambda _, w: w, "float32")
    with pytest.raises(TypeError, match="is no device of jax"):
        measure_precision("flax", torch.device("cpu"), "float32")


def test_a_low_precision_in_the_code_of_an_operation_is_found():
    """An explicit bfloat16 in a program, whatever the surrounding settings."""

    def operate(values, weights):
        with strict():
            return np.asarray(
                jnp.matmul(
                    values.astype(jnp.bfloat16),
                    weights.astype(jnp.bfloat16),
                    preferred_element_type=jnp.float32,
                )
            )

    assert mantissa_bits(operate, "float32") == 7


SETTINGS = (
    *("", "cudnn", "mkldnn"),
    *("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
)


def _node(name):
    node = torch.backends
    for part in filter(None, name.split(".")):
        node = getattr(node, part)
    return node


def _precisions():
    """Every setting of torch, and what each becomes when the common one changes."""
    states, before = [], torch.backends.fp32_precision
    for common in ("tf32", "ieee", before):
        torch.backends.fp32_precision = common
        states.append(tuple(_node(name).fp32_precision for name in SETTINGS))
    return states


def _state():
    deterministic = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    return (
        _precisions(),
        deterministic,
        torch.backends.cudnn.benchmark,
        os.environ.get(WORKSPACE),
        jax.config.jax_default_matmul_precision,
    )


def _benchmark():
    torch.backends.cudnn.benchmark = True


def _set(name, value):
    return lambda: setattr(_node(name), "fp32_precision", value)


OUTSIDE = {
    "as torch starts": lambda: None,
    "matmul precision medium": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul precision high": lambda: torch.set_float32_matmul_precision("high"),
    "everything TF32": _set("", "tf32"),
    "cuDNN TF32": _set("cudnn", "tf32"),
    "convolutions of oneDNN bfloat16": _set("mkldnn.conv", "bf16"),
    "only convolutions of cuDNN true": _set("cudnn.conv", "ieee"),
    "benchmarking": _benchmark,
    "deterministic, only warning": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "a workspace of cuBLAS": lambda: os.environ.__setitem__(WORKSPACE, ":16:8"),
}


@pytest.fixture
def settings(monkeypatch):
    """Puts torch back, however a test leaves it."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = {name: _node(name).fp32_precision for name in SETTINGS}
    matmul, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    os.environ.pop(WORKSPACE, None)
    torch.set_float32_matmul_precision(matmul)
    for name in SETTINGS:
        if (
            _node(name).fp32_precision != before[name]
        ):  # parents come first; a setting that inherits again needs no value of its own
            _node(name).fp32_precision = before[name]
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("failing", [False, True])
def test_strict_sets_everything_and_puts_it_back(outside, failing, settings):
    OUTSIDE[outside]()
    before, matmul = _state(), torch.get_float32_matmul_precision() if "matmul" in outside else None
    with pytest.raises(ZeroDivisionError) if failing else strict():
        if failing:
            with strict():
                assert torch.backends.cudnn.conv.fp32_precision == "ieee"
                raise ZeroDivisionError
        assert {_node(name).fp32_precision for name in SETTINGS} == {"ieee"}
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ[WORKSPACE] in (":4096:8", ":16:8")
        assert jax.config.jax_default_matmul_precision == "highest"
    assert _state() == before
    if matmul is not None:
        assert torch.get_float32_matmul_precision() == matmul


def test_strict_reaches_the_products_that_name_no_precision():
    """The program that a convolution is lowered to; the CPU computes the same either way."""

    def program():
        conv = jax.jit(
            lambda x, w: convolve(x, w, stride=1, padding=1, dilation=1, groups=1, precision=None)
        )
        return conv.lower(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))).as_text()

    assert "HIGHEST" not in program()
    with strict():
        assert "HIGHEST" in program()
    assert "HIGHEST" not in program()


def test_tf32_reaches_both_sides_and_leaves_strict_as_it_was():
    def program():
        product = jax.jit(lambda x: x @ x)
        return product.lower(jnp.ones((4, 4))).as_text()

    with strict():
        before = {name: _node(name).fp32_precision for name in SETTINGS}
        with PRECISIONS["tf32"].on_torch():
            assert {_node(name).fp32_precision for name in SETTINGS} == {"tf32"}
        assert {name: _node(name).fp32_precision for name in SETTINGS} == before
        with PRECISIONS["tf32"].on_jax(None):
            assert "HIGHEST" not in program()
        assert "HIGHEST" in program()
    found = measure_precision("torch", torch.device("cpu"), "tf32")
    assert {(one.dtype, one.expected_bits) for one in found} == {("tf32", 10)}


def test_an_operation_without_deterministic_algorithm_warns_within_strict():
    index, value = torch.tensor([0]), torch.ones(1)
    with strict(), pytest.warns(UserWarning, match="deterministic"):
        torch.zeros(3).put_(index, value)


def test_every_switch_is_in_its_strict_position(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=1")
    make_xla_deterministic()
    make_xla_deterministic()  # twice is once
    before = torch.backends.fp32_precision
    assert settings_in_force() == {
        "jax default_matmul_precision": "highest",
        "XLA_FLAGS": f"--xla_some_flag=1 {XLA_FLAG}",
        "torch fp32_precision": "ieee",
        "torch cudnn.conv": "ieee",
        "torch cuda.matmul": "ieee",
        "torch mkldnn.conv": "ieee",
        "torch deterministic algorithms": "True",
        "torch cudnn.benchmark": "False",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    assert torch.backends.fp32_precision == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert "torch cudnn.conv ieee" in settings_sentence()


def test_a_choice_of_ones_own_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    make_xla_deterministic()
    assert settings_in_force()["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false"


@pytest.mark.parametrize("kind", ["tpu", "gpu", "cuda", "quantum"])
def test_an_absent_device_of_jax_gives_one_paragraph(kind):
    if kind != "quantum" and accelerator() is not None:
        pytest.skip("this machine has an accelerator")
    with pytest.raises(InputError) as error:
        jax_device(kind)
    message = str(error.value)
    assert f"'{kind}'" in message
    assert "cpu:0" in message
    assert "\n" not in message
    assert {
        "tpu": "flax-resblock[tpu]",
        "gpu": "flax-resblock[cuda]",
        "cuda": "flax-resblock[cuda]",
        "quantum": "Kinds are cpu, gpu",
    }[kind] in message


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("cuda:97", "cuda|Choose one of these"),
        ("xpu:97", "xpu|Choose one"),
        ("quantum", "Names are cpu"),
        ("meta", "Names are cpu"),
    ],
)
def test_an_absent_device_of_torch_gives_one_paragraph(name, advice):
    with pytest.raises(InputError, match=advice) as error:
        torch_device(name)
    assert f"'{name}', which is not there. Devices of torch: cpu" in str(error.value)
    assert "\n" not in str(error.value)


def test_devices_that_are_there_are_given():
    assert jax_device("cpu").platform == "cpu"
    assert jax_device(None) == jax.devices()[0]
    assert torch_device(None) == torch_device("cpu") == torch.device("cpu")


def test_asking_for_an_accelerator_never_raises(monkeypatch):
    def no_backend():
        raise RuntimeError("Unable to initialize backend")

    monkeypatch.setattr("flax_resblock.parity.devices.backends", no_backend)
    assert accelerator() is None


@pytest.mark.accelerator
def test_strict_float32_is_float32_on_the_accelerator(accelerator_device):
    with strict():
        for dtype in BITS:
            require(measure_precision("flax", accelerator_device, dtype))


@pytest.mark.accelerator
def test_float32_without_strict_is_seen_for_what_it_is_on_the_accelerator(accelerator_device):
    """TF32 or bfloat16 unless told otherwise; a device with neither keeps every bit."""
    found = measure_precision("flax", accelerator_device, "float32")
    assert {one.mantissa_bits for one in found} <= {7, 10, 23}, found


@pytest.mark.accelerator
def test_strict_float32_is_float32_on_torchs_accelerator():
    if not torch.accelerator.is_available():
        pytest.skip("torch has no accelerator here")
    device = torch_device(torch.accelerator.current_accelerator().type)
    with strict():
        require(measure_precision("torch", device, "float32"))
