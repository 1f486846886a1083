"""Looking at a run: each figure against a case whose answer is known."""

import copy

import numpy as np
import pytest
import torch

import uegr_kernels as uk
import uegr_kernels.models


def stepped(gradients, groups=None, **options):
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    optimizer = uk.SelectiveSGD(groups(params) if groups else params, lr=1.0, seed=3, **options)
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.1},
        {"normalization": "rank", "direction": "salient"},
        {"normalization": "range"},
    ],
)
def test_the_share_is_that_of_the_elements_that_moved(options):
    torch.manual_seed(0)
    params, optimizer = stepped([torch.randn(300), torch.randn(20, 30)], **options)
    report = uk.analysis.selection_report(optimizer)
    for p, found in zip(params, report.parameters, strict=True):
        assert found.selected == pytest.approx((p != 0).double().mean().item())
        assert found.elements == p.numel() and sum(found.histogram) == p.numel()
        moved = p != 0
        assert found.largest_inverse >= (p / p.grad)[moved].max().item() * (1 - 1e-5)
    moved = sum((p != 0).sum().item() for p in params)
    assert report.selected == pytest.approx(moved / sum(p.numel() for p in params))


def test_ranges_and_quantiles_by_hand():
    _, optimizer = stepped(
        [torch.tensor([0.0, 1.0, 2.0, 3.0, float("nan")])],
        normalization="constant",
        keep_probability=0.5,
    )
    (found,) = uk.analysis.selection_report(optimizer).parameters
    assert (found.s_min, found.s_max, found.largest_inverse) == (0.0, 9.0, 2.0)
    assert found.s_quantiles[2] == 4.0
    # what is not finite has p = 1
    assert found.histogram[10] == 4 and found.histogram[19] == 1


def test_a_global_scope_spans_the_parameters():
    small, large = torch.full((50,), 0.1), torch.linspace(0.5, 1.0, 50)
    options = {"scope": "global", "threshold": 0.5, "sharpness": 20.0}
    _, optimizer = stepped([small, large], **options)
    first, second = uk.analysis.selection_report(optimizer).parameters
    p = uk.selection_probability(torch.cat([small, large]), threshold=0.5, sharpness=20.0)
    assert first.selected == pytest.approx(p[:50].mean().item(), rel=1e-5)
    assert second.selected == pytest.approx(p[50:].mean().item(), rel=1e-5)


def test_names_groups_and_parameters_without_a_gradient(tmp_path):
    params, optimizer = stepped(
        [torch.ones(3), torch.randn(40)],
        groups=lambda params: [
            {"params": [("bias", params[0])]},
            {"params": [("weight", params[1])], "normalization": "rank"},
        ],
    )
    report = uk.analysis.selection_report(optimizer)
    assert [found.name for found in report.parameters] == ["bias", "weight"]
    table = str(report).splitlines()
    assert table[0].split()[0] == "parameter" and table[-1].split()[0] == "all" and len(table) == 4
    picture = uk.analysis.plot_selection_report(report, tmp_path / "selection.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    params[0].grad = None
    assert [found.name for found in uk.analysis.selection_report(optimizer).parameters] == [
        "weight"
    ]


def test_other_optimizers_are_refused():
    with pytest.raises(TypeError, match="is a AdamW; pass a SelectiveAdamW"):
        uk.analysis.selection_report(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))


# CKA


def features(seed, n=200, p=7):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_cka_of_what_is_known():
    x = features(0)
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    assert uk.analysis.linear_cka(x, x) == pytest.approx(1)
    assert uk.analysis.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    basis = torch.linalg.qr(
        torch.cat([torch.ones(200, 1, dtype=torch.float64), features(1, p=8)], 1)
    ).Q[:, 1:]
    assert uk.analysis.linear_cka(basis[:, :4], basis[:, 4:]) == pytest.approx(0, abs=1e-12)
    # One shared direction of two: ||Y'X||^2 = 1 against sqrt(2) * sqrt(2).
    assert uk.analysis.linear_cka(basis[:, :2], basis[:, 1:3]) == pytest.approx(0.5)


