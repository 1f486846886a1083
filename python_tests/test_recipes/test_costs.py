"""How many passes a batch costs."""

import types

import pytest

from uegr_kernels import recipes

from .steps import COSTS, N, batch, build, sgd, small


def count(model):
    counts = types.SimpleNamespace(forward=0, backward=0, reached=0, rows=0)

    def add(what, n=1):
        setattr(counts, what, getattr(counts, what) + n)

    model.register_forward_hook(lambda module, args, logits: add("rows", len(logits)))
    model.register_forward_hook(lambda *_: add("forward"))
    model.head.register_full_backward_hook(lambda *_: add("backward"))
    model.head.weight.register_post_accumulate_grad_hook(lambda p: add("reached"))
    return counts


@pytest.mark.parametrize("name", recipes.NAMES)
def test_cost(name):
    model = small()
    counts = count(model)
    build(name, model, sgd(model)).backward(*batch())
    assert (counts.forward, counts.backward, counts.reached) == COSTS[name]
    assert counts.rows == N * getattr(recipes, name).passes


@pytest.mark.parametrize(
    "name, options, forwards",
    [
        ("pgd", {"steps": 5}, 7),
        ("pgd", {"first_step_from_clean": True}, 4),
        ("pgd", {"clean_weight": 0.0}, 4),
        ("free_lb", {"steps": 2}, 2),
        ("free_at", {"steps": 5}, 5),
        ("adv_embed", {"start": 0.0}, 2),
        ("adv_embed", {"steps": 2}, 4),
        ("drop_attack", {"weights": "lstm.weight_ih_l0"}, 3),
        ("drop_attack", {"weights": "*", "attack_input": False}, 2),
        ("drop_attack_k", {"steps": 2, "weights": "lstm.weight_ih_l0"}, 5),
        ("awp", {"steps": 3}, 5),
    ],
)
def test_cost_by_option(name, options, forwards):
    model = small()
    counts = count(model)
    build(name, model, sgd(model), **options).backward(*batch())
    assert counts.forward == counts.backward == forwards
