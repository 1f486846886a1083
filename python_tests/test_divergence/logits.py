"""Logits and labels to test on, and the losses of other people's functions."""

import math

import scipy.spatial.distance
import torch
import torch.nn.functional as F

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# |difference| allowed in a loss or a gradient near 1: the rounding of the result, and of logits
# near 5 in the exponent.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


LN2 = math.log(2)


def random_logits(*shape, dtype=torch.float64, seed=0, scale=2.0):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
    ).to(dtype)


def batch(m=3, n=5, c=7, dtype=torch.float64, requires_grad=True):
    """Gives clean logits, adversarial logits, labels of which one is ignored."""
    labels = torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(1))
    labels[1] = -100
    clean, adversarial = (
        random_logits(n, c, dtype=dtype, seed=2),
        random_logits(m, n, c, dtype=dtype, seed=3),
    )
    return clean.requires_grad_(requires_grad), adversarial.requires_grad_(requires_grad), labels


def scipy_js(logits):
    """Gives rows' sum over pairs, by SciPy."""
    p = logits.detach().double().softmax(-1).numpy()
    pairs = [(k, l) for k in range(len(p)) for l in range(k + 1, len(p))]
    return torch.tensor(
        [
            sum(scipy.spatial.distance.jensenshannon(p[k, i], p[l, i]) ** 2 for k, l in pairs)
            for i in range(p.shape[1])
        ]
    )


def torch_js(logits):
    """Gives the same by F.kl_div, differentiable; plain, for distributions that are not close."""
    log_p = logits.log_softmax(-1)
    total = 0
    for k in range(len(logits)):
        for l in range(k + 1, len(logits)):
            mean = torch.logsumexp(torch.stack((log_p[k], log_p[l])), 0) - LN2
            total = (
                total
                + sum(
                    F.kl_div(mean, log_p[i], log_target=True, reduction="none").sum(-1)
                    for i in (k, l)
                )
                / 2
            )
    return total


def torch_loss(clean, adversarial, labels, js_weight, reduction="mean", **options):
    """Gives L_train by PyTorch's functions; every term divided by the rows that are not ignored."""
    keep = (
        labels != options.get("ignore_index", -100)
        if labels.dim() == 1
        else torch.ones(len(labels), dtype=torch.bool)
    )
    rows = F.cross_entropy(clean, labels, reduction="none", **options)
    rows = rows + sum(
        F.cross_entropy(x, labels, reduction="none", **options) for x in adversarial
    ) / len(adversarial)
    rows = (rows + js_weight * torch_js(adversarial)).where(keep, 0)
    return {"mean": rows.sum() / keep.sum(), "sum": rows.sum(), "none": rows}[reduction]