def encoder(seed=0):
    torch.manual_seed(seed)
    blocks = [
        torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Dropout(0.5))
        for _ in range(3)
    ]
    model = torch.nn.Sequential(
        torch.nn.Embedding(20, 5), *blocks, torch.nn.Flatten(), torch.nn.Linear(20, 2)
    )
    return model


def batches(count=4):
    generator = torch.Generator().manual_seed(9)
    return [
        (
            torch.randint(0, 20, (16, 4), generator=generator),
            torch.randint(0, 2, (16,), generator=generator),
        )
        for _ in range(count)
    ]


def unchanged(model):
    """Holds weights, modes, .grad, hooks and random state, for a comparison of before and after."""
    weights = [p.detach().clone() for p in model.parameters()]
    return (
        [w.tolist() for w in weights],
        [m.training for m in model.modules()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [len(m._forward_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


def test_cka_of_a_model_with_itself_and_with_another(tmp_path):
    model, other = encoder(), encoder(1)
    before = unchanged(model)
    same = uk.analysis.cka(model, model, batches())
    assert list(same) == [str(i) for i in range(6)] and all(
        value == pytest.approx(1) for value in same.values()
    )
    differ = uk.analysis.cka(model, other, batches(), layers=["1", "3"], pooling="first")
    assert list(differ) == ["1", "3"] and all(0 <= value < 0.9 for value in differ.values())
    assert unchanged(model) == before
    for series in ({"other": differ}, {"by epoch": {1: 0.9, 2: 0.8}}):
        assert uk.analysis.plot_cka(series, tmp_path / "cka.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="model_a has no 'encoder'"):
        uk.analysis.cka(model, other, batches(), layers=["encoder"])
    with pytest.raises(ValueError, match="batches holds none"):
        uk.analysis.cka(model, other, [])


def test_cka_takes_a_convolutions_channels_as_features():
    """Texts of other lengths in other batches, padding left out: rotated channels are the same
    features.
    """
    torch.manual_seed(0)
    model = uk.models.TextCNN(30, 2, dimension=6, filters=5)
    turned = copy.deepcopy(model)
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q
    with torch.no_grad():
        turned.convolutions[1].weight.copy_(
            torch.einsum("oc,cid->oid", rotation, model.convolutions[1].weight)
        )
        turned.convolutions[1].bias.copy_(rotation @ model.convolutions[1].bias)
    data = [
        ({"ids": ids, "attention_mask": ids != 0}, None)
        for ids in (torch.randint(1, 30, (20, n)) for n in (6, 9))
    ]
    data[0][0]["ids"][:, 4:] = 0
    assert uk.analysis.cka(model, turned, data, ["convolutions.1"])[
        "convolutions.1"
    ] == pytest.approx(1, abs=1e-5)


# Attacks


def linear_model():
    """Gives logits (x . w, 0) over an embedding of one token, so that margin and attack are known:
    |w| = 5.
    """
    model = torch.nn.Sequential(torch.nn.Embedding(8, 2), torch.nn.Flatten(), torch.nn.Linear(2, 2))
    with torch.no_grad():
        # distance to the border
        model[0].weight.copy_(
            torch.tensor([[3.0, 4.0]]) / 5 * torch.linspace(0.05, 0.75, 8)[:, None]
        )
        model[2].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        model[2].bias.zero_()
    return model


@pytest.mark.parametrize(("attack", "restarts"), [("fgm", 1), ("pgd", 1), ("pgd", 3)])
def test_an_attack_reaches_as_far_as_epsilon(attack, restarts):
    model = linear_model()
    before = unchanged(model)
    data = [(torch.arange(8)[:, None], torch.zeros(8, dtype=torch.int64))]
    found = uk.analysis.accuracy_under_attack(
        model, model[0], data, [0.1, 0.4, 1.0], attack, restarts=restarts
    )
    # distances 0.05, 0.15, ... 0.75
    assert [each.accuracy for each in found] == [1.0, 7 / 8, 4 / 8, 0.0]
    assert [each.epsilon for each in found] == [0.0, 0.1, 0.4, 1.0]
    assert found[2].drop == 0.5 and found[2].relative_drop == 0.5
    # of class 1, the other one
    assert [sum(each.predicted) for each in found] == [0, 1, 4, 8]
    assert all(each.outcomes == tuple(label == 0 for label in each.predicted) for each in found)
    assert unchanged(model) == before


class Bump(torch.nn.Module):
    """Gives logits (0, 1 - x^2) of one word's embedding x."""

    def __init__(self, x):
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(torch.tensor([[x]]), freeze=False)

    def forward(self, ids):
        x = self.embedding(ids).flatten(1)
        return torch.cat((torch.zeros_like(x), 1 - x * x), 1)


@pytest.mark.parametrize(("attack", "restarts"), [("fgm", 1), ("pgd", 3)])
def test_a_wrong_text_that_an_attack_puts_right_stays_wrong(attack, restarts):
    """The class is 0 outside of [-1, 1]: a step of 2 down the slope leads from 0.5 past it."""
    model = Bump(0.5)
    data = [(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))]
    found = uk.analysis.accuracy_under_attack(
        model, model.embedding, data, [2.0], attack, steps=1, restarts=restarts
    )
    assert [each.outcomes for each in found] == [(False,), (False,)]
    assert [each.predicted for each in found] == [(1,), (1,)]


def test_a_relative_attack_is_a_multiple_of_the_embeddings_norm():
    model = linear_model()
    data = [(torch.arange(8)[:, None], torch.zeros(8, dtype=torch.int64))]
    found = uk.analysis.accuracy_under_attack(model, model[0], data, [0.99, 1.01], relative=True)
    assert [each.accuracy for each in found] == [1.0, 1.0, 0.0]
    assert found[1].relative == pytest.approx(0.99)


def test_a_relative_length_is_in_the_attacks_own_norm():
    model = linear_model()
    data = [(torch.tensor([[3], [7]]), torch.zeros(2, dtype=torch.int64))]
    longest = model[0].weight[[3, 7]].abs().amax(1)
    for norm, sizes in (("l2", model[0].weight[[3, 7]].norm(dim=1)), ("linf", longest)):
        found = uk.analysis.accuracy_under_attack(model, model[0], data, [0.1], norm=norm)
        assert [each.relative for each in found] == [
            0.0,
            pytest.approx((0.1 / sizes).mean().item()),
        ]


def test_padding_and_rows_that_do_not_count():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(9, 2), torch.nn.Linear(2, 2)

        def forward(self, ids, attention_mask):
            return self.head((self.embedding(ids) * attention_mask[..., None]).sum(1))

    torch.manual_seed(0)
    model, ids = Masked(), torch.randint(9, (6, 4))
    mask, labels = (
        (torch.arange(4) < torch.tensor([1, 2, 3, 4, 4, 2])[:, None]).long(),
        torch.arange(6) % 2,
    )
    batch = {"ids": ids, "attention_mask": mask}
    found = uk.analysis.accuracy_under_attack(
        model, model.embedding, [(batch, labels)], [0.1, 1.0], "pgd"
    )
    sizes = torch.stack([model.embedding(ids[i, : mask[i].sum()]).norm() for i in range(6)])
    assert found[1].relative == pytest.approx((0.1 / sizes).mean().item())
    longer = {"ids": torch.cat([ids, ids[:2]]), "attention_mask": torch.cat([mask, mask[:2]])}
    ignored = torch.cat([labels, torch.tensor([-100, -100])])
    beside = uk.analysis.accuracy_under_attack(
        model, model.embedding, [(longer, ignored)], [0.1, 1.0], "pgd"
    )
    assert [(each.accuracy, each.relative, each.drop) for each in beside] == [
        (each.accuracy, each.relative, each.drop) for each in found
    ]


def test_batches_that_cannot_be_attacked():
    model = linear_model()
    ids, labels = torch.arange(8)[:, None], torch.zeros(8, dtype=torch.int64)
    for data, error, text in (
        ([], ValueError, "batches holds none"),
        ([(ids, labels - 100)], ValueError, "batches holds none"),
        ([(ids[:0], labels[:0])], ValueError, "the batch is empty"),
        ([(ids, labels[:3])], ValueError, "8 rows of logits for 3 labels"),
        ([(ids, labels + 2)], ValueError, "labels hold 2; give classes from 0 to 1"),
        ([(ids, labels.float())], ValueError, r"labels are torch.float32.*class indices \[N\]"),
        ([(ids, labels[:, None])], ValueError, r"labels are torch.int64 of shape \(8, 1\)"),
        ([(ids, labels.tolist())], TypeError, "labels are a list"),
    ):
        with pytest.raises(error, match=text):
            uk.analysis.accuracy_under_attack(model, model[0], data)
    with pytest.raises(ValueError, match="batches holds none"):
        uk.analysis.cka(model, model, [(ids[:0], None)])
    for options, error, text in (
        ({"norm": "l3"}, ValueError, "norm='l3'"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"steps": 2.5}, TypeError, "steps=2.5"),
        ({"restarts": "2"}, TypeError, "restarts='2'"),
        ({"epsilons": 0.1}, TypeError, "epsilons=0.1"),
    ):
        with pytest.raises(error, match=text):
            uk.analysis.accuracy_under_attack(model, model[0], [(ids, labels)], **options)
    assert not model[0]._forward_hooks


def test_fgms_first_order(tmp_path):
    """L(e + delta) - L(e) = epsilon * |g| + O(epsilon^2), for PGD too."""
    model, data = encoder().double(), batches(1)
    (ids, labels), loss = data[0], torch.nn.functional.cross_entropy
    model.eval()
    e = model[0](ids).detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(model[1:](e), labels, reduction="sum"), e)
    moved = loss(model[1:](e + uk.fgm_perturbation(g, 1e-4)), labels, reduction="none") - loss(
        model[1:](e), labels, reduction="none"
    )
    torch.testing.assert_close(moved, 1e-4 * g.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-9)
    found = uk.analysis.accuracy_under_attack(model, model[0], data, attack="pgd", steps=3)
    assert [each.epsilon for each in found] == [0.0, 0.01, 0.25, 0.5]
    for drop in (False, True):
        assert (
            uk.analysis.plot_accuracy_under_attack(
                {"net": found}, tmp_path / "attack.png", drop=drop
            ).read_bytes()[:4]
            == b"\x89PNG"
        )
    with pytest.raises(ValueError, match="attack='cw' is not one of its values"):
        uk.analysis.accuracy_under_attack(model, model[0], data, attack="cw")


# Landscape and sharpness


class Bowl(torch.nn.Module):
    """Computes a loss of one weight, x' H x / 2."""

    def __init__(self, hessian):
        super().__init__()
        self.h = hessian
        self.weight = torch.nn.Parameter(torch.full((len(hessian), 1), 0.5, dtype=torch.float64))

    def loss(self, model=None):
        return (self.weight.T @ self.h @ self.weight).sum() / 2


def symmetric(values, seed=0):
    basis = torch.linalg.qr(
        torch.randn(
            len(values),
            len(values),
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
    ).Q
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


def test_a_plane_through_a_bowl(tmp_path):
    model = Bowl(symmetric([1.0, 2.0, 5.0]))
    directions = [[torch.eye(3, dtype=torch.float64)[:, i : i + 1]] for i in (0, 1)]
    before = unchanged(model)
    plane = uk.analysis.loss_plane(
        model, model.loss, directions=tuple(directions), span=2.0, points=5
    )
    assert unchanged(model) == before
    w = model.weight.detach()
    for i, a in enumerate(plane.a):
        for j, b in enumerate(plane.b):
            at = w + a * directions[0][0] + b * directions[1][0]
            assert plane.values[i, j].item() == pytest.approx((at.T @ model.h @ at / 2).item())
    assert plane.values[2, 2].item() == pytest.approx(model.loss().item())
    for surface in (False, True):
        for planes in (plane, {"one": plane, "other": plane}):
            assert (
                uk.analysis.plot_loss_plane(
                    planes, tmp_path / "plane.png", surface=surface
                ).read_bytes()[:4]
                == b"\x89PNG"
            )


def test_a_plane_under_autocast():
    """It keeps casts of weights until its region ends: as without them."""
    model = torch.nn.Linear(3, 2)
    x = torch.ones(4, 3)
    planes = []
    for cache in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            before = model(x).detach()
            planes.append(
                uk.analysis.loss_plane(
                    model, lambda model: model(x).float().square().mean(), points=3
                ).values
            )
            assert torch.equal(model(x), before)
    assert torch.equal(*planes) and planes[0].std() > 0


def test_directions_are_as_long_as_each_filter_and_spare_biases():
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2), torch.nn.Linear(5, 6))
    for direction in uk.analysis.random_directions(model):
        for p, d in zip(model.parameters(), direction, strict=True):
            if p.dim() == 1:
                assert not d.any()
            else:
                torch.testing.assert_close(
                    d.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1)
                )
    twice = [uk.analysis.random_directions(model, seed=4)[0][0] for _ in range(2)]
    assert torch.equal(*twice) and not torch.equal(
        twice[0], uk.analysis.random_directions(model, seed=5)[0][0]
    )


