"""NF4 against its definition, weight by weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.algebra.nf4 import BLOCK, LEVELS, SCALES_BLOCK, from_nf4, nf4_rounded, to_nf4


def levels_of_scales():
    """A sign, e zeros of a tree of seven bits, and the rest as a fraction of [0.1, 1] in the middle of its piece."""
    positive = [(0.1 + 0.9 * (k + 0.5) / 2**bits) * 10.0 ** (bits - 6) for bits in range(7) for k in range(2**bits)]
    return sorted([*positive, *(-x for x in positive), 0.0, 1.0])


def definition(W):
    """Per block of 64: the nearest level, times the block's largest magnitude as 8 bits keep it."""
    flat = W.double().flatten()
    blocks = flat.split(BLOCK)
    largest = torch.stack([block.abs().max() for block in blocks])
    table = torch.tensor(levels_of_scales(), dtype=torch.float64)
    kept = []
    for part in (largest - largest.mean()).split(SCALES_BLOCK):
        most = part.abs().max()
        unit = part / most if most > 0 else part
        kept += [table[(table - x).abs().argmin()] * most for x in unit]
    levels, rounded = torch.tensor(LEVELS, dtype=torch.float64), []
    for block, most, scale in zip(blocks, largest, kept, strict=True):
        unit = block / most if most > 0 else block
        nearest = (unit[:, None] - levels).abs().argmin(1)
        rounded.append(levels[nearest] * (scale + largest.mean()))
    return torch.cat(rounded).view(W.shape).float()


@given(m=st.integers(1, 40), n=st.integers(1, 90), size=st.sampled_from([1e-3, 1.0, 50.0]), seed=st.integers(0, 99))
def test_every_weight_is_the_nearest_level_of_its_block(m, n, size, seed):
    torch.manual_seed(seed)
    W = size * torch.randn(m, n) * torch.rand(m, 1)
    torch.testing.assert_close(nf4_rounded(W), definition(W), rtol=1e-5, atol=1e-6 * size)


@given(m=st.integers(1, 30), n=st.integers(1, 30))
def test_a_weight_takes_four_bits_and_a_scale_eight_for_sixty_four(m, n):
    quantised = to_nf4(torch.randn(m, n))
    assert len(quantised.codes) == -(-m * n // 2)
    assert len(quantised.scales) == -(-m * n // BLOCK)
    assert quantised.codes.dtype == quantised.scales.dtype == torch.uint8


def test_zeros_stay_zeros_and_the_dtype_stays():
    assert torch.equal(nf4_rounded(torch.zeros(3, 70)), torch.zeros(3, 70))
    W = torch.randn(8, 16, dtype=torch.bfloat16)
    assert nf4_rounded(W).dtype == torch.bfloat16
    assert torch.equal(from_nf4(to_nf4(W), W), nf4_rounded(W.float()).bfloat16())


@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_normal_weights_lose_under_a_tenth_of_their_size(spread):
    W = spread * torch.randn(256, 256)
    assert 0.05 < (nf4_rounded(W) - W).norm() / W.norm() < 0.1
