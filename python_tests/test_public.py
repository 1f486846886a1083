"""The names, signatures and defaults are the ones promised (docs/spec.md, 3)."""

import copy
import inspect
import pathlib
import pickle
import re
import subprocess
import sys
import types
import typing

import pytest
import torch

import uegr_kernels as uk

STATELESS = (
    "threshold=0.8, sharpness=5.0, normalization='minmax', direction='printed', "
    "rescale=True, min_probability=0.0, keep_probability=1.0"
)
SELECTION = f"{STATELESS}, scope='tensor', statistics='current', target='gradient'"
TORCHS = "maximize=False, foreach=None, capturable=False, differentiable=False, fused=None"
OPTIMIZER = f"{SELECTION}, {TORCHS}, state_dtype=None, seed=None, backend='auto'"
LOSS = (
    "js_weight=0.01, label_smoothing=0.0, ignore_index=-100, reduction='mean', "
    "task='classification', return_parts=False, "
    "inplace_backward=False"
)

# Positional arguments in order; after the star the keywords, in any order. Everything takes
# `backend`.
SIGNATURES = {
    "SelectiveAdamW": "(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, "
    f"amsgrad=False, *, {OPTIMIZER})",
    "SelectiveSGD": "(params, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False, "
    f"*, {OPTIMIZER})",
    "select_gradients_": "(params, *, seed, step, saliency=None, scope='tensor', "
    f"{STATELESS}, backend='auto')",
    "selection_probability": f"(grad, *, saliency=None, {STATELESS}, backend='auto')",
    "selection_mask": f"(grad, *, seed, step, stream=0, saliency=None, {STATELESS}, "
    "backend='auto')",
    "pairwise_js": "(logits, *, reduction='mean', inplace_backward=False, backend='auto')",
    "uegr_loss": f"(clean_logits, adversarial_logits, labels, *, {LOSS}, backend='auto')",
    "linear_pairwise_js": "(hidden, weight, bias=None, *, reduction='mean', chunk_rows=None, "
    "backend='auto')",
    "linear_uegr_loss": f"(clean_hidden, adversarial_hidden, weight, labels, bias=None, *, {LOSS}, "
    "chunk_rows=None, backend='auto')",
    "fgm_perturbation": "(grad, epsilon, *, norm='l2', per='sample', mask=None, "
    "keep_probability=None, seed=None, step=0, backend='auto')",
    "pgd_step": "(delta, grad, *, step_size, radius, norm='l2', per='sample', mask=None, "
    "backend='auto')",
    "perturbed_weights": "(params, epsilon, *, gradients=None, per='tensor', keep_probability=1.0, "
    "seed=None, step=0, backend='auto')",
    "AdaptiveDropout": "(num_features=None, p=0.3, *, max_p=0.9, momentum=0.9, backend='auto')",
    "BiStage": (
        "(model, embedding, *, epsilon=0.1, passes=2, js_weight=0.01, norm='l2', per='sample', "
        "label_smoothing=0.0, ignore_index=-100, "
        "task='classification', passes_at_once=None, dropout=None, input_range=None, "
        "batch_axis=None, relative=False, backend='auto')"
    ),
    "BiStage.backward": "(self, inputs, labels, *, scale=1.0)",
    "BiStage.loss": "(self, inputs, labels)",
    "BiStage.close": "(self)",
}
# Modules whose options are those of a function or of another module.
FORMS = {
    "PairwiseJSLoss": "pairwise_js",
    "UEGRLoss": "uegr_loss",
    "replace_dropout": "AdaptiveDropout",
}
# What may be public besides: submodules, and what the promised names return.
ALSO = {"BiStageResult", "LossParts", "recipes", "analysis"}


def named(dotted: str):
    found = uk
    for name in dotted.split("."):
        assert hasattr(found, name), f"uegr_kernels has no {dotted}"
        found = getattr(found, name)
    return found


