"""What all recipes promise."""

import copy

import pytest
import torch
from torch.nn import functional as F

import uegr_kernels as uk
from uegr_kernels import recipes
from uegr_kernels.recipes import Recipe

from .steps import (
    COSTS,
    Failing,
    Images,
    N,
    Small,
    assert_equal,
    batch,
    build,
    images,
    sgd,
    skip_without_autocast_lstm,
    small,
    state,
    train,
)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_call_changes_gradients_and_statistics_only(name):
    model = small()
    model.dropout.eval()
    before, modes = state(model), [module.training for module in model.modules()]
    recipe = build(name, model, sgd(model))
    hooks = len(model.embedding._forward_hooks)
    losses = recipe.backward(*batch())
    assert hooks <= 1 and "loss" in losses
    assert all(
        loss.dim() == 0 and loss.isfinite() and not loss.requires_grad for loss in losses.values()
    )
    assert [module.training for module in model.modules()] == modes
    after = state(model)
    for key, value in before.items():
        if not key.startswith("batch_norm.") or key.endswith(("weight", "bias")):
            assert torch.equal(after[key], value) or name == "free_at", key
    assert (
        all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        or name == "free_at"
    )
    recipe.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="closed"):
        recipe.backward(*batch())


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", recipes.NAMES)
def test_an_exception_leaves_the_model_as_it_was(name, where):
    forwards = COSTS[name][0]
    torch.manual_seed(3)
    model = Failing(0.3).double()
    recipe = build(name, model, sgd(model))
    for at in range(1, forwards + 1):
        before, modes = state(model), [module.training for module in model.modules()]
        buffers = {name: b.data_ptr() for name, b in model.named_buffers()}
        vars(model).update(at=at, where=where, count=0)
        with pytest.raises(KeyError, match="of the model"):
            recipe.backward(*batch())
        vars(model).update(at=0)
        after = state(model)
        for key, value in before.items():
            if not key.startswith("batch_norm.") and not key.endswith("gradient"):
                assert torch.equal(after[key], value) or name == "free_at", key
        assert [module.training for module in model.modules()] == modes and model.dropout.p == 0.3
        assert {name: b.data_ptr() for name, b in model.named_buffers()} == buffers
        assert all(p.grad is None for p in model.parameters())
        with torch.no_grad():
            # the hook sleeps
            assert not model.embedding(batch()[0]["ids"]).requires_grad
        model.zero_grad()
    # and works again
    recipe.backward(*batch())


@pytest.mark.parametrize("name", recipes.NAMES)
def test_scale_and_earlier_gradients(name):
    """scale multiplies the gradient only; what .grad held before is added to, and steers
    nothing (R5).
    """
    if name == "free_at":
        pytest.skip("it steps, and leaves no gradient")
    results = []
    for scale, start in ((1.0, 0.0), (torch.tensor(8.0), 0.0), (1.0, 3.0)):
        model = small()
        for p in model.parameters():
            p.grad = torch.full_like(p, start)
        recipe = build(name, model)
        torch.manual_seed(4)
        losses = recipe.backward(*batch(), scale=scale)
        results.append(
            (losses, {key: (p.grad - start) / scale for key, p in model.named_parameters()})
        )
    for losses, gradients in results[1:]:
        assert_equal(losses, results[0][0], rtol=1e-9, atol=1e-12)
        assert_equal(gradients, results[0][1], rtol=1e-7, atol=1e-10)


# which perturb the table itself
@pytest.mark.parametrize("name", [name for name in recipes.NAMES if name not in ("sam", "awp")])
def test_padding_is_not_perturbed(name):
    """What a mask hides is the same in every pass, whatever the padding does to the loss (R3)."""
    seen = []

    class Watching(Small):
        def classify(self, x):
            seen.append(x.detach().clone())
            return super().classify(x)

    torch.manual_seed(3)
    model = Watching().double()
    inputs, labels = batch()
    build(name, model, torch.optim.SGD(model.parameters(), lr=0.0)).backward(inputs, labels)
    hidden = inputs["attention_mask"] == 0
    for x in seen:
        for part in x.split(N):
            torch.testing.assert_close(part[hidden], seen[0][:N][hidden], rtol=0, atol=1e-12)


