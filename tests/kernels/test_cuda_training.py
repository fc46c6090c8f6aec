"""The optimiser of the CuPy kernels without a GPU, against the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from host_device import fenced, on_host
from test_cuda import DTYPES, in_fences, wide

from rnnkit.kernels import reference

ORDERS = ("forward", "reverse", "shuffled")
# Around a vector, a warp and a block of 256 threads that each work on 4 elements.
SIZES = (0, 1, 3, 4, 129, 1024, 1027, 4099)
# A few operations in the dtype, of which those of half precision are one, when a float32 is rounded to it.
ROUNDING = {"float32": 2e-6, "float64": 1e-14, "float16": 2**-10, "bfloat16": 2**-7}


@pytest.fixture
def cuda():
    module = on_host()
    module.device.launches.clear()
    yield module
    module.device.order = "forward"


def at_odd_address(array):
    memory = fenced((array.size + 1,), array.dtype)
    memory[1:] = array.reshape(-1)
    return memory[1:].reshape(array.shape)


# ---------------------------------------------------------------------------------------------- Adam


def vectors(rng, N, dtype):
    """Return flat, d_flat, mean and square as a run would have them."""
    kind = DTYPES[dtype]
    mean, square = rng.standard_normal(N), rng.standard_normal(N) ** 2
    flat, d_flat = (rng.standard_normal(N).astype(kind) for _ in range(2))
    return [flat, d_flat, mean.astype(wide(dtype)), square.astype(wide(dtype))]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_agrees_with_the_reference(cuda, rng, dtype, order, decay):
    cuda.device.order = order
    settings = {"betas": (0.8, 0.95), "lr": 0.05, "eps": 1e-3, "weight_decay": decay}
    for N, move in itertools.product(SIZES, (in_fences, at_odd_address)):
        expected = vectors(rng, N, dtype)
        ours = [move(array) for array in expected]
        for steps in (1, 2):
            cuda.device.launches.clear()
            cuda.adam(*ours, steps=steps, **settings)
            assert cuda.device.launches == ["adam"] * (N > 0)
            reference.adam(*expected, steps=steps, **settings)
        for name, one, other in zip(("flat", "d_flat", "mean", "square"), ours, expected, strict=True):
            # The vectors beside the parameters are never rounded to half precision.
            bound = ROUNDING[dtype if name == "flat" else str(wide(dtype))]
            assert one.dtype == other.dtype
            one, other = one.astype(np.float64), other.astype(np.float64)
            np.testing.assert_allclose(one, other, rtol=bound, atol=bound, err_msg=f"{name}, N={N}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adam_in_half_precision_is_float32_but_for_the_parameters(cuda, rng, dtype):
    """eps is 1e-8 and squares of 1e-5: in half precision both would be 0, and the step infinite."""
    flat, d_flat, mean, square = (in_fences(array) for array in vectors(rng, 70, dtype))
    before = flat.astype(np.float32)
    d_flat[...], mean[...], square[...] = 1e-5, 0.0, 0.0
    cuda.adam(flat, d_flat, mean, square, betas=(0.9, 0.999), steps=1, lr=0.25, eps=1e-8, weight_decay=0.0)
    np.testing.assert_array_equal(flat, (before - np.float32(0.25) / np.float32(1.001)).astype(flat.dtype))