def split(signature: inspect.Signature) -> tuple[list, dict]:
    """Returns (name, default) of the positional arguments in order, and of the keywords by name."""
    positional, keywords = [], {}
    for p in signature.parameters.values():
        assert p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY), f"{p} takes anything"
        if p.kind == p.KEYWORD_ONLY:
            keywords[p.name] = p.default
        else:
            positional.append((p.name, p.default))
    return positional, keywords


def promised(text: str) -> tuple[list, dict]:
    scope: dict = {}
    # the literal is Python, read by Python
    exec(f"def promised{text}: pass", {}, scope)
    return split(inspect.signature(scope["promised"]))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    positional, keywords = split(inspect.signature(named(name)))
    assert (positional, keywords) == promised(SIGNATURES[name])
    for (_, default), (_, expected) in zip(positional, promised(SIGNATURES[name])[0], strict=True):
        # True == 1
        assert type(default) is type(expected)


@pytest.mark.parametrize("name", FORMS)
def test_module_forms_take_the_keywords_of_their_function(name):
    form, options = named(name), promised(SIGNATURES[FORMS[name]])[1]
    signature = inspect.signature(form)
    if name == "replace_dropout":
        assert next(iter(signature.parameters)) == "model"
        model = torch.nn.Sequential(
            torch.nn.Linear(2, 2), torch.nn.Dropout(0.2), torch.nn.Sequential(torch.nn.Dropout(0.4))
        )
        assert form(model, **options) == 2
        assert all(isinstance(module, uk.AdaptiveDropout) for module in (model[1], model[2][0]))
        with pytest.raises(TypeError):
            form(torch.nn.Sequential(torch.nn.Dropout()), no_such_option=1)
        return
    assert isinstance(form(**options), torch.nn.Module)
    with pytest.raises(TypeError):
        form(no_such_option=1)


@pytest.mark.parametrize("name", [*SIGNATURES, *FORMS])
def test_docstring(name):
    """One line that says what it computes, and under 25 in all."""
    lines = (named(name).__doc__ or "").strip().splitlines()
    assert lines and lines[0].endswith((".", ")")), "the first line is no sentence"
    assert len(lines) < 25