def test_weights_come_back_when_a_loss_raises():
    model = Bowl(symmetric([1.0, 2.0]))
    before = unchanged(model)

    def broken(model):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        uk.analysis.loss_plane(model, broken, points=3)
    assert unchanged(model) == before


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 5.0], [-7.0, 1.0, 3.0], [-2.0, -1.0, -0.5], [0.0, 0.0, 0.0]]
)
def test_largest_eigenvalue_and_trace(values):
    model = Bowl(symmetric(values))
    before = unchanged(model)
    found = uk.analysis.largest_eigenvalue(model, model.loss, tolerance=1e-9)
    assert found == pytest.approx(max(values, key=abs), abs=1e-9)
    found = uk.analysis.largest_eigenvalue(model, model.loss, tolerance=1e-9, which="algebraic")
    assert found == pytest.approx(max(values), abs=1e-9)
    trace, error = uk.analysis.hessian_trace(model, model.loss, samples=400)
    assert abs(trace - sum(values)) <= 5 * error + 1e-9
    assert unchanged(model) == before


# nothing is said where it has converged
@pytest.mark.filterwarnings("error")
def test_the_eigenvalue_of_largest_magnitude_is_numpys():
    signs = set()
    for seed in range(50):
        square = torch.randn(
            64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        values = np.linalg.eigvalsh(((square + square.T) / 2).numpy())
        expected = values[np.abs(values).argmax()]
        signs.add(expected > 0)
        model = Bowl((square + square.T) / 2)
        assert uk.analysis.largest_eigenvalue(model, model.loss) == pytest.approx(
            expected, abs=1e-3
        )
    assert signs == {True, False}
    for low, high, expected in ((-5.0, 5.0, 5.0), (-5.0001, 5.0, -5.0001), (-4.9999, 5.0, 5.0)):
        model = Bowl(symmetric([low, *torch.linspace(-4, 4, 30).tolist(), high]))
        assert uk.analysis.largest_eigenvalue(model, model.loss) == pytest.approx(
            expected, abs=1e-6
        )


def test_an_eigenvalue_that_has_not_converged_says_so():
    d = torch.cos(torch.linspace(0, torch.pi, 2000, dtype=torch.float64))[:, None]
    model = Bowl(torch.zeros(2000, 0))

    def loss(model):
        return (d * model.weight.square()).sum() / 2

    with pytest.warns(
        UserWarning,
        match=r"has not converged in 100 iterations.*give more "
        r"iterations, or a larger tolerance",
    ):
        assert uk.analysis.largest_eigenvalue(model, loss) == pytest.approx(1.0, abs=1e-3)
    model = Bowl(symmetric([-3.0, *torch.linspace(0, 5, 30).tolist()]))
    with pytest.warns(UserWarning, match="has not converged in 2 iterations"):
        uk.analysis.largest_eigenvalue(model, model.loss, iterations=2)
    with pytest.warns(UserWarning, match="the Hessian is not finite"):
        assert np.isnan(
            uk.analysis.largest_eigenvalue(model, lambda model: model.loss() * torch.nan)
        )
    with pytest.raises(ValueError, match="which='size' is not one of its values"):
        uk.analysis.largest_eigenvalue(model, model.loss, which="size")


def test_curvature_of_a_network_is_autograds():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))
    names, weights = zip(*[(name, p.detach()) for name, p in model.named_parameters()], strict=True)
    sizes = [w.numel() for w in weights]

    def of_vector(vector):
        parts = {
            name: part.view_as(w)
            for name, part, w in zip(names, vector.split(sizes), weights, strict=True)
        }
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    hessian = torch.autograd.functional.hessian(
        of_vector, torch.cat([w.flatten() for w in weights])
    )

    def loss(model):
        return torch.nn.functional.cross_entropy(model(x), y)

    found = uk.analysis.largest_eigenvalue(
        model, loss, tolerance=1e-10, seed=np.int64(1), which="algebraic"
    )
    assert found == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-9)
    trace, error = uk.analysis.hessian_trace(model, loss, samples=300)
    assert abs(trace - hessian.trace().item()) <= 5 * error


