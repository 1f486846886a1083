"""What the public functions' kernels are compiled for: the values of every option, and a few
statements in which all pairs of them meet.

Functions of a family share kernels. A family's rows are a covering array: each two values of two
options that some function of the family takes stand together in a row, unless EXCLUDED says why
they cannot, and each function stands beside every value of its options. A statement is a row of
each family.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import uegr_kernels as uk

Row = dict[str, Any]

# By family its functions, and by option (or what the arguments are: dtype, sizes, layout) the
# values that may change a kernel.
DTYPES = ("float32", "bfloat16", "float16", "float64")
FAMILIES: dict[str, tuple[str, ...]] = {
    "losses": ("pairwise_js", "uegr_loss", "linear_pairwise_js", "linear_uegr_loss"),
    "selection": (
        "SelectiveAdamW",
        "SelectiveSGD",
        "select_gradients_",
        "selection_probability",
        "selection_mask",
    ),
    "perturbation": ("fgm_perturbation", "pgd_step", "perturbed_weights"),
    "dropout": ("AdaptiveDropout",),
}
VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "losses": {
        "dtype": DTYPES,
        "passes": (2, 3, 4, 8),
        "classes": (2, 3, 32000, 32003),
        # few; more than every program counts labels of
        "rows": (4, 5000),
        "layout": ("stacked", "sequence", "strided"),
        "labels": ("indices", "probabilities", "values"),
        "label_smoothing": (0.0, 0.1),
        "reduction": ("mean", "sum", "none"),
        "task": ("classification", "regression"),
        "return_parts": (False, True),
        "inplace_backward": (False, True),
        "backward": (True, False),
        "bias": (True, False),
        "chunk_rows": (None, 3),
    },
    "selection": {
        "dtype": DTYPES,
        "layout": ("dense", "strided"),
        "normalization": ("minmax", "range", "rank", "constant"),
        "direction": ("printed", "salient"),
        "scope": ("tensor", "global"),
        "statistics": ("current", "previous"),
        "rescale": (True, False),
        "min_probability": (0.0, 0.1),
        "keep_probability": (1.0, 0.5),
        "target": ("gradient", "update"),
        "saliency": (False, True),
        "lr": ("number", "tensor"),
        "betas": ("numbers", "tensors"),
        "amsgrad": (False, True),
        "momentum": (0, 0.9),
        "nesterov": (False, True),
        "maximize": (False, True),
        "capturable": (False, True),
        # True: with a loss scale, as GradScaler sets it
        "fused": (None, True),
        "state_dtype": (None, "bfloat16"),
    },
    "perturbation": {
        "dtype": DTYPES,
        "norm": ("l2", "linf"),
        "per": ("sample", "token", "all", "tensor"),
        # of a sample: held by a program, several programs', not whole groups of four
        "size": ("whole", "parts", "odd"),
        "mask": (False, True),
        "keep_probability": (1.0, 0.5),
    },
    "dropout": {
        "dtype": DTYPES,
        "num_features": (None, 1, 257, 3072),
        "backward": (True, False),
        "rows": (1, 64),
    },
}
# Options that change no kernel, as they are arithmetic's numbers or nothing to a kernel, and
# arguments that a statement makes.
SAME: dict[str, set[str]] = {
    "losses": {
        "logits",
        "clean_logits",
        "adversarial_logits",
        "hidden",
        "clean_hidden",
        "adversarial_hidden",
        "weight",
        "js_weight",
        "ignore_index",
    },
    # differentiable runs on the reference alone
    "selection": {
        "params",
        "grad",
        "seed",
        "step",
        "stream",
        "threshold",
        "sharpness",
        "eps",
        "weight_decay",
        "dampening",
        "foreach",
        "differentiable",
    },
    "perturbation": {
        "grad",
        "gradients",
        "params",
        "delta",
        "epsilon",
        "step_size",
        "radius",
        "seed",
        "step",
    },
    "dropout": {"p", "max_p", "momentum"},
}
# What the arguments have that is no option.
ARGUMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "losses": {
        name: ("dtype", "passes", "classes", "rows", "backward") for name in FAMILIES["losses"]
    },
    "selection": {name: ("dtype", "layout") for name in FAMILIES["selection"]},
    "perturbation": {name: ("dtype", "size") for name in FAMILIES["perturbation"]},
    "dropout": {"AdaptiveDropout": ("dtype", "backward", "rows")},
}
for _name in ("pairwise_js", "uegr_loss"):
    ARGUMENTS["losses"][_name] += ("layout",)
# Public names without kernels of their own: what they call has them.
COMPOSED = {
    "BiStage": "uegr_loss and fgm_perturbation",
    "PairwiseJSLoss": "pairwise_js",
    "UEGRLoss": "uegr_loss",
    "replace_dropout": "AdaptiveDropout",
    "recipes": "all others",
    "analysis": "fgm_perturbation and pgd_step",
    "BiStageResult": "nothing: a result",
    "LossParts": "nothing: a result",
}
# What cannot be: values that stand together in no valid call, or in none that fits a small machine.
EXCLUDED: dict[str, list[Row]] = {
    "losses": [
        {"task": "regression", "labels": "indices"},
        {"task": "regression", "labels": "probabilities"},
        {"task": "classification", "labels": "values"},
        {"task": "regression", "label_smoothing": 0.1},
        {"labels": "values", "label_smoothing": 0.1},
        {"rows": 5000, "classes": 32000},
        {"rows": 5000, "classes": 32003},
        # a view of a leaf is not written
        {"inplace_backward": True, "layout": "strided"},
    ],
    "selection": [
        {"statistics": "previous", "normalization": "rank"},
        {"statistics": "previous", "normalization": "constant"},
        {"nesterov": True, "momentum": 0},
    ],
    "perturbation": [
        *({"function": name, "per": "tensor"} for name in ("fgm_perturbation", "pgd_step")),
        *({"function": "perturbed_weights", "per": value} for value in ("sample", "token")),
    ],
    "dropout": [],
}


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names what a public function takes, but for self and the backend."""
    signature = inspect.signature(function)
    return [name for name in signature.parameters if name not in ("self", "backend")]