def test_nothing_else_is_public():
    promised_names = {name.split(".")[0] for name in (*SIGNATURES, *FORMS)} | ALSO
    public = {
        name
        for name, value in vars(uk).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public <= promised_names, f"public, but not promised: {sorted(public - promised_names)}"


def test_version():
    assert isinstance(uk.__version__, str) and uk.__version__[0].isdigit()


@pytest.mark.parametrize("name", ["SelectiveAdamW", "SelectiveSGD"])
def test_optimizers_are_torchs(name):
    assert issubclass(named(name), torch.optim.Optimizer) and not issubclass(
        named(name), (torch.optim.AdamW, torch.optim.SGD)
    )


@pytest.mark.parametrize("name", ["PairwiseJSLoss", "UEGRLoss", "AdaptiveDropout"])
def test_modules_are_torchs_and_can_be_copied(name):
    module = named(name)()
    assert isinstance(module, torch.nn.Module) and repr(module).startswith(name)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(copied) == repr(module)


# A call of everything that takes a backend, far enough to choose one.
CALLS = {
    "SelectiveAdamW": lambda b: uk.SelectiveAdamW([torch.nn.Parameter(torch.zeros(2))], backend=b),
    "SelectiveSGD": lambda b: uk.SelectiveSGD([torch.nn.Parameter(torch.zeros(2))], backend=b),
    "selection_probability": lambda b: uk.selection_probability(torch.ones(3), backend=b),
    "selection_mask": lambda b: uk.selection_mask(torch.ones(3), seed=1, step=1, backend=b),
    "select_gradients_": lambda b: uk.select_gradients_(with_gradient(), seed=1, step=1, backend=b),
    "pairwise_js": lambda b: uk.pairwise_js(torch.randn(2, 3, 4), backend=b),
    "uegr_loss": lambda b: uk.uegr_loss(
        torch.randn(3, 4), torch.randn(2, 3, 4), torch.tensor([0, 1, 2]), backend=b
    ),
    "PairwiseJSLoss": lambda b: uk.PairwiseJSLoss(backend=b)(torch.randn(2, 3, 4)),
    "UEGRLoss": lambda b: uk.UEGRLoss(backend=b)(
        torch.randn(3, 4), torch.randn(2, 3, 4), torch.tensor([0, 1, 2])
    ),
    "linear_pairwise_js": lambda b: uk.linear_pairwise_js(
        torch.randn(2, 3, 5), torch.randn(4, 5), backend=b
    ),
    "linear_uegr_loss": lambda b: uk.linear_uegr_loss(
        torch.randn(3, 5),
        torch.randn(2, 3, 5),
        torch.randn(4, 5),
        torch.tensor([0, 1, 2]),
        backend=b,
    ),
    "fgm_perturbation": lambda b: uk.fgm_perturbation(torch.randn(2, 3), 0.1, backend=b),
    "pgd_step": lambda b: uk.pgd_step(
        torch.zeros(2, 3), torch.randn(2, 3), step_size=0.1, radius=0.1, backend=b
    ),
    "perturbed_weights": lambda b: uk.perturbed_weights(
        with_gradient(), 0.1, backend=b
    ).__enter__(),
    "AdaptiveDropout": lambda b: uk.AdaptiveDropout(3, backend=b)(torch.randn(2, 3)),
    "replace_dropout": lambda b: replaced(b)(torch.randn(2, 3)),
    "BiStage": lambda b: bistage(b),
}


def with_gradient() -> list[torch.nn.Parameter]:
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    return [p]


def replaced(backend: str) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Dropout())
    uk.replace_dropout(model, backend=backend)
    return model


def bistage(backend: str):
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Flatten(), torch.nn.Linear(6, 2))
    return uk.BiStage(model, model[0], backend=backend).backward(
        torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1])
    )


@pytest.mark.parametrize("name", CALLS)
def test_everything_takes_a_backend_and_refuses_one_that_is_none(name):
    CALLS[name]("reference")
    CALLS[name]("auto")
    with pytest.raises(ValueError, match="backend='fast' is not a backend"):
        CALLS[name]("fast")


def test_every_name_that_takes_a_backend_is_called():
    assert CALLS.keys() == {name for name in (*SIGNATURES, *FORMS) if "." not in name}


COMPILED = [
    ("SelectiveAdamW", {}),
    ("SelectiveAdamW", {"statistics": "previous", "scope": "global", "amsgrad": True}),
    ("SelectiveAdamW", {"normalization": "rank", "scope": "global", "state_dtype": torch.bfloat16}),
    ("SelectiveSGD", {"momentum": 0.9, "fused": True}),
]


