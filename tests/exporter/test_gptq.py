"""Rounding by GPTQ: the algebra, against brute force and against what it must be better than."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from exporter.quantization import gptq
from exporter.quantization.form import levels
from exporter.quantization.gptq import (
    cross_covariance,
    input_covariance,
    retargeted,
    rounded_by_gptq,
    rounded_to_nearest,
)

OUT, SIZE = 16, 48
bits = pytest.mark.parametrize("bits", [4, 6, 8])
seeds = st.integers(0, 2**31)
some = settings(max_examples=25, deadline=None)
windows = pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 1, 2), (3, 2, 1, 3), (1, 1, 0, 1), (1, 2, 0, 2), (3, 1, 0, 1), (5, 2, 2, 6)],
)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(seed: int, size: int = SIZE) -> Tensor:
    """A covariance whose inputs share a few causes, as neighbouring pixels do, and differ in size."""
    causes = random(seed, size, size // 4) @ random(seed + 1, size // 4, 400) + 0.3 * random(seed + 2, size, 400)
    causes *= random(seed + 3, size, 1).exp()
    return causes @ causes.T


def scale_of(weight: Tensor, largest_code: int) -> Tensor:
    return weight.reshape(len(weight), -1).abs().amax(dim=1) / largest_code


def cost(weight: Tensor, codes: Tensor, scale: Tensor, covariance: Tensor) -> Tensor:
    """Of each row: e H e^T."""
    error = weight - codes.double() * scale.reshape(-1, 1)
    return ((error @ covariance) * error).sum(dim=1)


def unfolded(x: Tensor, kernel: int, stride: int, padding: int, groups: int) -> Tensor:
    """By torch's own im2col: (N, groups, K, positions)."""
    return functional.unfold(x.double(), kernel, 1, padding, stride).reshape(
        len(x), groups, x.shape[1] // groups * kernel**2, -1
    )


@windows
@pytest.mark.parametrize("laid_out", [1, 4000, 1 << 23], ids=["a row", "a few rows or images", "all"])
def test_covariances_are_those_of_im2col(
    kernel: int, stride: int, padding: int, groups: int, laid_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "LAID_OUT", laid_out)
    monkeypatch.setattr(gptq, "ROWS", 7)
    window = (kernel, stride, padding, groups)
    x, y = random(0, 4, 6, 9, 8).float(), random(1, 4, 6, 9, 8).float()
    under_x, under_y = unfolded(x, *window), unfolded(y, *window)
    for got, left, right in (
        (input_covariance(x, *window), under_x, under_x),
        (cross_covariance(x, y, *window), under_x, under_y),
    ):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, torch.einsum("ngkp,ngjp->gkj", left, right), rtol=1e-5, atol=1e-4)
    assert torch.equal(input_covariance(x, *window), input_covariance(x, *window).transpose(1, 2))