# SGD's covariance


def recursion(h, c, lr, steps, start, momentum=0.0, keep=1.0):
    d = len(h)
    eye, s = torch.eye(d, dtype=torch.float64), start.clone()
    a = eye - lr * h
    if not momentum:
        for _ in range(steps):
            s = a @ s @ a + lr**2 * (c + (1 / keep - 1) * torch.diag((c + h @ s @ h).diagonal()))
        return s
    move = torch.cat([torch.cat([a, -lr * momentum * eye], 1), torch.cat([h, momentum * eye], 1)])
    p = torch.zeros(2 * d, 2 * d, dtype=torch.float64)
    p[:d, :d] = s
    noise = torch.cat([torch.cat([lr**2 * c, -lr * c], 1), torch.cat([-lr * c, c], 1)])
    for _ in range(steps):
        p = move @ p @ move.T + noise
    return p[:d, :d]


H, C = symmetric([0.3, 1.0, 2.5]), symmetric([0.5, 1.0, 4.0], seed=1)
START = symmetric([0.1, 0.2, 0.9], seed=2)


@pytest.mark.parametrize(("momentum", "keep"), [(0.0, 1.0), (0.9, 1.0), (0.0, 0.4)])
@pytest.mark.parametrize("steps", [0, 1, 7, 100])
def test_a_finite_covariance_is_the_recursions(momentum, keep, steps):
    found = uk.analysis.sgd_covariance(
        H, C, 0.2, momentum=momentum, steps=steps, initial=START, keep_probability=keep
    )
    torch.testing.assert_close(
        found, recursion(H, C, 0.2, steps, START, momentum, keep), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("momentum", "keep"), [(0.0, 1.0), (0.9, 1.0), (0.0, 0.4)])
