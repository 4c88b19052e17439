"""The scale and the bias that undo what is left of a layer's error: the least squares optimum, and no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.quantization.correction import FARTHEST, Moments, moments_of, refitted

CHANNELS = 5
seeds = st.integers(0, 2**32 - 1)
forms = pytest.mark.parametrize("per_channel", [True, False])


def codes_and_truth(seed, spread=0.2, shape=(11, CHANNELS, 3, 4), scale=None):
    """Whole numbers z, and y that is about (1 + spread n) scale z, and something; (y, z, scale)."""
    random = np.random.default_rng(seed)
    z = random.integers(-3000, 3000, shape).astype(np.float32)
    scale = np.exp(random.normal(size=CHANNELS)) / 100 if scale is None else np.full(CHANNELS, scale)
    along = (1, -1, *[1] * (len(shape) - 2))
    slope = (scale * np.clip(1 + spread * random.standard_normal(CHANNELS), 0.6, 1.8)).reshape(along)
    y = slope * z + random.standard_normal(CHANNELS).reshape(along) + random.normal(size=shape) * slope * 50
    return torch.from_numpy(y.astype(np.float32)), torch.from_numpy(z), torch.from_numpy(scale)


def squared_error(y, z, factor, bias):
    """Summed over everything but channels, in float64."""
    along = (1, -1, *[1] * (y.dim() - 2))
    residual = y.double() - factor.reshape(along) * z.double() - bias.reshape(along)
    return residual.square().transpose(0, 1).flatten(1).sum(1)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, shape=st.sampled_from([(1, CHANNELS), (9, CHANNELS), (8, CHANNELS, 1, 1), (17, CHANNELS, 5, 2)]))
def test_moments_are_those_of_numpy(seed, shape):
    y, z, _ = codes_and_truth(seed, shape=shape)
    found = moments_of(y, z)
    a, b = (part.double().numpy().swapaxes(0, 1).reshape(CHANNELS, -1) for part in (y, z))
    square = (b**2).mean(axis=1).max()
    np.testing.assert_allclose(found.mean_y, a.mean(axis=1), rtol=1e-5, atol=1e-5 * np.abs(a).max())
    np.testing.assert_allclose(found.mean_z, b.mean(axis=1), rtol=1e-5, atol=1e-5 * np.abs(b).max())
    np.testing.assert_allclose(found.variance_z, b.var(axis=1), rtol=1e-5, atol=1e-6 * square)
    covariance = [np.cov(one, other, bias=True)[0, 1] for one, other in zip(a, b, strict=True)]
    product = np.abs(a).max() * np.abs(b).max()
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-5, atol=1e-6 * product)


@forms
@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_no_scale_and_bias_nearby_is_better(per_channel, seed):
    y, z, scale = codes_and_truth(seed, scale=None if per_channel else 0.01)
    factor, bias = refitted(moments_of(y, z), scale, per_channel=per_channel)
    best = squared_error(y, z, factor, bias)
    assert float(best.sum()) < float(squared_error(y, z, scale, torch.zeros(CHANNELS)).sum())
    for step in (1e-2, -1e-2):
        for nearby in (squared_error(y, z, factor * (1 + step), bias), squared_error(y, z, factor, bias + step)):
            assert float(nearby.sum()) > float(best.sum())
        # turned about the mean: the bias that belongs to the other scale
        turned = bias - factor * step * z.double().transpose(0, 1).flatten(1).mean(1)
        assert float(squared_error(y, z, factor * (1 + step), turned).sum()) > float(best.sum())


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_each_channel_has_its_own_scale_only_where_the_form_has(seed):
    y, z, scale = codes_and_truth(seed, scale=0.01)
    moments = moments_of(y, z)
    own, common = (refitted(moments, scale, per_channel=each)[0] for each in (True, False))
    pairs = zip(*(values.double().numpy().swapaxes(0, 1) for values in (z, y)), strict=True)
    expected = [np.polyfit(a.ravel(), b.ravel(), 1)[0] for a, b in pairs]
    np.testing.assert_allclose(own, expected, rtol=1e-4)
    assert float(common.max() - common.min()) < 1e-12
    centred = [(t.double() - t.double().mean((0, 2, 3), keepdim=True)).numpy() for t in (y, z)]
    np.testing.assert_allclose(common[0], (centred[0] * centred[1]).sum() / (centred[1] ** 2).sum(), rtol=1e-4)
    assert float(own.max() / own.min()) > 1.01


@forms
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_the_mean_error_of_a_channel_is_zero_afterwards(per_channel, seed):
    """Bias correction, whatever the scale is; and it was not zero before."""
    y, z, scale = codes_and_truth(seed, scale=None if per_channel else 0.01)
    factor, bias = refitted(moments_of(y, z), scale, per_channel=per_channel)
    along = (1, -1, 1, 1)
    residual = y.double() - factor.reshape(along) * z.double() - bias.reshape(along)
    assert float(residual.mean((0, 2, 3)).abs().max()) < 1e-5 * float(y.abs().max())
    shifted = y.double() - factor.reshape(along) * z.double()
    assert float(shifted.mean((0, 2, 3)).abs().max()) > 1e-3 * float(y.abs().max())


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        (1.2, True),
        (FARTHEST * 0.99, True),
        (FARTHEST * 1.01, False),
        (1.01 / FARTHEST, True),
        (0.4, False),
        (-1, False),
    ],
)
@forms
def test_a_scale_far_from_the_grids_is_not_taken(per_channel, times, taken):
    """With the grid's scale the bias is that of bias correction."""
    _, z, scale = codes_and_truth(3, scale=0.01)
    y = scale.reshape(1, -1, 1, 1) * times * z.double() + 0.5
    factor, bias = refitted(moments_of(y, z.double()), scale, per_channel=per_channel)
    np.testing.assert_allclose(factor, scale * times if taken else scale, rtol=1e-9)
    means = z.double().mean((0, 2, 3))
    np.testing.assert_allclose(bias, y.mean((0, 2, 3)) - factor * means, rtol=1e-6)
    if taken:
        np.testing.assert_allclose(bias, 0.5, rtol=1e-6)