@windows
def test_a_covariance_predicts_what_an_error_costs(kernel: int, stride: int, padding: int, groups: int) -> None:
    """The order of the inputs is that of the weight, or the figure would be another."""
    x, error = random(0, 3, 6, 9, 8), random(1, 12, 6 // groups, kernel, kernel)
    covariance = input_covariance(x, kernel, stride, padding, groups)
    seen = functional.conv2d(x, error, None, stride, padding, 1, groups).square().sum(dim=(0, 2, 3))
    rows = error.reshape(groups, 12 // groups, -1)
    predicted = ((rows @ covariance) * rows).sum(dim=2).reshape(-1)
    torch.testing.assert_close(predicted, seen)
    if kernel > 1:
        turned = error.transpose(2, 3).reshape(groups, 12 // groups, -1)
        assert not torch.allclose(((turned @ covariance) * turned).sum(dim=2).reshape(-1), seen, rtol=0.01)


def test_a_covariance_adds_up_over_calls() -> None:
    x = random(0, 6, 4, 7, 7).float()
    parts = sum(input_covariance(part, 3, 1, 1, 2) for part in x.split(2))
    torch.testing.assert_close(parts, input_covariance(x, 3, 1, 1, 2), rtol=1e-5, atol=1e-4)


def test_a_covariance_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large an image: what is laid out at a time is bounded."""
    sizes = []
    under = gptq._under_kernel
    monkeypatch.setattr(gptq, "_under_kernel", lambda *a: sizes.append(under(*a).numel()) or under(*a))
    monkeypatch.setattr(gptq, "LAID_OUT", 10_000)
    input_covariance(torch.ones(2, 3, 100, 90), 3, 1, 1, 1)
    assert max(sizes) <= 10_000
    assert sum(sizes) == 2 * 27 * 100 * 90


@bits
def test_nearest(bits: int) -> None:
    largest_code = levels(bits)
    weight = random(0, 8, 3, 3, 3)
    scale = scale_of(weight, largest_code)
    codes = rounded_to_nearest(weight, scale, largest_code)
    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape
    assert int(codes.abs().amax()) == largest_code
    assert ((weight - codes * scale.reshape(-1, 1, 1, 1)).abs() <= scale.reshape(-1, 1, 1, 1) * 0.5000001).all()
    of_one = rounded_to_nearest(weight, scale.mean(), largest_code)
    assert torch.equal(of_one, (weight / scale.mean()).round().clamp(-largest_code, largest_code).to(torch.int8))
    assert not torch.equal(of_one, codes)


def naive_gptq(weight: Tensor, covariance: Tensor, scale: Tensor, largest_code: int, damping: float) -> Tensor:
    """The paper's algorithm 1 with the inverse of the covariance and without blocks, columns by decreasing diagonal."""
    covariance = covariance + damping * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    order = covariance.diagonal().argsort(descending=True, stable=True)
    factor = torch.linalg.cholesky(torch.linalg.inv(covariance[order][:, order]), upper=True)
    rest, codes = weight[:, order].clone(), torch.zeros_like(weight)
    for j in range(len(order)):
        code = (rest[:, j] / scale).round().clamp(-largest_code, largest_code)
        error = (rest[:, j] - code * scale) / factor[j, j]
        rest[:, j:] -= error.unsqueeze(1) * factor[j, j:]
        codes[:, order[j]] = code
    return codes.to(torch.int8)


@bits
@pytest.mark.parametrize("block", [5, 128])
def test_it_is_the_algorithm_of_the_paper(bits: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "BLOCK", block)
    weight, covariance = random(0, OUT, SIZE), correlated(1)
    scale = scale_of(weight, levels(bits))
    codes = rounded_by_gptq(weight, covariance, scale, levels(bits))
    assert torch.equal(codes, naive_gptq(weight, covariance, scale, levels(bits), 0.01))
    assert codes.dtype == torch.int8
    assert not torch.equal(codes, rounded_to_nearest(weight, scale, levels(bits)))


@bits
@given(seed=seeds)
@some
def test_correlated_inputs_cost_less_than_with_the_nearest_codes(bits: int, seed: int) -> None:
    weight, covariance = random(seed + 9, OUT, SIZE), correlated(seed)
    scale = scale_of(weight, levels(bits))
    nearest, ours = (
        cost(weight, codes, scale, covariance).sum()
        for codes in (
            rounded_to_nearest(weight, scale, levels(bits)),
            rounded_by_gptq(weight, covariance, scale, levels(bits)),
        )
    )
    assert ours < 0.6 * nearest


@bits
@given(seed=seeds)
@some
def test_independent_inputs_get_the_nearest_codes(bits: int, seed: int) -> None:
    weight, covariance = random(seed, OUT, SIZE), torch.diag(random(seed + 1, SIZE).exp())
    scale = scale_of(weight, levels(bits))
    assert torch.equal(
        rounded_by_gptq(weight, covariance, scale, levels(bits)), rounded_to_nearest(weight, scale, levels(bits))
    )


@given(seed=seeds)
@some
def test_the_order_of_the_inputs_does_not_matter(seed: int) -> None:
    weight, covariance = random(seed + 9, OUT, SIZE), correlated(seed)
    shuffled = torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))
    scale = scale_of(weight, 7)
    there = rounded_by_gptq(weight[:, shuffled], covariance[shuffled][:, shuffled], scale, 7)
    assert (there == rounded_by_gptq(weight, covariance, scale, 7)[:, shuffled]).double().mean() > 0.999


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest_and_change_nothing_else() -> None:
    weight, covariance = random(0, OUT, SIZE), correlated(1)
    dead = torch.tensor([0, 5, SIZE - 1])
    covariance[dead], covariance[:, dead] = 0, 0
    alive = torch.tensor([j for j in range(SIZE) if j not in dead])
    scale = scale_of(weight, 7)
    codes = rounded_by_gptq(weight, covariance, scale, 7)
    assert torch.equal(codes[:, dead], rounded_to_nearest(weight, scale, 7)[:, dead])
    assert torch.equal(codes[:, alive], rounded_by_gptq(weight[:, alive], covariance[alive][:, alive], scale, 7))
    nothing = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    assert torch.equal(rounded_by_gptq(weight, nothing, scale, 7), rounded_to_nearest(weight, scale, 7))


@pytest.mark.parametrize("damping", [0.0, 1e-12, 0.01])
def test_a_covariance_of_few_positions_gets_more_damping(damping: float) -> None:
    """Of 3 positions for 48 inputs, and with rounding that makes it indefinite: still better than the nearest codes."""
    weight, x = random(0, OUT, SIZE), random(1, SIZE, 3)
    covariance = x @ x.T - 1e-6 * torch.eye(SIZE, dtype=torch.float64)
    before, scale = covariance.clone(), scale_of(weight, 7)
    codes, nearest = rounded_by_gptq(weight, covariance, scale, 7, damping), rounded_to_nearest(weight, scale, 7)
    assert cost(weight, codes, scale, x @ x.T).sum() < cost(weight, nearest, scale, x @ x.T).sum()
    assert torch.equal(covariance, before)


def test_one_scale_for_all_channels() -> None:
    weight, covariance = random(0, OUT, SIZE), correlated(1)
    scale = weight.abs().max() / 127
    assert torch.equal(
        rounded_by_gptq(weight, covariance, scale, 127),
        rounded_by_gptq(weight, covariance, scale.expand(OUT), 127),
    )


@given(seed=seeds, largest_code=st.sampled_from([1, 7, 127]))
@some
def test_codes_stay_within_levels_even_with_scales_that_clip(seed: int, largest_code: int) -> None:
    weight, covariance = random(seed, OUT, SIZE), correlated(seed)
    codes = rounded_by_gptq(weight, covariance, scale_of(weight, largest_code) / 3, largest_code)
    assert int(codes.min()) >= -largest_code
    assert int(codes.max()) <= largest_code


def images(seed: int) -> Tensor:
    """Smooth and behind a ReLU: neighbouring pixels and channels go together, as in a network; mostly border."""
    coarse = random(seed, 100, 4, 2, 2).float()
    smooth = functional.interpolate(coarse, size=(4, 4), mode="bilinear", align_corners=False)
    return torch.einsum("oc,nchw->nohw", random(99, 6, 4).float(), smooth).add_(0.5).relu_()


def output_error(x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor) -> float:
    error = weight - codes.reshape(weight.shape).double() * scale.reshape(-1, 1, 1, 1)
    return float(functional.conv2d(x.double(), error, None, 1, 1).square().sum())


@bits
def test_a_covariance_of_a_wrong_padding_or_order_rounds_worse(bits: int) -> None:
    """On images that were not calibrated with: the right one is the best, and each wrong one can be told from it."""
    weight, seen, other = random(5, 24, 6, 3, 3), images(1), images(2)
    scale = scale_of(weight, levels(bits))

    def error_with(covariance: Tensor) -> float:
        codes = rounded_by_gptq(weight.reshape(24, -1), covariance, scale, levels(bits))
        return output_error(other, weight, codes, scale)

    right = input_covariance(seen, 3, 1, 1, 1)[0]
    nearest = output_error(other, weight, rounded_to_nearest(weight, scale, levels(bits)), scale)
    columns_first = right.reshape(6, 9, 6, 9).permute(1, 0, 3, 2).reshape(54, 54)
    assert error_with(right) < 0.5 * nearest
    assert error_with(input_covariance(seen, 3, 1, 0, 1)[0]) > 1.2 * error_with(right), "padding"
    assert error_with(columns_first) > 1.5 * error_with(right), "order of the inputs"


@bits
def test_retargeting_makes_up_for_a_quantized_input(bits: int) -> None:
    weight, x = random(5, 24, 6, 3, 3), images(1)
    step = float(x.max()) / levels(bits)
    quantized = (x / step).round() * step
    cross, covariance = cross_covariance(x, quantized, 3, 1, 1, 1)[0], input_covariance(quantized, 3, 1, 1, 1)[0]
    better = retargeted(weight.reshape(24, -1), cross, covariance, 1e-6).reshape(weight.shape)
    truth = functional.conv2d(x.double(), weight, None, 1, 1)

    def error(candidate: Tensor) -> float:
        return float((functional.conv2d(quantized.double(), candidate, None, 1, 1) - truth).square().sum())

    assert error(better) < 0.99 * error(weight)
    for seed in range(3):  # least squares: a step in any direction makes it worse
        assert error(better + 0.01 * random(seed, *weight.shape)) > error(better)
    swapped = retargeted(weight.reshape(24, -1), cross.T, covariance, 1e-6).reshape(weight.shape)
    assert error(swapped) > error(better), "cross the wrong way round"


@given(seed=seeds, damping=st.sampled_from([1e-6, 0.01, 1.0]))
@some
def test_retargeting_to_the_same_input_is_no_change(seed: int, damping: float) -> None:
    weight, covariance = random(seed, OUT, SIZE), correlated(seed)
    assert torch.equal(retargeted(weight, covariance, covariance, damping), weight)


def test_retargeting_by_a_factor() -> None:
    """An input that comes at half its size needs weights of twice the size."""
    weight, covariance = random(0, OUT, SIZE), correlated(1)
    doubled = retargeted(weight, covariance / 2, covariance / 4, 1e-9)
    torch.testing.assert_close(doubled, 2 * weight, rtol=1e-3, atol=1e-3)


def test_retargeting_to_an_input_that_is_always_zero_is_no_change() -> None:
    weight, nothing = random(0, OUT, SIZE), torch.zeros(SIZE, SIZE, dtype=torch.float64)
    assert torch.equal(retargeted(weight, nothing, nothing), weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [(3, 3), (3, 40)], ids=["diagonal", "beside it"])
def test_what_is_not_finite_is_refused(bad: float, where: tuple[int, int]) -> None:
    weight, covariance, scale = random(0, OUT, SIZE), correlated(1), torch.ones(OUT)
    broken = covariance.clone()
    broken[where] = broken[where[::-1]] = bad
    with pytest.raises(ValueError, match=r"covariance.* NaN.* infinite"):
        rounded_by_gptq(weight, broken, scale, 127)
    with pytest.raises(ValueError, match=r"covariance.* NaN.* infinite"):
        retargeted(weight, covariance, broken)
    with pytest.raises(ValueError, match=r"covariance.* NaN.* infinite"):
        retargeted(weight, broken, covariance)
    weight[2, 2] = bad
    with pytest.raises(ValueError, match="weight is NaN or infinite"):
        rounded_by_gptq(weight, covariance, scale, 127)
    with pytest.raises(ValueError, match="weight is NaN or infinite"):
        rounded_to_nearest(weight, scale, 127)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_is_a_positive_number(scale: float) -> None:
    weight, scales = random(0, OUT, SIZE), torch.ones(OUT)
    scales[3] = scale
    with pytest.raises(ValueError, match="not a positive number"):
        rounded_to_nearest(weight, scales, 127)
    with pytest.raises(ValueError, match="not a positive number"):
        rounded_by_gptq(weight, correlated(1), torch.tensor(scale), 127)
