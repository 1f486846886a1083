"""DropAttack, in one step and in K."""

import copy

import pytest
import torch
from torch.nn import functional as F

from uegr_kernels.perturbation import reference

from .steps import (
    WORDS,
    N,
    Small,
    Steps,
    assert_equal,
    assert_same_steps,
    batch,
    build,
    moved,
    run,
    small,
    state,
    unit,
)


def of_weights(loss, weights):
    return torch.autograd.grad(loss, weights, retain_graph=True)


def masked_by(seed, keep, stream=0):
    """Gives the public generator's mask of a tensor."""
    return lambda x: reference.kept(
        x, torch.tensor(seed), keep_probability=keep, step=0, stream=stream
    )


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize(
    "weights", [(), ("lstm.weight_ih_l0", "conv*.weight"), ("batch_norm.weight",)], ids=str
)
@pytest.mark.parametrize(
    "name, passes", [("drop_attack", 1), ("drop_attack_k", 1), ("drop_attack_k", 3)]
)
def test_drop_attack(name, passes, weights, keep):
    def restated(model):
        steps = Steps(model, *batch())
        attacked = {
            (): [],
            ("batch_norm.weight",): [model.batch_norm.weight],
            ("lstm.weight_ih_l0", "conv*.weight"): [
                model.lstm.weight_ih_l0,
                model.convolution.weight,
            ],
        }[weights]
        e = steps.embedded()
        e.retain_grad()
        clean = steps.loss(model.classify(e))
        g_w = of_weights(clean, attacked) if attacked else []
        clean.backward()
        g_x = steps.masked(e.grad)
        seeds = [int(torch.randint(2**62, ())) for _ in range(2)]
        of_input, of_weight = [], []
        for _ in range(passes):
            delta = (0.7 * unit(g_x) * masked_by(seeds[0], keep)(g_x)).requires_grad_()
            loss = steps.loss(model.classify(steps.embedded() + delta))
            (loss / passes).backward()
            g_x = g_x + steps.masked(delta.grad)
            of_input.append(loss)
            if attacked:
                by = [
                    2.0
                    * F.normalize(g.flatten(), dim=0).view_as(g)
                    * masked_by(seeds[1], keep, i)(g)
                    for i, g in enumerate(g_w)
                ]
                with moved(attacked, by):
                    loss = steps.loss(model.classify(steps.embedded()))
                    g_w = [
                        g + new / passes
                        for g, new in zip(g_w, of_weights(loss, attacked), strict=True)
                    ]
                    (loss / passes).backward()
                of_weight.append(loss)
        losses = {"clean_loss": clean, "adversarial_loss": sum(of_input) / passes}
        losses |= {"weight_loss": sum(of_weight) / passes} if attacked else {}
        return {"loss": sum(losses.values()), **losses}

    options = {
        "epsilon": 0.7,
        "keep_probability": keep,
        "weights": weights,
        "epsilon_weights": 2.0,
        "keep_probability_weights": keep,
    }
    options |= {} if name == "drop_attack" else {"steps": passes}
    assert_same_steps(
        small(),
        lambda model: build(name, model, **options).backward(*batch()),
        restated,
        rtol=1e-8,
        atol=1e-11,
    )


def test_one_step_of_drop_attack_k_is_drop_attack():
    options = {"weights": "lstm.*"}
    assert_same_steps(
        small(),
        lambda model: build("drop_attack_k", model, steps=1, **options).backward(*batch()),
        lambda model: build("drop_attack", model, **options).backward(*batch()),
        rtol=0,
        atol=0,
    )


def test_the_mask_of_drop_attack_is_kept_and_does_not_rescale():
    seen = []

    class Watching(Small):
        def classify(self, x):
            seen.append(x.detach())
            return super().classify(x)

    torch.manual_seed(3)
    model = Watching().double()
    ids = torch.randint(1, WORDS, (N, 200))
    build("drop_attack_k", model, epsilon=2.0, steps=3).backward(ids, batch()[1])
    clean, *attacked = seen
    kept = [(x - clean).abs() > 1e-12 for x in attacked]
    assert all(torch.equal(mask, kept[0]) for mask in kept) and 0.4 < kept[0].double().mean() < 0.6
    for x in attacked:
        sizes = (x - clean).flatten(1).norm(dim=1)
        # about sqrt(p) * epsilon, and no 1/p
        assert (sizes < 2.0).all() and (sizes > 1.0).all()


def test_drop_attack_with_everything_kept_is_at():
    def attack(model):
        return build("drop_attack", model, epsilon=0.5, keep_probability=1.0).backward(*batch())

    # the masks' seeds are drawn between the passes
    model = small(0.0)
    twin = copy.deepcopy(model)
    assert_equal(
        attack(model), build("at", twin, epsilon=0.5).backward(*batch()), rtol=1e-12, atol=0
    )
    assert_equal(state(model), state(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights, times", [((), 2), (("lstm.*",), 3)], ids=str)
def test_drop_attack_with_nothing_kept_is_plain_training_so_many_times(weights, times):
    _, plain = run("plain", small(0.0))
    _, attacked = run(
        "drop_attack",
        small(0.0),
        keep_probability=0.0,
        keep_probability_weights=0.0,
        weights=weights,
    )
    assert_equal(attacked, {key: times * g for key, g in plain.items()}, rtol=1e-9, atol=1e-12)
