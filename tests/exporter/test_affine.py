"""The algebra: every operation against torch's own arithmetic in float64, on random networks of branches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from exporter import affine
from exporter.plain import applied, relative_error

SIZES = ((9, 9), (12, 7))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_worked_example_of_five_by_five():
    """conv(X, W, padding 1) + conv(X, p) equals conv(X, W with p added on its centre)."""
    x = torch.arange(25, dtype=torch.float64).reshape(1, 1, 5, 5)
    weight = torch.arange(1, 10, dtype=torch.float64).reshape(1, 1, 3, 3)
    point = torch.full((1, 1, 1, 1), 10.0, dtype=torch.float64)
    value = affine.summed(
        [
            affine.convolution(weight, None, stride=(1, 1), padding=(1, 1), groups=1),
            affine.convolution(point, None, stride=(1, 1), padding=(0, 0), groups=1),
        ]
    )
    fused = affine.materialised(value)
    assert fused.weight[0, 0].tolist() == [[1, 2, 3], [4, 15, 6], [7, 8, 9]]
    assert fused.padding == (1, 1, 1, 1)
    expected = functional.conv2d(x, weight, padding=1) + functional.conv2d(x, point)
    assert torch.equal(applied(fused, x), expected)
    by_hand = 6 * 1 + 7 * 2 + 8 * 3 + 11 * 4 + 12 * 5 + 13 * 6 + 16 * 7 + 17 * 8 + 18 * 9 + 10 * 12
    assert expected[0, 0, 2, 2] == by_hand


def test_the_worked_example_fails_with_the_point_off_centre():
    x = torch.arange(25, dtype=torch.float64).reshape(1, 1, 5, 5)
    weight, point = torch.ones(1, 1, 3, 3, dtype=torch.float64), torch.full((1, 1, 1, 1), 10.0, dtype=torch.float64)
    shifted = weight.clone()
    shifted[0, 0, 0, 0] += 10
    expected = functional.conv2d(x, weight, padding=1) + functional.conv2d(x, point)
    assert not torch.allclose(functional.conv2d(x, shifted, padding=1), expected)


@st.composite
def branch_sums(draw):
    """Random branches of one source, each with its own kernel, groups and batch norm; extent and stride are one."""
    groups = draw(st.sampled_from([1, 2, 4]))
    channels = 4 * draw(st.integers(1, 2))
    stride = draw(st.sampled_from([1, 2]))
    kernels = draw(st.lists(st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3), (5, 1)]), min_size=1, max_size=4))
    branch_groups = [draw(st.sampled_from([1, groups, channels])) for _ in kernels]
    identity = stride == 1 and draw(st.booleans())
    return channels, stride, kernels, branch_groups, identity, draw(st.integers(0, 2**31))


@settings(max_examples=100, deadline=None)
@given(branch_sums())
def test_any_sum_of_branches_is_one_convolution(case):
    channels, stride, kernels, branch_groups, identity, seed = case
    torch.manual_seed(seed)
    values, reference = [], []
    for kernel, groups in zip(kernels, branch_groups, strict=True):
        weight = torch.randn(channels, channels // groups, *kernel, dtype=torch.float64)
        padding = (kernel[0] // 2, kernel[1] // 2)
        value = affine.convolution(weight, None, stride=(stride, stride), padding=padding, groups=groups)
        values.append((value, lambda x, w=weight, p=padding, g=groups: functional.conv2d(x, w, None, stride, p, 1, g)))
    if identity:
        values.append((affine.identity(channels), lambda x: x))
    branches = []
    for value, compute in values:
        scale, bias, mean = torch.randn(3, channels, dtype=torch.float64).unbind()
        variance = torch.rand(channels, dtype=torch.float64) + 0.1
        statistics = {"weight": scale, "bias": bias, "mean": mean, "variance": variance}
        branches.append(affine.batch_normalised(value, eps=1e-3, **statistics))
        reference.append(
            lambda x, c=compute, s=scale, b=bias, m=mean, v=variance: functional.batch_norm(c(x), m, v, s, b, eps=1e-3)
        )
    fused = affine.materialised(affine.summed(branches))
    for size in SIZES:
        x = torch.randn(2, channels, *size, dtype=torch.float64)
        expected = sum(compute(x) for compute in reference)
        assert relative_error(expected, applied(fused, x)) < 1e-11


@pytest.mark.parametrize("groups", [(4, 2), (4, 1), (6, 3), (8, 8)])
def test_fewer_groups_are_a_block_diagonal(groups):
    many, fewer = groups
    weight = noise(24, 24 // many, 3, 3)
    value = affine.convolution(weight, None, stride=(1, 1), padding=(1, 1), groups=many)
    other = affine.convolution(torch.zeros(24, 24 // fewer, 1, 1), None, stride=(1, 1), padding=(0, 0), groups=fewer)
    fused = affine.materialised(affine.summed([value, other]))
    assert fused.groups == fewer
    assert fused.weight.shape == (24, 24 // fewer, 3, 3)
    assert int((fused.weight != 0).sum()) == weight.numel()
    x = noise(1, 24, 5, 5, seed=1)
    expected = functional.conv2d(x, weight, padding=1, groups=many)
    assert relative_error(expected, applied(fused, x)) < 1e-14


@pytest.mark.parametrize(("stride", "padding"), [((2, 2), (1, 1)), ((1, 1), (0, 0))])
def test_values_of_another_shape_cannot_be_summed(stride, padding):
    one = affine.convolution(noise(4, 4, 3, 3), None, stride=(1, 1), padding=(1, 1), groups=1)
    other = affine.convolution(noise(4, 4, 3, 3), None, stride=stride, padding=padding, groups=1)
    with pytest.raises(ValueError, match="cannot be summed"):
        affine.summed([one, other])


def test_half_precision_weights_are_multiplied_in_float64():
    weight, scale = torch.full((1, 1, 1, 1), 1 / 3).half(), torch.tensor([3.0])
    one, zero = torch.ones(1), torch.zeros(1)
    value = affine.convolution(weight, None, stride=(1, 1), padding=(0, 0), groups=1)
    value = affine.batch_normalised(value, weight=scale, bias=zero, mean=zero, variance=one, eps=0.0)
    fused = affine.materialised(value)
    assert fused.weight.dtype == torch.float64
    assert float(fused.weight) == 3.0 * float(weight.double())


def test_a_kernel_that_reads_only_beside_the_centre_is_widened_to_it():
    """A crop: taps at offset 1 alone need a kernel from 0 on, since no padding can be negative."""
    term = affine.Term(torch.ones(2, dtype=torch.float64), noise(2, 2, 1, 1), (1, 1), 1)
    value = affine.AffineConvolution((term,), torch.zeros(2, dtype=torch.float64), 2, (1, 1), (-2, -2))
    fused = affine.materialised(value)
    x = noise(1, 2, 6, 6, seed=2)
    assert fused.padding == (0, 0, 0, 0)
    assert relative_error(functional.conv2d(x, term.kernel)[:, :, 1:, 1:], applied(fused, x)) < 1e-15
