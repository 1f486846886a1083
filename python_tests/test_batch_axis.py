"""Models that look words up time-first: every method gives what it gives for a twin that is
batch-first.
"""

import copy
import functools

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import uegr_kernels as uk

WORDS, D, CLASSES = 20, 5, 3


class Reader(nn.Module):
    """Has embedding, LSTM, LayerNorm, the mean over the real tokens, linear; `order` says where the
    words lie.

    "batch"  ids [N, T], looked up as they are;  "time"  ids [T, N], looked up as they are
    "turned"  ids [N, T], looked up as [T, N], as XLNet does
    """

    def __init__(self, order="batch"):
        super().__init__()
        self.order = order
        self.embedding = nn.Embedding(WORDS, D)
        self.lstm = nn.LSTM(D, 4, batch_first=order == "batch")
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, ids, attention_mask=None):
        ids = ids.T.contiguous() if self.order == "turned" else ids
        states = self.norm(self.lstm(self.embedding(ids))[0])
        states = states if self.order == "batch" else states.transpose(0, 1)
        weights = torch.ones(states.shape[:2]) if attention_mask is None else attention_mask
        weights = weights.to(states.dtype)[..., None]
        return self.head((states * weights).sum(1) / weights.sum(1))


def reader(order):
    torch.manual_seed(0)
    return Reader(order).double()


def batch(n, length, mask, order):
    generator = torch.Generator().manual_seed(n)
    ids, labels = torch.randint(WORDS, (n, length), generator=generator), torch.arange(n) % CLASSES
    real = torch.arange(length) < torch.arange(2, n + 2)[:, None]
    ids = ids.T.contiguous() if order == "time" else ids
    return {"ids": ids, "attention_mask": real.long()} if mask else ids, labels


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=1e-9,
            atol=1e-12,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def asked(order, n, length):
    """Gives the axis, of time-first words that are as many as the texts: the rest is found."""
    return {"batch_axis": 1} if order == "time" and n == length else {}


SHAPES = [(5, 5), (4, 6)]


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("n, length", SHAPES)
@pytest.mark.parametrize("order", ["time", "turned"])
@pytest.mark.parametrize("name", uk.recipes.NAMES)
def test_recipes(name, order, n, length, mask):
    results = []
    more = (
        {"seed": 0}
        if name in ("uegr", "r_at_su")
        else {"steps": 2}
        if name in ("pgd", "arat", "awp")
        else {}
    )
    more |= (
        {"random_start": True}
        if name == "pgd"
        else {"persistent": True}
        if name == "free_at"
        else {}
    )
    for kind in ("batch", order):
        model = reader(kind)
        options = more | asked(kind, n, length)
        recipe = getattr(uk.recipes, name)(
            model, model.embedding, torch.optim.SGD(model.parameters(), lr=0.1), **options
        )
        torch.manual_seed(1)
        losses = [recipe.backward(*batch(n, length, mask, kind)) for _ in range(2)]
        results.append(
            (
                {
                    f"{i} {key}": value
                    for i, each in enumerate(losses)
                    for key, value in each.items()
                },
                gradients(model),
                model,
            )
        )
    (losses, grads, model), (losses_turned, grads_turned, turned) = results
    assert_same(losses_turned, losses)
    if name == "free_at":
        assert_same(dict(turned.named_parameters()), dict(model.named_parameters()))
    else:
        assert_same(grads_turned, grads)


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("n, length", SHAPES)
@pytest.mark.parametrize("order", ["time", "turned"])
@pytest.mark.parametrize(
    "options", [{}, {"passes_at_once": 1}, {"per": "token"}, {"relative": True}], ids=str
)
@pytest.mark.parametrize("form", ["backward", "loss"])
def test_bi_stage(form, options, order, n, length, mask):
    results = []
    for kind in ("batch", order):
        model = reader(kind)
        stage = uk.BiStage(
            model,
            model.embedding,
            passes=3,
            js_weight=1.0,
            epsilon=0.5,
            **options,
            **asked(kind, n, length),
        )
        inputs, labels = batch(n, length, mask, kind)
        stage.backward(inputs, labels) if form == "backward" else stage.loss(
            inputs, labels
        ).backward()
        results.append(gradients(model))
    assert_same(*results)


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("n, length", SHAPES)
@pytest.mark.parametrize("order", ["time", "turned"])
@pytest.mark.parametrize(
    "options", [{}, {"attack": "pgd", "steps": 2, "restarts": 2}, {"relative": True}], ids=str
)
def test_accuracy_under_attack(options, order, n, length, mask):
    found = []
    for kind in ("batch", order):
        model = reader(kind)
        options = options | asked(kind, n, length)
        batches = [batch(n, length, mask, kind)]
        attacked = uk.analysis.accuracy_under_attack(
            model, model.embedding, batches, (0.3, 1.0, 3.0), **options
        )
        found.append([number for each in attacked for number in (each.relative, each.accuracy)])
    assert found[0] == pytest.approx(found[1])
    # the strongest attack has an effect
    assert found[0][-1] < found[0][1]