def test_one_channel_beyond_the_bounds_does_not_change_the_others():
    y, z, scale = codes_and_truth(4, spread=0.05)
    y[:, 2] = 10 * scale[2].float() * z[:, 2]
    factor, _ = refitted(moments_of(y, z), scale, per_channel=True)
    assert factor[2] == scale[2]
    assert bool((factor != scale)[[0, 1, 3, 4]].all())


@pytest.mark.parametrize("value", [0.0, 3.0, 12345.0, 1234567.0, -2222221.0])
@pytest.mark.parametrize("truth", ["constant", "as the codes say", "noise"])
@forms
def test_a_channel_whose_codes_are_constant_keeps_the_grids_scale(per_channel, truth, value):
    """Nothing tells its scale; what rounding leaves of a variance of zero must not."""
    y, z, scale = codes_and_truth(5, shape=(64, CHANNELS, 7, 9), scale=0.01)
    for channel in range(CHANNELS) if not per_channel else [1]:
        z[:, channel] = value
        if truth != "noise":
            y[:, channel] = 0.3 if truth == "constant" else 1.003 * float(scale[channel]) * value
    factor, bias = refitted(moments_of(y, z), scale, per_channel=per_channel)
    assert factor[1] == scale[1]
    expected = float(y[:, 1].double().mean()) - float(scale[1]) * value
    assert float(bias[1]) == pytest.approx(expected, abs=1e-6 * max(1.0, float(y[:, 1].abs().max())))
    if per_channel:
        assert bool((factor != scale)[[0, 2, 3, 4]].all())


@pytest.mark.parametrize("offset", [0.0, 500.0, 3000.0])
def test_a_large_mean_does_not_hide_a_small_spread(offset):
    """Up to about fifty deviations: as far as products in float32 carry."""
    y, z, scale = codes_and_truth(6, spread=0.1, shape=(64, CHANNELS, 7, 9))
    z = z / 30 // 1
    expected = refitted(moments_of(y, z), scale * 30, per_channel=True)[0]
    found = refitted(moments_of(y, z + offset), scale * 30, per_channel=True)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_nan_is_not_taken():
    ones = torch.ones(CHANNELS, dtype=torch.float64)
    factor, _ = refitted(Moments(ones, ones, ones * 0, ones * 0), ones * 0.25, per_channel=True)
    assert bool((factor == 0.25).all())
