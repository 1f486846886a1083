"""Arguments: NumPy's numbers, modules' keywords, and what is refused."""

import copy
import pickle

import numpy as np
import pytest
import torch

from uegr_kernels.divergence import (
    PairwiseJSLoss,
    UEGRLoss,
    linear_pairwise_js,
    linear_uegr_loss,
    pairwise_js,
    uegr_loss,
)

from .logits import batch, random_logits


# NumPy warns where a comparison overflows its narrow types
@pytest.mark.filterwarnings("error")
def test_numpys_numbers_and_flags_are_taken(backend):
    clean, adversarial, labels = batch(requires_grad=False)
    plain = {
        "js_weight": 0.5,
        "label_smoothing": 0.25,
        "ignore_index": -100,
        "return_parts": True,
        "inplace_backward": False,
    }
    numpys = dict(
        zip(
            plain,
            (np.float32(0.5), np.float16(0.25), np.int64(-100), np.bool_(True), np.bool_(False)),
            strict=True,
        )
    )
    for name in (*plain, "chunk_rows"):
        options = (
            plain
            | {"chunk_rows": 2}
            | {
                key: value
                for key, value in (numpys | {"chunk_rows": np.int32(2)}).items()
                if key == name
            }
        )
        found = linear_uegr_loss(
            clean, adversarial, random_logits(7, 7), labels, backend=backend, **options
        )
        expected = linear_uegr_loss(
            clean, adversarial, random_logits(7, 7), labels, backend=backend, **plain, chunk_rows=2
        )
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    for x, y in zip(
        UEGRLoss(**numpys, backend=backend)(clean, adversarial, labels),
        uegr_loss(clean, adversarial, labels, **plain, backend=backend),
        strict=True,
    ):
        assert torch.equal(x, y)
    with pytest.raises(TypeError, match="js_weight=True is a bool"):
        uegr_loss(clean, adversarial, labels, js_weight=True, backend=backend)
    with pytest.raises(TypeError, match="js_weight=.* is a bool"):
        uegr_loss(clean, adversarial, labels, js_weight=np.bool_(True), backend=backend)


def test_modules(backend):
    clean, adversarial, labels = batch()
    module = UEGRLoss(js_weight=0.3, label_smoothing=0.1, backend=backend)
    expected = uegr_loss(
        clean, adversarial, labels, js_weight=0.3, label_smoothing=0.1, backend=backend
    )
    assert torch.equal(module(clean, adversarial, labels), expected)
    js = PairwiseJSLoss(reduction="sum", backend=backend)
    assert torch.equal(js(adversarial), pairwise_js(adversarial, reduction="sum", backend=backend))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(clean, adversarial, labels), module(clean, adversarial, labels))
    assert repr(js) == f"PairwiseJSLoss(reduction='sum', backend='{backend}')"
    with pytest.raises(TypeError, match="UEGRLoss has no option 'lambda_'"):
        UEGRLoss(lambda_=1)
    with pytest.raises(ValueError, match="reduction='max' is not one of its values"):
        PairwiseJSLoss(reduction="max")


X = torch.zeros(2, 4, 3)


Y = torch.zeros(4, dtype=torch.long)