# torch warns of what it does not trace
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), COMPILED)
def test_a_compiled_step_is_one_graph_and_equals_the_eager_one(name, options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 2))
    pair = model, copy.deepcopy(model)

    def make(model):
        groups = [
            {"params": list(model[0].parameters()), "weight_decay": 0.0},
            {"params": list(model[1].parameters()), "threshold": 0.3},
        ]
        return named(name)(groups, lr=torch.tensor(0.1), threshold=0.5, seed=1, **options)

    optimizers = [make(model) for model in pair]
    steps = (
        torch.compile(optimizers[0].step, backend="aot_eager", fullgraph=True),
        optimizers[1].step,
    )
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 20) for optimizer in optimizers
    ]
    for _ in range(20):
        x = torch.randn(4, 8)
        for model, optimizer, step, scheduler in zip(
            pair, optimizers, steps, schedulers, strict=True
        ):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            step()
            scheduler.step()
    assert all(
        torch.equal(p, q) for p, q in zip(*(model.parameters() for model in pair), strict=True)
    )
    assert [optimizers[0].state[p]["step"].item() for p in pair[0].parameters()] == [20.0] * 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# torch warns of what it does not trace
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_names_what_it_refuses_and_changes_nothing():
    torch._dynamo.reset()
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = uk.SelectiveAdamW([{"params": params[:1]}, {"params": params[1:]}], seed=0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(5)
    with pytest.raises(Exception, match=r"shape \(2,\) but its exp_avg \(5,\)"):
        torch.compile(optimizer.step, backend="aot_eager")()
    assert all(bool((p == 1).all()) for p in params)


def test_info_runs():
    run = subprocess.run(
        [sys.executable, "-m", "uegr_kernels", "info"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    for word in (
        uk.__version__,
        torch.__version__,
        "reference",
        "cpp",
        "cuda",
        "triton",
        "threads",
    ):
        assert word in run.stdout.lower(), f"info does not say {word}"


def test_unknown_command_says_what_there_is():
    run = subprocess.run(
        [sys.executable, "-m", "uegr_kernels", "imfo"], capture_output=True, text=True, timeout=120
    )
    assert (
        run.returncode != 0
        and "Traceback" not in run.stderr
        and "info" in run.stderr
        and "demo" in run.stderr
    )


def test_representations_show_the_selection():
    p = torch.nn.Parameter(torch.zeros(2))
    text = repr(
        uk.SelectiveAdamW(
            [{"params": [p]}], threshold=0.25, normalization="rank", seed=7, backend="reference"
        )
    )
    assert text.startswith("SelectiveAdamW (\nbackend: reference\nParameter Group 0\n")
    for line in (
        "threshold: 0.25",
        "sharpness: 5.0",
        "normalization: rank",
        "direction: printed",
        "target: gradient",
        "seed: 7",
        "lr: 0.001",
    ):
        assert f"\n    {line}\n" in text
    assert "\n    momentum: 0.9\n" in repr(uk.SelectiveSGD([p], momentum=0.9))
    assert repr(uk.UEGRLoss(js_weight=0.5)) == "UEGRLoss(js_weight=0.5)"
    assert repr(uk.AdaptiveDropout(8, p=0.2)) == (
        "AdaptiveDropout(8, p=0.2, max_p=0.9, momentum=0.9, backend='auto')"
    )
    embedding = torch.nn.Embedding(3, 4)
    stage = uk.BiStage(
        torch.nn.Sequential(embedding, torch.nn.Flatten()),
        embedding,
        passes=3,
        dropout=[0.1, 0.2, 0.3],
    )
    assert repr(stage).startswith(
        "BiStage(Sequential, Embedding, epsilon=0.1, norm='l2', "
        "per='sample', backend='auto', js_weight=0.01, "
    )
    assert (
        "passes=3, passes_at_once=3, dropout=[0.1, 0.2, 0.3], input_range=None, "
        "batch_axis=None, relative=False)"
    ) in repr(stage)
    stage.close()
    assert repr(stage).endswith(", closed)")


def test_version_is_semantic_and_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?", uk.__version__)
    root = pathlib.Path(uk.__file__).parent.parent
    # the wheel's name is tested with the build
    if (root / "pyproject.toml").exists():
        assert ('version = { attr = "uegr_kernels.__version__" }') in (
            root / "pyproject.toml"
        ).read_text()
        again = [
            file
            for file in (*root.glob("uegr_kernels/**/*.py"), root / "setup.py")
            if f'"{uk.__version__}"' in file.read_text()
        ]
        assert again == [root / "uegr_kernels/__init__.py"]


def test_typed_for_users():
    assert (pathlib.Path(uk.__file__).parent / "py.typed").exists()
    for name in uk.__all__:
        found = getattr(uk, name)
        if inspect.isfunction(found):
            hints = typing.get_type_hints(found)
            assert {*inspect.signature(found).parameters, "return"} <= hints.keys(), (
                f"{name} leaves something without a type"
            )