def test_a_stationary_covariance_stays(momentum, keep):
    found = uk.analysis.sgd_covariance(H, C, 0.2, momentum=momentum, keep_probability=keep)
    torch.testing.assert_close(
        found, recursion(H, C, 0.2, 4000, START, momentum, keep), rtol=1e-8, atol=1e-10
    )
    if not momentum and keep == 1:
        assert (found @ H + H @ found - 0.2 * H @ found @ H - 0.2 * C).abs().max() < 1e-12


def test_covariances_by_hand():
    one = torch.ones(1, 1)
    # eta*c / (h*(2 - eta*h))
    assert uk.analysis.sgd_covariance(one, one, 0.5).item() == pytest.approx(0.5 / 1.5)
    # docs/methods.md, section 4, simulated
    assert uk.analysis.sgd_covariance(
        2 * one, one, 0.1, keep_probability=0.5
    ).item() == pytest.approx(0.0625)
    assert uk.analysis.sgd_covariance(
        one, one, 0.2, keep_probability=0.5 * 0.6
    ).item() == pytest.approx(0.2 / 0.3 / (2 - 0.2 / 0.3))
    mu, eta = 0.9, 0.1
    by_hand = eta * (1 + mu) / ((1 - mu) * (2 * (1 + mu) - eta))
    assert uk.analysis.sgd_covariance(one, one, eta, momentum=mu).item() == pytest.approx(by_hand)
    # flat: t * eta^2 * c
    assert uk.analysis.sgd_covariance(0 * one, one, 0.1, steps=30).item() == pytest.approx(0.3)
    drop = uk.analysis.sgd_covariance(
        one, one, 0.1, steps=5, initial=uk.analysis.sgd_covariance(one, one, 0.5)
    ).item()
    assert drop == pytest.approx(0.9**10 * 0.5 / 1.5 + (1 - 0.9**10) * 0.1 / 1.9)
    told = uk.analysis.sgd_diagnostic(H, uk.analysis.sgd_covariance(H, C, 0.2))
    c = torch.linalg.eigh(H).eigenvectors.T @ C @ torch.linalg.eigh(H).eigenvectors
    assert told["excess_loss"] == pytest.approx(
        (0.2 * c.diagonal() / (2 - 0.2 * torch.linalg.eigvalsh(H))).sum().item() / 2
    )


