"""Two optimizers, one whose state is carried along and one that saw transformed gradients from the start."""

import torch
from torch import nn

from scalora.engine.optimizers import carry_state


def twins(make, alpha, beta, sizes=(6, 5), steps=4, dtype=torch.float64, seed=0):
    """Parameters and optimizers of both, just before the last step, all gradients in place, and at one point.

    Args:
        make: parameters → optimizer.
        alpha: (r,), the factor of A's columns and of the gradients of Bᵀ.
        beta: (r,), the factor of B's columns and of the gradients of A.
    """
    generator = torch.Generator().manual_seed(seed)
    (m, n), r = sizes, len(alpha)
    alpha, beta = alpha.to(dtype), beta.to(dtype)

    def draw():
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((m, r), (r, n))]

    start, gradients = draw(), [draw() for _ in range(steps)]
    carried, transformed = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    one, other = make(carried), make(transformed)
    for i, (g_A, g_Bt) in enumerate(gradients):
        if i:
            one.step()
            other.step()
        carried[0].grad, carried[1].grad = g_A.clone(), g_Bt.clone()
        transformed[0].grad, transformed[1].grad = g_A * beta, g_Bt * alpha[:, None]
    carry_state(one, carried, [beta, alpha[:, None]])
    for p, q in zip(carried, transformed, strict=True):
        q.data.copy_(p.data)  # so that only the state can make a difference
    return (carried, one), (transformed, other)


def stepped(make, alpha, beta, **options):
    """Both after the last step: two lists of parameters."""
    (carried, one), (transformed, other) = twins(make, alpha, beta, **options)
    one.step()
    other.step()
    return carried, transformed