class Factor(Small):
    """Gives logits times a factor a sample, which makes gradients zero, tiny or infinite."""

    def forward(self, ids, attention_mask=None, factor=None):
        return self.classify(self.embedding(ids)) * factor[:, None]


@pytest.mark.parametrize("name", recipes.NAMES)
def test_zero_and_tiny_gradients(name):
    """A zero gradient perturbs nothing; a tiny one as much as any (R2)."""
    torch.manual_seed(3)
    model = Factor().double()
    inputs, labels = batch()
    for factor in (0.0, 1e-25):
        model.zero_grad()
        losses = build(name, model, sgd(model)).backward(
            inputs | {"factor": torch.full((N,), factor, dtype=torch.float64)}, labels
        )
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", recipes.NAMES)
@pytest.mark.parametrize("data", [batch, images], ids=["text", "images"])
def test_regression(name, data):
    """Squared error in the place of cross-entropy, squared differences in that of the
    divergences (R9).
    """
    model = small(0.0, classes=1) if data is batch else Images(1).double()

    def targets(step):
        return data(step)[0], torch.randn(
            N, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
        )

    inputs, values = targets(0)
    expected = F.mse_loss(
        copy.deepcopy(model)(**inputs if isinstance(inputs, dict) else {"x": inputs})[:, 0], values
    ).detach()
    losses, recipe = train(name, model, data=targets, task="regression")
    assert all(loss.isfinite() for each in losses for loss in each.values())
    torch.testing.assert_close(losses[0].get("clean_loss", expected), expected)
    recipe.close()


@pytest.mark.parametrize("name", recipes.NAMES)
@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "frozen embedding"])
def test_precision_and_frozen_embeddings(name, kind):
    if kind == "autocast":
        skip_without_autocast_lstm()
    model = Small(0.3)
    model.embedding.requires_grad_(kind != "frozen embedding")
    model = model.bfloat16() if kind == "bfloat16" else model
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        losses = build(name, model, sgd(model)).backward(*batch())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert (model.embedding.weight.grad is None) == (
        kind == "frozen embedding" or name == "free_at"
    )


MOVING = [
    ("sam", {"rho": 2.0}),
    ("sam", {"rho": 2.0, "adaptive": True}),
    ("awp", {"gamma": 0.9}),
    ("awp", {"gamma": 0.9, "steps": 1}),
    ("drop_attack", {"weights": "head.weight"}),
    ("drop_attack_k", {"weights": ("head.weight", "convolution.weight")}),
    ("free_at", {}),
    ("weight_consolidation", {}),
    ("weight_consolidation", {"form": "annealed", "gamma": 1.0}),
    ("child_tuning_d", {"target": "update", "names": "*"}),
    ("arat", {"steps": 1}),
]


@pytest.mark.parametrize("name, options", MOVING, ids=str)
def test_autocast_sees_the_weights_where_they_are(name, options):
    """Its casts of weights are kept until the region ends; as without them, whatever is called
    inside.
    """
    skip_without_autocast_lstm()
    results = []
    for cache in (True, False):
        torch.manual_seed(3)
        model = Small()
        recipe = build(name, model, sgd(model), **options)
        losses = []
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            for step in range(2):
                # every weight is cast once
                model(**batch(step)[0])
                losses.append(recipe.backward(*batch(step))["loss"])
                losses.append(model.eval()(**batch(step)[0]).detach().sum())
                model.train()
                recipe.before_step()
                losses.append(recipe.backward(*batch(step))["loss"])
                recipe.before_step()
                recipe.optimizer.step()
                # a step of torch's does not
                torch.clear_autocast_cache()
                model(**batch(step)[0])
                recipe.after_step()
                losses.append(recipe.backward(*batch(step))["loss"])
        results.append(losses)
        recipe.close()
    assert results[0] == results[1]