def test_a_simulation_agrees_with_selective_sgd():
    torch.manual_seed(0)
    chains, lr, keep = 20000, 0.2, 0.5
    h, c = torch.diag(torch.tensor([1.0, 0.5])), torch.diag(torch.tensor([1.0, 2.0]))
    theta = torch.zeros(chains, 2)
    for _ in range(150):
        gradient = theta @ h + torch.randn(chains, 2) @ c.sqrt()
        theta = theta - lr * gradient * (torch.rand(chains, 2) < keep) / keep
    found = uk.analysis.sgd_covariance(h, c, lr, keep_probability=keep)
    torch.testing.assert_close(torch.cov(theta.T).double(), found, rtol=0.05, atol=0.02)


def test_what_has_no_stationary_covariance_is_refused():
    one = torch.ones(1, 1)
    for arguments in (
        {"lr": 2.1},
        {"lr": 4.0, "momentum": 0.9},
        {"lr": 1.1, "keep_probability": 0.5},
    ):
        with pytest.raises(ValueError, match="stationary"):
            uk.analysis.sgd_covariance(one, one, **arguments)
    assert uk.analysis.sgd_covariance(one, one, 3.7, momentum=0.9).item() > 0
    with pytest.raises(ValueError, match="hessian is not symmetric"):
        uk.analysis.sgd_covariance(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.eye(2), 0.1)
    with pytest.raises(ValueError, match=r"noise has shape \(2, 2\); give \[1, 1\]"):
        uk.analysis.sgd_covariance(one, torch.eye(2), 0.1)