@functools.cache
def options(family: str, name: str) -> tuple[str, ...]:
    """Returns the options of a function whose values may change a kernel, in the table's order."""
    known = {*parameters(getattr(uk, name)), *ARGUMENTS[family][name]}
    return tuple(option for option in VALUES[family] if option in known)


def allowed(family: str, row: Row) -> bool:
    return not any(
        all(row.get(key, ...) == value for key, value in some.items()) for some in EXCLUDED[family]
    )


def pairs(family: str) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    """Yields everything that has to stand together: (option, value) twice; the function is an
    option of each.
    """
    for name in FAMILIES[family]:
        items: list[tuple[str, tuple[Any, ...]]] = [
            ("function", (name,)),
            *((o, VALUES[family][o]) for o in options(family, name)),
        ]
        for (a, some), (b, others) in itertools.combinations(items, 2):
            for x, y in itertools.product(some, others):
                if allowed(family, {"function": name, a: x, b: y}):
                    yield (a, x), (b, y)


def covered(row: Row) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(row.items(), 2))


@functools.cache
def rows(family: str) -> list[Row]:
    """Builds a covering array, greedily: the next row is the one, of those begun with pairs still
    lacking, that has most of them.
    """
    lacking = dict.fromkeys(pairs(family))
    found: list[Row] = []
    while lacking:
        begun = list(itertools.islice(lacking, 0, None, max(len(lacking) // 8, 1)))
        candidates = [
            row
            for pair in begun
            for name in FAMILIES[family]
            if (row := _completed(family, name, dict(pair), lacking))
        ]
        row = max(candidates, key=lambda row: sum(pair in lacking for pair in covered(row)))
        found.append(row)
        for pair in covered(row):
            lacking.pop(pair, None)
    return found


def _completed(family: str, name: str, begun: Row, lacking: dict[Any, None]) -> Row | None:
    """Completes a row of a function with what is begun, each further value the one that meets
    most of what lacks; None where there is none.
    """
    if begun.setdefault("function", name) != name or not {*begun} <= {
        "function",
        *options(family, name),
    }:
        return None
    row = dict(begun)
    for option in sorted(options(family, name), key=lambda option: -len(VALUES[family][option])):
        if option in row:
            continue
        values = [
            value for value in VALUES[family][option] if allowed(family, row | {option: value})
        ]
        if not values:
            return None
        row[option] = max(
            values,
            key=lambda value: sum(
                _pair(other, (option, value), family) in lacking for other in row.items()
            ),
        )
    order = ["function", *options(family, name)]
    row = {option: row[option] for option in order}
    return row if allowed(family, row) else None


def _pair(
    a: tuple[str, Any], b: tuple[str, Any], family: str
) -> tuple[tuple[str, Any], tuple[str, Any]]:
    order = ["function", *VALUES[family]]
    return (a, b) if order.index(a[0]) < order.index(b[0]) else (b, a)


# ---- Rows as code. torch and uegr_kernels as uk are there.


def _given(row: Row, *names: str) -> str:
    return ", ".join(f"{name}={row[name]!r}" for name in names if name in row)


def _loss(row: Row) -> str:
    m, n, c, name = row["passes"], row["rows"], row["classes"], row["function"]
    grad = f"dtype=torch.{row['dtype']}, requires_grad=True"
    labels = {
        "indices": f"torch.zeros({n}, dtype=torch.long)",
        "probabilities": f"torch.zeros({n}, {c}, dtype=torch.{row['dtype']})",
        "values": f"torch.zeros({n}, {c}, dtype=torch.{row['dtype']})",
    }.get(row.get("labels", ""))
    given = _given(
        row,
        "label_smoothing",
        "reduction",
        "task",
        "return_parts",
        "inplace_backward",
        "chunk_rows",
    )
    if name.startswith("linear"):
        tensors = [f"torch.zeros({m}, {n}, 2, {grad})", f"torch.zeros({c}, 2, {grad})"]
        tensors = [f"torch.zeros({n}, 2, {grad})", *tensors] if labels else tensors
        given += f", bias=torch.zeros({c}, {grad})" if row["bias"] else ""
    else:
        passes = {
            "stacked": f"torch.zeros({m}, {n}, {c}, {grad}) * 1",
            "sequence": f"[torch.zeros({n}, {c}, {grad}) * 1 for _ in range({m})]",
            "strided": f"torch.zeros({m}, {c}, {n}, {grad}).mT",
        }[row["layout"]]
        tensors = [f"torch.zeros({n}, {c}, {grad}) * 1", passes] if labels else [passes]
    call = f"uk.{name}({', '.join(tensors + ([labels] if labels else []))}, {given})"
    call += ".loss" if row.get("return_parts") else ""
    return f"(2 * {call}).sum().backward()" if row["backward"] else call


def _selection(row: Row) -> str:
    name, dtype = row["function"], row["dtype"]
    shape = (
        f"torch.zeros(64, 48, dtype=torch.{dtype}){'.t()' if row['layout'] == 'strided' else ''}"
    )
    lines = [
        f"ps = [torch.nn.Parameter({shape}) for _ in range(2)]",
        "for p in ps: p.grad = torch.zeros_like(p)",
    ]
    given = _given(
        row,
        "normalization",
        "direction",
        "scope",
        "statistics",
        "rescale",
        "min_probability",
        "keep_probability",
        "target",
    )
    if name.startswith("Selective"):
        given += ", " + _given(
            row, "amsgrad", "momentum", "nesterov", "maximize", "capturable", "fused"
        )
        given += f", state_dtype={'torch.bfloat16' if row['state_dtype'] else None}, seed=1"
        given += f", lr={'torch.tensor(0.1)' if row['lr'] == 'tensor' else 0.1}"
        if row.get("betas") == "tensors":
            given += ", betas=(torch.tensor(0.9), torch.tensor(0.99))"
        lines.append(f"o = uk.{name}(ps, {given})")
        if row["fused"]:
            lines.append("o.grad_scale, o.found_inf = torch.tensor(2.0), torch.tensor(0.0)")
        return "\n".join((*lines, "o.step()", "o.step()"))
    if name == "select_gradients_":
        saliency = "[p.grad.abs() for p in ps]" if row["saliency"] else None
        return "\n".join((*lines, f"uk.{name}(ps, {given}, saliency={saliency}, seed=1, step=1)"))
    saliency = "ps[0].grad.abs()" if row["saliency"] else None
    given += ", seed=1, step=1" if name == "selection_mask" else ""
    return "\n".join((*lines, f"uk.{name}(ps[0].grad, {given}, saliency={saliency})"))


def _perturbation(row: Row) -> str:
    name = row["function"]
    shape = {"whole": "4, 8, 64", "parts": "2, 8, 5120", "odd": "2, 3, 5"}[row["size"]]
    tensor = f"torch.zeros({shape}, dtype=torch.{row['dtype']})"
    draws = (
        (f", keep_probability={row['keep_probability']}, seed=1")
        if "keep_probability" in row
        else ""
    )
    if name == "perturbed_weights":
        return (
            f"ws = [{tensor}, {tensor}]\nwith uk.{name}(ws, 0.1, gradients=ws, "
            f"per={row['per']!r}{draws}): pass"
        )
    given = _given(row, "norm", "per") + draws
    given += f", mask=torch.ones({shape.rpartition(',')[0]})" if row["mask"] else ""
    if name == "pgd_step":
        return f"uk.{name}({tensor}, {tensor}, step_size=0.1, radius=1.0, {given})"
    return f"uk.{name}({tensor}, 0.1, {given})"


def _dropout(row: Row) -> str:
    units = row["num_features"] or 48
    call = f"{row['rows']}, {units}, dtype=torch.{row['dtype']}, requires_grad=True"
    lines = [f"d = uk.AdaptiveDropout({row['num_features']})", f"h = torch.zeros({call})"]
    return "\n".join((*lines, "d(h).sum().backward(); d(h)" if row["backward"] else "d(h)"))


CODE = {
    "losses": _loss,
    "selection": _selection,
    "perturbation": _perturbation,
    "dropout": _dropout,
}


def statements() -> list[str]:
    """Returns the covering set: a row of each family, as far as they go, with an empty line
    between.
    """
    lines = [[CODE[family](row) for row in rows(family)] for family in FAMILIES]
    return ["\n\n".join(part for part in parts if part) for parts in itertools.zip_longest(*lines)]


def calls() -> tuple[str, ...]:
    """Returns the statements' parts, each of one dtype."""
    return tuple(
        dict.fromkeys(part for statement in statements() for part in statement.split("\n\n"))
    )


# ---- The whole product.

# What changes a kernel's own code; the other options, which choose among kernels or give them a
# pointer, keep their first value.
CROSSED: dict[str, tuple[str, ...]] = {
    "losses": ("passes", "classes", "layout", "labels", "label_smoothing", "reduction", "task"),
    "selection": (
        "layout",
        "normalization",
        "scope",
        "statistics",
        "rescale",
        "keep_probability",
        "target",
        "saliency",
        "amsgrad",
        "momentum",
        "nesterov",
        "state_dtype",
    ),
    "perturbation": ("norm", "per", "size", "mask", "keep_probability"),
    "dropout": ("num_features", "rows"),
}
WITHOUT_EFFECT: list[Row] = [
    {"keep_probability": 0.5, "normalization": name} for name in ("minmax", "range", "rank")
]


def product(family: str, name: str, dtype: str) -> tuple[str, ...]:
    """Returns a function's calls with every combination of the values of its CROSSED options, in
    one dtype.
    """
    crossed = [option for option in options(family, name) if option in CROSSED[family]]
    first = {option: VALUES[family][option][0] for option in options(family, name)} | {
        "function": name,
        "dtype": dtype,
    }
    every = (
        first | dict(zip(crossed, some, strict=True))
        for some in itertools.product(*(VALUES[family][o] for o in crossed))
    )
    possible = (row for row in every if allowed(family, row))
    return tuple(
        CODE[family](row)
        for row in possible
        if not any(some.items() <= row.items() for some in WITHOUT_EFFECT)
    )