def xlnet():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=WORDS,
        d_model=8,
        n_layer=1,
        n_head=2,
        d_inner=8,
        dropout=0.0,
        summary_last_dropout=0.0,
        num_labels=CLASSES,
    )
    return transformers.XLNetForSequenceClassification(config).double()


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("n, length", SHAPES)
@pytest.mark.parametrize("form", ["backward", "loss"])
def test_xlnet_by_hand(form, n, length, mask):
    """Algorithm 1 in torch's words: the words' vectors are handed to the model, whose look-up
    plays no part.
    """
    model = xlnet()
    ids, labels = batch(n, length, False, "turned")
    real = (
        (torch.arange(length) >= torch.arange(n)[:, None]).long()
        if mask
        else torch.ones(n, length, dtype=torch.long)
    )
    twin, table = copy.deepcopy(model), model.get_input_embeddings()
    run = functools.partial(twin, attention_mask=real)
    x = twin.get_input_embeddings()(ids)
    x.retain_grad()
    clean_loss = F.cross_entropy(run(inputs_embeds=x).logits, labels)
    clean_loss.backward(retain_graph=True)
    g = x.grad * real[..., None]
    delta = 0.5 * F.normalize(g.flatten(1), dim=1).view_as(g)
    # the same in both passes: there is no dropout
    adversarial_loss = F.cross_entropy(run(inputs_embeds=x + delta).logits, labels)
    adversarial_loss.backward()

    inputs = {"input_ids": ids} | ({"attention_mask": real} if mask else {})
    stage = uk.BiStage(model, table, epsilon=0.5)
    loss = stage.backward(inputs, labels).loss if form == "backward" else stage.loss(inputs, labels)
    if form == "loss":
        loss.backward()
    torch.testing.assert_close(
        loss.detach(), (clean_loss + adversarial_loss).detach(), rtol=1e-9, atol=0
    )
    assert_same(
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        {name: p.grad for name, p in twin.named_parameters() if p.grad is not None},
    )


# What the axis is found by


class Handled(Reader):
    """Looks up what it has computed of the words, so that nobody can tell how they lie where
    there are as many as texts.
    """

    def forward(self, ids, attention_mask=None):
        return super().forward(ids.flip(1), attention_mask)


def test_where_nothing_tells_the_option_is_asked_for():
    for order, axis in (("batch", 0), ("turned", 1)):
        torch.manual_seed(0)
        model = Handled(order).double()
        for run in (
            uk.BiStage(model, model.embedding).backward,
            uk.recipes.free_lb(model, model.embedding).backward,
        ):
            with pytest.raises(ValueError, match=r"pass batch_axis=0, or batch_axis=1"):
                run(*batch(5, 5, True, order))
            assert all(p.grad is None for p in model.parameters())
        with pytest.raises(ValueError, match="batch_axis"):
            uk.analysis.accuracy_under_attack(model, model.embedding, [batch(5, 5, True, order)])
        told = (
            uk.BiStage(model, model.embedding, batch_axis=axis)
            .backward(*batch(5, 5, True, order))
            .loss
        )
        stage = uk.BiStage(model, model.embedding)
        # leaves no doubt, and so none after it
        stage.backward(*batch(4, 6, True, order))
        assert torch.equal(stage.backward(*batch(5, 5, True, order)).loss, told)


def test_one_word_everywhere():
    """Equal words tell nothing of how they lie; the same memory does."""

    class Viewed(Reader):
        def forward(self, ids):
            return super().forward(ids.view(-1, ids.shape[1]) if self.order == "batch" else ids.T)

    ids, labels = torch.ones(5, 5, dtype=torch.long), torch.arange(5) % CLASSES
    results = []
    for order in ("batch", "time"):
        torch.manual_seed(0)
        model = Viewed(order).double()
        results.append(uk.BiStage(model, model.embedding).backward(ids, labels).loss)
    torch.testing.assert_close(*results)
    # which copies
    model = reader("turned")
    with pytest.raises(ValueError, match="batch_axis"):
        uk.BiStage(model, model.embedding).backward(ids, labels)


def test_words_given_time_first_are_known_from_an_earlier_batch():
    model, twin = reader("time"), reader("batch")
    stage = uk.BiStage(model, model.embedding)
    stage.backward(*batch(4, 6, False, "time"))
    found = stage.backward(*batch(5, 5, False, "time")).loss
    torch.testing.assert_close(
        found, uk.BiStage(twin, twin.embedding).backward(*batch(5, 5, False, "batch")).loss
    )


