"""Modules that have seen gradients, and what their masks are to be."""

import math

import torch

from uegr_kernels.core import philox
from uegr_kernels.dropout import AdaptiveDropout

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# A result is rounded once, after 1 - r and a division in the rates' dtype, which is float32 but for
# .double() modules.
RELATIVE = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def next_key():
    """Gives the key that the next call will draw; leaves the generator as it is."""
    state = torch.get_rng_state()
    key = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
    torch.set_rng_state(state)
    return key


def uniform(shape, key):
    return philox.uniform(
        philox.words(torch.arange(math.prod(shape)), seed=key, step=0, stream=0)
    ).view(shape)


def teach(module, norms):
    """Makes a call and a backward that leave the given norms of dL/dh_j, and the call that folds
    them.
    """
    norms = torch.as_tensor(norms, dtype=module.gradient_norm.dtype)
    x = torch.zeros(1, len(norms), dtype=norms.dtype, requires_grad=True)
    module(x).backward(norms[None])
    module(x.detach())


def taught(norms=(1.0, 2.0, 3.0), num_features=None, **options):
    """Gives a module that has seen these norms, and has one more backward's pending."""
    module = AdaptiveDropout(num_features, p=options.pop("p", 0.2), **options)
    module(torch.ones(1, len(norms)))
    teach(module, norms)
    x = torch.zeros(1, len(norms), requires_grad=True)
    module(x).backward(torch.ones(1, len(norms)))
    return module


def assert_same_state(one, other):
    assert torch.equal(one.gradient_norm, other.gradient_norm) and torch.equal(
        one.pending, other.pending
    )
    assert (
        one.gradient_norm.dtype == other.gradient_norm.dtype
        and one.gradient_norm.any()
        and one.pending.any()
    )