BAD_INPUT = {
    "one pass": (lambda: pairwise_js(X[:1]), ValueError, "logits: one pass alone"),
    "one pass of hidden states": (
        lambda: linear_pairwise_js(X[:1], X[0]),
        ValueError,
        r"hidden: one pass alone \(shape \(1, 4, 3\)\)",
    ),
    "no pass": (
        lambda: linear_uegr_loss(X[0], X[:0], X[0], Y),
        ValueError,
        r"adversarial_hidden of shape \(0, 4, 3\) holds no pass",
    ),
    "two axes": (
        lambda: pairwise_js(X[0]),
        ValueError,
        r"logits has shape \(4, 3\); give \[m, N, "
        r"C\]",
    ),
    "no tensor": (lambda: pairwise_js(3), TypeError, r"logits is a int; give a tensor \[m"),
    "list of lists": (lambda: pairwise_js([[1.0], [2.0]]), TypeError, r"logits\[0\] is a list"),
    "integers": (lambda: pairwise_js(X.long()), TypeError, "logits is torch.int64"),
    "complex": (lambda: pairwise_js(X.to(torch.complex64)), TypeError, "logits is torch.complex64"),
    "sparse": (lambda: pairwise_js(X.to_sparse()), TypeError, "logits is sparse"),
    "no classes": (lambda: pairwise_js(X[..., :0]), ValueError, "empty last axis"),
    "unequal rows": (
        lambda: pairwise_js([X[0], X[1, :3]]),
        ValueError,
        r"logits\[1\] has rows "
        r"\(3, 3\)",
    ),
    "unequal dtypes": (
        lambda: uegr_loss(X[0], X.double(), Y),
        TypeError,
        "adversarial_logits is torch.float64",
    ),
    "unequal devices": (
        lambda: uegr_loss(X[0], X.to("meta"), Y),
        ValueError,
        "adversarial_logits is on meta",
    ),
    "labels elsewhere": (
        lambda: uegr_loss(X[0], X, Y.to("meta")),
        ValueError,
        "labels are on meta",
    ),
    "reduction": (
        lambda: pairwise_js(X, reduction="avg"),
        ValueError,
        "reduction='avg' is not one of its values; use 'mean'",
    ),
    "task": (lambda: uegr_loss(X[0], X, Y, task="ranking"), ValueError, "task='ranking'"),
    "smoothing": (
        lambda: uegr_loss(X[0], X, Y, label_smoothing=1.5),
        ValueError,
        "label_smoothing=1.5 is out of range",
    ),
    "weight": (
        lambda: uegr_loss(X[0], X, Y, js_weight=-1),
        ValueError,
        "js_weight=-1 is out of range",
    ),
    "weight type": (
        lambda: uegr_loss(X[0], X, Y, js_weight="1"),
        TypeError,
        "js_weight='1' is a str",
    ),
    "ignore": (
        lambda: uegr_loss(X[0], X, Y, ignore_index=0.5),
        TypeError,
        "ignore_index=0.5 is a float",
    ),
    "flag": (lambda: uegr_loss(X[0], X, Y, return_parts=1), TypeError, "return_parts=1 is a int"),
    "backend": (
        lambda: pairwise_js(X, backend="rocm"),
        ValueError,
        "backend='rocm' is not a backend",
    ),
    "label range": (
        lambda: uegr_loss(X[0], X, Y + 3),
        ValueError,
        "labels hold 3; give classes from 0 to 2",
    ),
    "negative label": (lambda: uegr_loss(X[0], X, Y - 1), ValueError, "labels hold -1"),
    "label shape": (lambda: uegr_loss(X[0], X, Y[:3]), ValueError, r"labels have shape \(3,\)"),
    "label type": (
        lambda: uegr_loss(X[0], X, Y.float()),
        TypeError,
        r"labels \[N\] are torch.float32",
    ),
    "label bool": (lambda: uegr_loss(X[0], X, Y.bool()), TypeError, "labels are torch.bool"),
    "soft shape": (
        lambda: uegr_loss(X[0], X, X[0, :, :2]),
        ValueError,
        r"labels have shape \(4, "
        r"2\)",
    ),
    "soft ignored": (
        lambda: uegr_loss(X[0], X, X[0], ignore_index=1),
        ValueError,
        "ignore_index=1 means nothing",
    ),
    "regression on indices": (
        lambda: uegr_loss(X[0], X, Y, task="regression"),
        TypeError,
        "takes floats",
    ),
    "regression shape": (
        lambda: uegr_loss(X[0], X, Y.float(), task="regression"),
        ValueError,
        r"labels have shape \(4,\)",
    ),
    "regression smoothed": (
        lambda: uegr_loss(X[0], X, X[0], task="regression", label_smoothing=0.1),
        ValueError,
        "means nothing",
    ),
    "hidden": (lambda: linear_pairwise_js(X[0], X[0]), ValueError, r"hidden has shape \(4, 3\)"),
    "weight shape": (
        lambda: linear_pairwise_js(X, X[0, :, :2]),
        ValueError,
        r"hidden has H = 3, weight of shape \(4, 2\) 2",
    ),
    "bias shape": (
        lambda: linear_pairwise_js(X, X[0], X[0, 0]),
        ValueError,
        r"bias has shape \(3,\); give \[C\] = \(4,\)",
    ),
    "bias dtype": (
        lambda: linear_pairwise_js(X, X[0], torch.zeros(4).double()),
        TypeError,
        "bias is torch.float64 and hidden",
    ),
    "hidden rows": (
        lambda: linear_uegr_loss(X[0, :3], X, X[0], Y[:3]),
        ValueError,
        "adversarial_hidden has 4 rows and clean_hidden 3",
    ),
    "chunk": (
        lambda: linear_pairwise_js(X, X[0], chunk_rows=0),
        ValueError,
        "chunk_rows=0 is out of range",
    ),
    "chunk type": (
        lambda: linear_pairwise_js(X, X[0], chunk_rows=1.5),
        TypeError,
        "chunk_rows=1.5 is a float",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call()


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(
        RuntimeError, match="backend='cuda' cannot serve divergence.uegr_loss on cpu: .*; "
    ):
        pairwise_js(X, backend="cuda")