@pytest.mark.parametrize(
    "options, inputs, rows, text",
    [
        (
            {"batch_axis": 1},
            (4, 6),
            4,
            r"output is \[4, 6, 5\] and the labels are for 4 rows, "
            r"which axis batch_axis=1 is not",
        ),
        ({}, (4, 6), 5, "the model gave 4 rows of logits for 5 labels"),
    ],
)
def test_axes_and_labels_that_do_not_fit(options, inputs, rows, text):
    model = reader("batch")
    ids = batch(*inputs, False, "batch")[0]
    with pytest.raises(ValueError, match=text):
        uk.BiStage(model, model.embedding, **options).backward(
            ids, torch.zeros(rows, dtype=torch.long)
        )
    with pytest.raises(ValueError, match="labels are for 5 rows"):
        uk.recipes.free_lb(model, model.embedding, **options).backward(
            ids, torch.zeros(5, dtype=torch.long)
        )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "value, error",
    [(2, ValueError), (-1, ValueError), (True, TypeError), ("time", TypeError), (1.0, TypeError)],
)
def test_wrong_values(value, error):
    model = reader("batch")
    for build in (uk.BiStage, *(getattr(uk.recipes, name) for name in uk.recipes.NAMES)):
        with pytest.raises(error, match=f"batch_axis={value!r}"):
            build(model, model.embedding, batch_axis=value)
    with pytest.raises(error, match=f"batch_axis={value!r}"):
        uk.analysis.accuracy_under_attack(
            model, model.embedding, [batch(4, 6, False, "batch")], batch_axis=value
        )
    assert not model.embedding._forward_hooks


@pytest.mark.parametrize("axis", [numpy.int64(1), numpy.int8(1)], ids=repr)
def test_numpys_integers(axis):
    model = reader("turned")
    losses = [
        uk.recipes.at(model, model.embedding, batch_axis=value).backward(
            *batch(5, 5, True, "turned")
        )
        for value in (axis, 1)
    ]
    assert losses[0] == losses[1]
    assert "batch_axis=1," in repr(uk.BiStage(model, model.embedding, batch_axis=axis))


@pytest.mark.parametrize("order", ["time", "turned"])
def test_one_text_of_one_word(order):
    """It lies both ways."""
    results = []
    for kind in ("batch", order):
        model = reader(kind)
        axis = {} if kind == "batch" else {"batch_axis": 1}
        uk.BiStage(model, model.embedding, js_weight=1.0, **axis).backward(*batch(1, 1, True, kind))
        results.append(gradients(model))
    assert_same(*results)


def test_a_mask_that_does_not_fit_the_words():
    inputs, labels = batch(4, 6, True, "turned")

    class Ignoring(Reader):
        def forward(self, ids, attention_mask):
            return super().forward(ids)

    model = Ignoring("turned").double()
    inputs["attention_mask"] = inputs["attention_mask"].T
    with pytest.raises(ValueError, match=r"attention_mask is \(6, 4\).*give \[N, T\]"):
        uk.BiStage(model, model.embedding).backward(inputs, labels)
    # which perturbs nothing
    uk.recipes.plain(model, model.embedding).backward(inputs, labels)
    inputs["attention_mask"] = torch.ones(4, 6, device="meta")
    with pytest.raises(ValueError, match="attention_mask is on meta"):
        uk.BiStage(model, model.embedding).backward(inputs, labels)


def test_images_with_as_many_channels_as_there_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(36, CLASSES)).double()
    x, labels = torch.rand(3, 3, 4, 4, dtype=torch.float64), torch.arange(3)
    together = uk.recipes.at(model, None, epsilon=2.0).backward(x, labels)["loss"]
    alone = [
        uk.recipes.at(model, None, epsilon=2.0).backward(x[i : i + 1], labels[i : i + 1])["loss"]
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    stage = uk.BiStage(model, None, epsilon=2.0)
    torch.testing.assert_close(stage.backward(x, labels).loss, together)


def test_other_inputs_of_time_first_models_are_repeated_along_their_own_axis():
    class Started(Reader):
        def forward(self, ids, start, lengths, table):
            assert table.shape == (2, 2) and len(lengths) == ids.shape[1]
            states = self.lstm(self.embedding(ids), (start, torch.zeros_like(start)))[0]
            return self.head((states.transpose(0, 1) * lengths[:, None, None]).mean(1))

    torch.manual_seed(0)
    model = Started("time").double()
    ids, labels = batch(4, 6, False, "time")
    start, lengths = torch.randn(1, 4, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    results = []
    for at_once in (None, 1):
        model.zero_grad()
        stage = uk.BiStage(model, model.embedding, passes_at_once=at_once)
        stage.backward((ids, start, lengths, torch.ones(2, 2)), labels)
        results.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    assert_same(*results)