def test_pictures_of_a_covariance(tmp_path):
    closed = {name: {t: 0.1 * t for t in range(5)} for name in ("plain", "momentum")}
    path = uk.analysis.plot_sgd_covariance(
        closed, {"plain": {2: 0.21}}, tmp_path / "covariance.png"
    )
    assert path.read_bytes()[:4] == b"\x89PNG"
    epochs = [
        uk.analysis.sgd_diagnostic(H, uk.analysis.sgd_covariance(H, C, 0.2, steps=t))
        for t in (1, 5)
    ]
    path = uk.analysis.plot_sgd_diagnostic(
        {"plain": epochs, "other": [{"robust gap": 0.1}]}, tmp_path / "diagnostic.png"
    )
    assert path.read_bytes()[:4] == b"\x89PNG"


# Confidence


def test_calibration_by_hand(tmp_path):
    sure = torch.tensor([0.9, 0.9, 0.6, 0.6], dtype=torch.float64)
    logits = torch.stack([sure.log(), (1 - sure).log()], 1)
    labels = torch.tensor([0, 1, 0, 0])
    # The bin of 0.9 is half right, that of 0.6 wholly: (0.4 + 0.4) / 2.
    assert uk.analysis.calibration_error(logits, labels, bins=10) == pytest.approx(0.4)
    assert uk.analysis.calibration_error(
        1e3 * logits, torch.zeros(4, dtype=torch.int64)
    ) == pytest.approx(0)
    for given in (logits, {"one": logits, "other": 2 * logits}):
        assert (
            uk.analysis.plot_calibration(given, labels, tmp_path / "calibration.png").read_bytes()[
                :4
            ]
            == b"\x89PNG"
        )
    with pytest.raises(ValueError, match=r"give \[N, C\] and \[N\]"):
        uk.analysis.calibration_error(logits, labels[:2])
    right = torch.tensor([True, False, True, True])
    assert uk.analysis.expected_calibration_error(sure, right, bins=10) == pytest.approx(0.4)
    for wrong in ((sure, right[:2]), (logits, right), (sure[:0], right[:0])):
        with pytest.raises(ValueError, match=r"give \[N\] and \[N\]"):
            uk.analysis.expected_calibration_error(*wrong)


