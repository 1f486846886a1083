"""Shards: a mask depends on the element's place in the unsharded tensor."""

import numpy as np
import pytest
import torch
from conftest import compare

from uegr_kernels.selective import op, reference
from uegr_kernels.selective.options import Selection

from .problems import DTYPES, dtype_id, spread_gradient


@pytest.mark.parametrize("normalization", ["minmax", "range", "rank", "constant"])
@pytest.mark.parametrize(
    ("part", "layout"),
    [
        pytest.param(np.s_[2:5, :], (70, 105, 105), id="rows"),
        pytest.param(np.s_[:, 10:21], (10, 11, 35), id="columns"),
        pytest.param(np.s_[3:, 33:], (3 * 35 + 33, 2, 35), id="a corner"),
        pytest.param(np.s_[:, 7:8], (7, 1, 35), id="one column"),
    ],
)
def test_a_shards_mask_is_its_part_of_the_whole(backend, normalization, part, layout):
    g = spread_gradient((60, 35), torch.Generator().manual_seed(4))
    if normalization == "constant":
        scope = None
    else:
        scope = (
            torch.zeros(1, reference.RANK_BINS, dtype=torch.int64)
            if normalization == "rank"
            else torch.tensor([[torch.inf, -torch.inf]]).double()
        )
        run = {
            "layout": [6, 0, g.numel(), g.numel()],
            "sizes": [],
            "normalization": normalization,
            "grad_scale": None,
        }
        op.selective_statistics_(backend, [g], [], [], [], **run, out=scope)
    selection = Selection(
        **{"normalization": normalization, "threshold": 0.5, "keep_probability": 0.5}
    )
    whole, shard = g.clone(), g[part].clone()
    common = {"scope_statistics": scope, "step": 3, "seed": -5, "selection": selection}
    op.select_gradients_(backend, [whole], [], layout=[6, 0, g.numel(), g.numel()], **common)
    op.select_gradients_(backend, [shard], [], layout=[6, *layout], **common)
    assert (whole == 0).any() and (whole != 0).any()
    compare(shard, whole[part], "equal")


def test_far_element_indices(native):
    # Tensors of more than 2^33 elements do not fit here; their last shard does.
    selection = Selection(
        **{"normalization": "constant", "keep_probability": 0.5, "rescale": False}
    )
    for layout in ([2, 2**33 + 5, 1000, 1000], [2, 2**40 - 1, 7, 2**34 + 3]):
        results = []
        for backend in ("reference", native):
            g = torch.ones(1000)
            op.select_gradients_(
                backend,
                [g],
                [],
                scope_statistics=None,
                layout=layout,
                step=1,
                seed=9,
                selection=selection,
            )
            results.append(g)
        assert 400 < results[0].sum() < 600
        compare(results[1], results[0], "equal")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_statistics_are_the_references(native, dtype):
    generator = torch.Generator().manual_seed(8)
    grads = [spread_gradient(shape, generator, dtype) for shape in [(), (0,), (3, 333), (1025,)]]
    grads[2][1, 5], grads[2][2, 7] = torch.nan, -torch.inf
    saliencies = [g.abs() for g in grads]
    layout = [x for i, g in enumerate(grads) for x in (i, 0, g.numel(), g.numel())]
    for rows in (1, len(grads)):
        for given in ([], saliencies):
            for normalization, scale in (
                ("minmax", None),
                ("rank", None),
                ("range", torch.tensor(4.0)),
            ):
                if normalization == "rank":
                    start = torch.zeros(rows, reference.RANK_BINS, dtype=torch.int64)
                else:
                    start = torch.tensor([[torch.inf, -torch.inf]]).double().repeat(rows, 1)
                found = []
                for backend in ("reference", native):
                    out = start.clone()
                    options = {
                        "layout": layout,
                        "sizes": [],
                        "normalization": normalization,
                        "grad_scale": scale,
                    }
                    op.selective_statistics_(backend, grads, given, [], [], **options, out=out)
                    found.append(out)
                if given and normalization == "rank" and dtype in (torch.float32, torch.float64):
                    # sqrt may round over a bin's edge
                    assert (found[0].sum(-1) == found[1].sum(-1)).all()
                else:
                    compare(
                        found[1],
                        found[0],
                        "equal",
                        name=f"{normalization}, {rows} rows, saliency {bool(given)}",
                    )


def test_a_large_ranks_histogram_takes_every_kth_element(native):
    # k = 3
    n, whole = (2077, [2**21 + 77]) if native == "triton" else (2**21 + 77, [])
    g = spread_gradient((n,), torch.Generator().manual_seed(8), torch.bfloat16)
    found = []
    for backend in ("reference", native):
        # k = 3, and 5 for a shard of a larger one
        for layout, sizes in (([0, 0, n, n], whole), ([0, 1000, n, n], [5 * 2**20])):
            out = torch.zeros(1, reference.RANK_BINS, dtype=torch.int64)
            op.selective_statistics_(
                backend,
                [g],
                [],
                [],
                [],
                layout=layout,
                sizes=sizes,
                normalization="rank",
                grad_scale=None,
                out=out,
            )
            found.append(out)
    assert abs(found[0].sum().item() - n) <= 3 and (found[0] % 3 == 0).all()
    compare(found[2], found[0], "equal")
    compare(found[3], found[1], "equal")