@pytest.mark.parametrize("name", recipes.NAMES)
def test_an_empty_batch(name):
    model = small()
    optimizer = sgd(model)
    recipe = build(name, model, optimizer)
    inputs, labels = batch()
    before, drawn = state(model), torch.get_rng_state()
    for empty in (
        {key: value[:0] for key, value in inputs.items()},
        inputs["ids"][:0],
        (inputs["ids"][:0],),
    ):
        with pytest.raises(ValueError, match="the batch is empty"):
            recipe.backward(empty, labels[:0])
    with pytest.raises(ValueError, match="the batch is empty"):
        recipe.backward(inputs["ids"][:0], labels)
    looks = type(recipe).prepare is not Recipe.prepare
    if looks:
        with pytest.raises(ValueError, match="the batch is empty"):
            recipe.prepare([(inputs, labels), (inputs["ids"][:0], labels[:0])])
        assert recipe.squares == [] and recipe.masks == []
    else:
        recipe.prepare([(inputs["ids"][:0], labels[:0])])
    assert_equal(state(model), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), drawn) or looks
    # and works again
    recipe.backward(inputs, labels)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_mistakes_are_told_in_the_users_words(name):
    class Tokens(Small):
        def forward(self, ids, attention_mask=None):
            return self.head(self.layer_norm(self.embedding(ids)))

    model, (inputs, labels) = Tokens().double(), batch()
    with pytest.raises(
        ValueError,
        match=r"logits of shape \[4, 7, 3\].*\[N, C\].*token "
        r"classification",
    ):
        build(name, model, sgd(model)).backward(inputs, labels)
    model = small()
    for wrong, error, text in (
        (labels[:3], ValueError, "4 rows of logits for 3 labels|labels are for 3 rows"),
        (labels[:, None], ValueError, r"labels have shape \(4, 1\)"),
        (labels + 1.0, TypeError, "labels"),
        (labels + 7, ValueError, "labels hold"),
        (labels.tolist(), TypeError, "labels are a list"),
        (labels[0], ValueError, r"labels have shape \(\)"),
    ):
        with pytest.raises(error, match=text):
            build(name, model, sgd(model)).backward(inputs, wrong)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_dicts_with_logits(name):
    class Named(Small):
        def forward(self, ids, attention_mask=None):
            return {"logits": super().forward(ids)}

    results = []
    for kind in (Small, Named):
        torch.manual_seed(3)
        model = kind().double()
        recipe = build(name, model, sgd(model))
        torch.manual_seed(4)
        results.append(recipe.backward(*batch()))
    assert_equal(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_images(name):
    """embedding=None perturbs the input itself, within its range."""
    seen = []

    class Watching(Images):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    torch.manual_seed(3)
    model = Watching().double()
    losses, _ = train(name, model, data=images, input_range=(0.0, 1.0))
    assert all(loss.isfinite() for each in losses for loss in each.values())
    assert all(x.min() >= 0 and x.max() <= 1 for x in seen)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_resume(name):
    """Two steps, a checkpoint, two more: as four steps at once, bit for bit."""

    def four(interrupted):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        recipe = build(name, model, optimizer)
        for step in range(4):
            if step == 2 and interrupted:
                saved = copy.deepcopy(
                    [model.state_dict(), optimizer.state_dict(), recipe.state_dict()]
                )
                random = torch.get_rng_state()
                recipe.close()
                model = small()
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
                recipe = build(name, model, optimizer)
                for each, content in zip((model, optimizer, recipe), saved, strict=True):
                    each.load_state_dict(content)
                torch.set_rng_state(random)
            optimizer.zero_grad()
            recipe.backward(*batch(step))
            recipe.before_step()
            optimizer.step()
            recipe.after_step()
            if step == 0:
                recipe.epoch_end()
        return model.state_dict()

    torch.manual_seed(9)
    whole = four(False)
    torch.manual_seed(9)
    assert_equal(four(True), whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["child_tuning_d", "roast", "weight_consolidation"])
def test_a_step_that_a_loss_scaler_skips_leaves_no_trace(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )
    ids, labels = torch.randint(0, 9, (8, 3)), torch.randint(0, 2, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = getattr(uk.recipes, name)(model, model[0], optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(6):
        optimizer.zero_grad()
        recipe.backward(ids, labels, scale=scaler.scale(torch.ones(())))
        if i == 2:
            for p in model.parameters():
                p.grad.fill_(float("inf"))
        before = [p.detach().clone() for p in model.parameters()]
        scaler.unscale_(optimizer)
        recipe.before_step()
        scaler.step(optimizer)
        scaler.update()
        recipe.after_step()
        if i == 2:
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    recipe.epoch_end()
    if hasattr(recipe, "masks"):
        assert 0 < torch.cat([(mask != 0).float().flatten() for mask in recipe.masks]).mean() < 1