def test_auroc_by_hand(tmp_path):
    auroc = uk.analysis.ood_auroc
    assert auroc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == 1
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])) == 0
    assert auroc(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0])) == pytest.approx(
        (0 + 0 + 1 + 0.5) / 4
    )
    logits = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
    assert auroc(logits, torch.tensor([[0.0, 1.0]])) == 1
    assert (
        uk.analysis.plot_ood_auroc(
            logits, {"other": torch.zeros(3, 2)}, tmp_path / "ood.png"
        ).read_bytes()[:4]
        == b"\x89PNG"
    )


def test_conflict_by_hand(tmp_path):
    model = torch.nn.Linear(2, 1, bias=False)
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    found = uk.analysis.gradient_conflict(model, model(x).sum(), model(y).sum())
    assert found.cosine == pytest.approx(0.5**0.5) and found.opposed == 0
    found = uk.analysis.gradient_conflict(
        model, model(y).sum(), -model(torch.tensor([[2.0, -1.0]])).sum()
    )
    assert found.cosine == pytest.approx(-1 / 10**0.5) and found.opposed == 0.5
    same = uk.analysis.gradient_conflict(model, [y], [torch.tensor([[-2.0, 1.0]])])
    assert same == found
    assert uk.analysis.gradient_conflict(model, [y], [y]) == uk.analysis.Conflict(
        pytest.approx(1), 0
    )
    with pytest.raises(ValueError, match="2 gradients for 1 trainable parameters"):
        uk.analysis.gradient_conflict(model, [y, y], [y])
    assert (
        uk.analysis.plot_gradient_conflict(
            {"both": [found, same]}, tmp_path / "conflict.png"
        ).read_bytes()[:4]
        == b"\x89PNG"
    )


NOT_NUMBERS = (None, "1", True, 1j, np.bool_(True), torch.tensor(1))
TEXTS, WORDS, LABELS = (
    torch.nn.Embedding(9, 4),
    torch.zeros(2, 3, dtype=torch.long),
    torch.zeros(2, dtype=torch.long),
)


def squares(model):
    return model.weight.square().sum()


# name: a call, its integers, its other numbers
NUMBERS = {
    "attack": (
        lambda **o: uk.analysis.accuracy_under_attack(
            torch.nn.Sequential(TEXTS, torch.nn.Flatten(), torch.nn.Linear(12, 2)),
            TEXTS,
            [(WORDS, LABELS)],
            [o.pop("epsilon", 0.1)],
            "pgd",
            **o,
        ),
        ["steps", "restarts", "seed"],
        ["epsilon"],
    ),
    "eigenvalue": (
        lambda **o: uk.analysis.largest_eigenvalue(torch.nn.Linear(2, 1), squares, **o),
        ["iterations", "seed"],
        ["tolerance"],
    ),
    "trace": (
        lambda **o: uk.analysis.hessian_trace(torch.nn.Linear(2, 1), squares, **o),
        ["samples", "seed"],
        [],
    ),
    "plane": (
        lambda **o: uk.analysis.loss_plane(torch.nn.Linear(2, 1), squares, **o),
        ["seed", "points"],
        ["span"],
    ),
    "covariance": (
        lambda **o: uk.analysis.sgd_covariance(torch.eye(2), torch.eye(2), o.pop("lr", 0.1), **o),
        [],
        ["lr", "momentum", "keep_probability"],
    ),
    "calibration": (
        lambda **o: uk.analysis.calibration_error(torch.eye(2), LABELS, **o),
        ["bins"],
        [],
    ),
    "corrupted": (lambda **o: uk.analysis.corrupted(["ab"], **o), ["seed"], ["rate"]),
}


@pytest.mark.filterwarnings("error:overflow")
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_taken_by_one_rule(name):
    call, integers, others = NUMBERS[name]
    for option, good in [
        *((each, np.int64(2)) for each in integers),
        *((each, np.float32(0.5)) for each in others),
    ]:
        call(**{option: good})
        for bad in NOT_NUMBERS:
            with pytest.raises(TypeError, match=f"^{option}="):
                call(**{option: bad})
        with pytest.raises(TypeError if option in integers else ValueError, match=f"^{option}="):
            call(**{option: float("nan")})


def test_curvature_needs_a_trainable_parameter():
    with pytest.raises(ValueError, match="no trainable parameter"):
        uk.analysis.largest_eigenvalue(torch.nn.Linear(2, 1).requires_grad_(False), squares)
