"""Array codecs move bits and know their inverse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_resblock.convert.codecs import AS_IS, OIHW_HWIO, TRANSPOSED, one_block, permute
from parity_tests.support import DTYPES


def random_array(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(
        shape
    )


@st.composite
def arrays_and_axes(draw):
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 7, 33, 40]), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([*DTYPES.values(), np.int8, np.int64]))
    return random_array(shape, dtype, draw(st.integers(0, 99))), draw(
        st.permutations(range(len(shape)))
    )


@settings(max_examples=150)
@given(arrays_and_axes())
def test_permute_is_numpys_transpose_bit_for_bit(case):
    array, axes = case
    moved, truth = permute(array, axes), np.ascontiguousarray(array.transpose(axes))
    assert (moved.dtype, moved.shape, moved.flags.c_contiguous) == (truth.dtype, truth.shape, True)
    assert moved.tobytes() == truth.tobytes()
    assert permute(moved, np.argsort(axes)).tobytes() == array.tobytes()


@settings(max_examples=100)
@given(
    st.tuples(*[st.sampled_from([0, 1, 5, 64, 65])] * 2, *[st.sampled_from([0, 1, 2, 7])] * 2),
    st.integers(0, 99),
)
def test_the_convolution_codec_inverts_itself(shape, seed):
    kernel = random_array(shape, np.float32, seed)
    flax = OIHW_HWIO.to_flax(kernel)
    assert flax.shape == (shape[2], shape[3], shape[1], shape[0]) == OIHW_HWIO.flax_shape(shape)
    assert OIHW_HWIO.torch_shape(flax.shape) == shape
    assert OIHW_HWIO.to_torch(flax).tobytes() == kernel.tobytes()


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, np.float64], ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize(
    "shape", [(300, 37, 3, 3), (9, 301, 5, 7), (3, 2, 200, 300), (1000, 70, 1, 1)], ids=str
)
def test_kernels_of_more_than_one_block_are_moved_whole(shape, dtype):
    kernel = random_array(shape, dtype, 5)
    flax = OIHW_HWIO.to_flax(kernel)
    assert flax.tobytes() == np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)).tobytes()
    assert OIHW_HWIO.to_torch(flax).tobytes() == kernel.tobytes()


def test_arrays_of_one_block_begin_on_cache_lines_and_do_not_overlap():
    like = [
        ((3, 5), np.dtype(np.float32)),
        ((), np.dtype(np.int64)),
        ((0, 4), np.dtype(np.float64)),
        ((17,), np.dtype(np.float16)),
        ((40, 40), np.dtype(np.float32)),
    ]
    arrays = one_block(like)
    assert [(array.shape, array.dtype) for array in arrays] == like
    assert all(array.ctypes.data % 64 == 0 for array in arrays if array.size)
    for number, array in enumerate(arrays):
        array[...] = number
    assert [np.unique(array).tolist() for array in arrays] == [[0], [1], [], [3], [4]]


def test_the_given_place_receives_what_a_new_array_would_have():
    for codec, array in (
        (OIHW_HWIO, random_array((6, 5, 3, 3), np.float32, 6)),
        (AS_IS, random_array((6, 5), np.float32, 7)),
    ):
        (place,) = one_block([(codec.to_flax(array).shape, array.dtype)])
        assert codec.to_flax(array, place) is place
        assert place.tobytes() == codec.to_flax(array).tobytes()


def test_input_of_any_memory_order_is_taken():
    kernel = random_array((6, 5, 3, 3), np.float32, 1)
    for view in (np.asfortranarray(kernel), kernel[::-1, ::-1], np.moveaxis(kernel, 0, -1)):
        found = permute(view, (2, 3, 1, 0)).tobytes()
        assert found == np.ascontiguousarray(view.transpose(2, 3, 1, 0)).tobytes()


def test_a_wrong_permutation_is_noticed():
    kernel = random_array((5, 5, 3, 3), np.float32, 2)
    # a flipped kernel has the right shape
    assert OIHW_HWIO.to_flax(kernel).tobytes() != permute(kernel, (3, 2, 1, 0)).tobytes()


def test_codecs_without_a_move_share_memory():
    vector = random_array((9,), np.float32, 3)
    assert AS_IS.to_flax(vector) is vector
    assert not np.shares_memory(TRANSPOSED.to_flax(random_array((3, 4), np.float32, 4)), vector)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4)], ids=str)
def test_a_shape_of_another_rank_has_no_flax_shape(shape):
    assert OIHW_HWIO.flax_shape(shape) is None
