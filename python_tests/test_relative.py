"""Lengths in multiples of each sample's embeddings: one sample at a time, the absolute length
that this stands for.
"""

import numpy
import pytest
import torch
from torch import nn

import uegr_kernels as uk

N, T, WORDS, D, CLASSES = 3, 5, 20, 4, 3

# What is a length in each recipe that perturbs embeddings, and what else it needs.
LENGTHS = {
    "at": ({"epsilon": 0.3}, {}),
    "fgsm": ({"epsilon": 0.3}, {"norm": "l2"}),
    "pgd": ({"epsilon": 0.3, "step_size": 0.2}, {"random_start": True, "steps": 2}),
    "free_at": ({"epsilon": 0.3, "step_size": 0.2, "init_mag": 0.1}, {}),
    "free_lb": ({"adv_lr": 0.3, "init_mag": 0.2, "max_norm": 0.35}, {}),
    "r_at": ({"epsilon": 0.3}, {}),
    "r_at_su": ({"epsilon": 0.3}, {"seed": 0}),
    "uegr": ({"epsilon": 0.3}, {"seed": 0}),
    "drop_attack": ({"epsilon": 0.3}, {}),
    "drop_attack_k": ({"epsilon": 0.3}, {}),
    "roast": ({"epsilon": 0.3, "noise": 0.1}, {"kl_weight": 1.0}),
    "adv_embed": ({"epsilon": 0.3, "step_size": 0.2, "start": 0.1}, {"steps": 2}),
    "awp": ({"epsilon": 0.3, "step_size": 0.2}, {"steps": 2}),
    "arat": ({"epsilon": 0.3, "step_size": 0.2}, {"steps": 2, "norm": "l2"}),
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, D)
        self.hidden = nn.Linear(D, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, ids, attention_mask):
        return self.head(self.hidden(self.embedding(ids)).tanh().mean(1))


def small():
    torch.manual_seed(0)
    model = Small().double()
    with torch.no_grad():
        # long words and short ones
        model.embedding.weight.mul_(torch.arange(1, WORDS + 1)[:, None] / 5)
    return model


def batch():
    ids, labels = torch.arange(N * T).view(N, T) + 2, torch.arange(N)
    return ids, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]), labels


def size(model, i):
    """Gives the norm of sample i's real words."""
    ids, mask, _ = batch()
    return model.embedding.weight[ids[i][mask[i] != 0]].norm().item()


def gradients(model):
    """Gives a model's own gradients, or, where the recipe steps, the weights."""
    return torch.cat(
        [(p.detach() if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("name", LENGTHS)
def test_recipes(name):
    lengths, more = LENGTHS[name]
    ids, mask, labels = batch()
    for i in range(N):
        results = []
        for relative in (True, False):
            model = small()
            # whose repeats would change its norm
            model.embedding.requires_grad_(name != "free_at")
            factor = 1.0 if relative else size(model, i)
            given = {key: value * factor for key, value in lengths.items()}
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            recipe = getattr(uk.recipes, name)(
                model, model.embedding, optimizer, relative=relative, **given, **more
            )
            torch.manual_seed(i)
            losses = recipe.backward(
                {"ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}, labels[i : i + 1]
            )
            results.append((losses["loss"], gradients(model)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["at", "pgd", "free_lb", "roast", "adv_embed", "uegr", "drop_attack"]
)
def test_every_sample_has_its_own_length(name):
    """Not the batch's: what is added to each is at most its share."""
    lengths, more = LENGTHS[name]
    seen, model = [], small()
    model.hidden.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    ids, mask, labels = batch()
    recipe = getattr(uk.recipes, name)(model, model.embedding, relative=True, **lengths, **more)
    recipe.backward({"ids": ids, "attention_mask": mask}, labels)
    delta = (seen[-1][:N] - model.embedding(ids).detach()).flatten(1)
    sizes = torch.tensor([size(model, i) for i in range(N)], dtype=torch.float64)
    shares = (delta.abs().amax(1) if name in ("roast", "adv_embed") else delta.norm(dim=1)) / sizes
    # elements are left out
    if name == "drop_attack":
        assert (shares < 0.3).all() and (shares > 0.1).all()
    else:
        torch.testing.assert_close(shares, shares.mean().expand(N), rtol=0.5, atol=0)
        assert (shares <= 0.45).all() and (shares >= 0.2).all()


@pytest.mark.parametrize("form", ["backward", "loss"])
def test_bi_stage(form):
    ids, mask, labels = batch()
    for i in range(N):
        results = []
        for relative in (True, False):
            model = small()
            stage = uk.BiStage(
                model,
                model.embedding,
                epsilon=0.3 if relative else 0.3 * size(model, i),
                relative=relative,
            )
            inputs = {"ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
            stage.backward(inputs, labels[i : i + 1]) if form == "backward" else stage.loss(
                inputs, labels[i : i + 1]
            ).backward()
            results.append(gradients(model))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_a_sample_of_zeros_is_not_perturbed():
    model = small()
    with torch.no_grad():
        model.embedding.weight[0].zero_()
    inputs, labels = (
        {"ids": torch.zeros(2, T, dtype=torch.long), "attention_mask": torch.ones(2, T)},
        torch.arange(2),
    )
    for name in ("at", "pgd", "free_lb", "uegr"):
        losses = getattr(uk.recipes, name)(model, model.embedding, relative=True).backward(
            inputs, labels
        )
        torch.testing.assert_close(
            losses["adversarial_loss"],
            nn.functional.cross_entropy(model(**inputs), labels).detach(),
        )


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("at", {"norm": "linf"}, "norm='linf'"),
        ("fgsm", {}, "norm='linf'"),
        ("pgd", {"norm": "linf"}, "norm='linf'"),
        ("free_lb", {"norm": "linf"}, "norm='linf'"),
        ("free_at", {"norm": "linf"}, "norm='linf'"),
        ("r_at", {"norm": "linf"}, "norm='linf'"),
        ("uegr", {"norm": "linf"}, "norm='linf'"),
        ("drop_attack", {"norm": "linf"}, "norm='linf'"),
        ("arat", {}, "norm='linf'"),
        ("drop_attack", {"weights": "head.weight"}, "weights"),
        *(
            (name, {}, "no embedding is perturbed")
            for name in ("plain", "l1", "r_drop", "sam", "awp", "weight_consolidation")
        ),
    ],
    ids=str,
)
def test_where_it_means_nothing(name, options, text):
    model = small()
    with pytest.raises(ValueError, match=f"relative=True.*{text}"):
        getattr(uk.recipes, name)(model, model.embedding, relative=True, **options)
    assert not model.embedding._forward_hooks


def test_wrong_values():
    model = small()
    with pytest.raises(ValueError, match="norm='linf'"):
        uk.BiStage(model, model.embedding, norm="linf", relative=True)
    with pytest.raises(ValueError, match="norm='linf'"):
        uk.analysis.accuracy_under_attack(model, model.embedding, [], norm="linf", relative=True)
    for flag in (numpy.True_, numpy.False_):
        uk.recipes.at(model, model.embedding, relative=flag).close()
    for build in (uk.BiStage, uk.recipes.at, uk.recipes.plain):
        with pytest.raises(TypeError, match="relative='much'"):
            build(model, model.embedding, relative="much")
