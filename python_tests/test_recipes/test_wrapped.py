"""Models that are checkpointed, compiled, sharded, or trained by several processes."""

import copy
import datetime

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import uegr_kernels as uk
from uegr_kernels import recipes

from .steps import CLASSES, LR, WORDS, D, Small, assert_equal, batch, build, sgd, small, state


@pytest.mark.parametrize("name", [name for name in recipes.NAMES if name != "roast"])
def test_a_recomputed_embedding(name):
    class Recomputes(Small):
        def forward(self, ids, attention_mask=None):
            return checkpoint(super().forward, ids, use_reentrant=False)

    results = []
    for kind in (Small, Recomputes):
        torch.manual_seed(3)
        model = kind(0.3).double()
        # which a recompute would move again
        model.batch_norm.track_running_stats = False
        torch.manual_seed(5)
        results.append((build(name, model, sgd(model)).backward(*batch()), state(model)))
    for actual, expected in zip(*results, strict=True):
        assert_equal(actual, expected, rtol=1e-9, atol=1e-12)


class Blocks(nn.Module):
    """Has a block behind the embedding that activation checkpointing recomputes."""

    def __init__(self, reentrant):
        super().__init__()
        self.embedding, self.block, self.head = (
            nn.Embedding(WORDS, D),
            nn.Linear(D, D),
            nn.Linear(D, CLASSES),
        )
        self.reentrant = reentrant

    def forward(self, ids, attention_mask):
        x = checkpoint(
            lambda x: self.block(x).tanh(), self.embedding(ids), use_reentrant=self.reentrant
        )
        return self.head(x.mean(1))


# whose gradients that stop at the embedding torch refuses there
GRAD = ("pgd", "roast", "adv_embed", "sam", "awp", "arat")


@pytest.mark.parametrize("name", recipes.NAMES)
def test_reentrant_checkpointing_behind_a_frozen_embedding(name):
    results = []
    for reentrant in (False, True):
        torch.manual_seed(3)
        model = Blocks(reentrant).double()
        model.embedding.requires_grad_(False)
        recipe = build(name, model, sgd(model))
        torch.manual_seed(4)
        if reentrant and name in GRAD:
            with pytest.raises(RuntimeError, match="use_reentrant=True"):
                recipe.backward(*batch())
            return
        recipe.backward(*batch())
        results.append(state(model))
    assert_equal(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["child_tuning_d", "roast"])
def test_saliency_behind_reentrant_checkpointing_is_not_lost(name):
    model = Blocks(True).double()
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        build(name, model, names=("block*", "head*")).prepare([batch()])


@pytest.mark.parametrize(
    "name, options",
    [("free_lb", {}), ("roast", {}), ("sam", {}), ("arat", {"steps": 1})],
    ids=lambda value: str(value),
)
def test_a_model_compiled_after_the_recipe_was_built(name, options):
    results = []
    for compiled in (False, True):
        model = small(0.0)
        torch.manual_seed(0)
        recipe = build(name, model, **options)
        if compiled:
            torch._dynamo.reset()
            model.compile(backend="eager")
        for step in range(2):
            model.zero_grad()
            torch.manual_seed(step)
            losses = recipe.backward(*batch(step))
        results.append((losses, state(model)))
    for actual, expected in zip(*results, strict=True):
        assert_equal(actual, expected, rtol=1e-9, atol=1e-12)


# what recipes of whole weights say to sharded ones
SHARDED = {
    "sam": (RuntimeError, "train whole ones"),
    "awp": (RuntimeError, "train whole ones"),
    "drop_attack": (RuntimeError, "train whole ones"),
    "child_tuning_d": (TypeError, "train with DDP"),
    "roast": (TypeError, "train with DDP"),
}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(
    "name", ["l1", "at", "pgd", "free_lb", "r_at_su", "weight_consolidation", *SHARDED]
)
def test_sharded_parameters(process_group, name):
    plain, sharded = small(), small()
    for model in (plain, sharded):
        # A bias ahead of BatchNorm has no gradient but rounding errors, which Eq. 8 stretches over
        # [0, 1]: its mask would be theirs.
        model.convolution.bias.requires_grad_(False)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for module in (sharded.lstm, sharded.convolution, sharded):
        fully_shard(module, mesh=mesh)
    options = {
        "drop_attack": {"weights": "lstm.*"},
        "weight_consolidation": {"form": "penalty"},
    }.get(name, {})

    def train_one(model):
        optimizer = uk.SelectiveSGD(model.parameters(), lr=LR, seed=5)
        recipe = build(name, model, optimizer, **options)
        torch.manual_seed(6)
        for step in range(2):
            optimizer.zero_grad()
            losses = recipe.backward(*batch(step))
            recipe.before_step()
            optimizer.step()
            recipe.after_step()
        return losses, [p.full_tensor() if model is sharded else p for p in model.parameters()]

    if name in SHARDED:
        error, text = SHARDED[name]
        with pytest.raises(error, match=text):
            train_one(sharded)
        return
    (expected, weights), (losses, actual) = train_one(plain), train_one(sharded)
    assert_equal(losses, expected, rtol=1e-9, atol=1e-12)
    for x, y in zip(actual, weights, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def one_rank(rank, path):
    torch.set_num_threads(1)
    store, patience = torch.distributed.FileStore(path, 2), datetime.timedelta(minutes=3)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=patience
    )
    try:
        for name in recipes.NAMES:
            for inside in (False, True):
                one_recipe(name, rank, inside)
    finally:
        torch.distributed.destroy_process_group()


class Wrapper(nn.Module):
    """Wraps the model as somebody's module."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


def one_recipe(name, rank, inside):
    """Runs one recipe under DDP, or with DDP inside another module, beside the same recipe on a
    plain model whose gradients are averaged by hand.
    """
    given = {
        "arat": {"steps": 2},
        "awp": {"epsilon": 0.5, "steps": 1},
        "drop_attack_k": {"weights": "*lstm.*", "steps": 2},
    }
    options = given.get(name, {})
    plain = small()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    inner, reductions = wrapped.module, []

    def note(state, bucket, reductions=reductions):
        reductions.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, note)
    optimizer = sgd(wrapped)
    torch.manual_seed(0)
    of_plain = build(name, plain, sgd(plain), **options)
    # what the recipe draws when it is built must not part the ranks
    torch.manual_seed(rank)
    recipe = getattr(recipes, name)(
        Wrapper(wrapped) if inside else wrapped, inner.embedding, optimizer, **options
    )
    for step in range(2):
        data = batch(2 * step + rank)
        optimizer.zero_grad()
        # FreeAT steps by itself, AWP ascends with all ranks' gradients, ARAT has weights of its
        # own, which step.
        compared = name not in ("free_at", "awp") and not (name == "arat" and step)
        if compared:
            plain.load_state_dict(inner.state_dict())
            plain.zero_grad()
            torch.manual_seed(10 + rank)
            expected = of_plain.backward(*data)
            expected_gradient = torch.cat([p.grad.flatten() for p in plain.parameters()])
            torch.distributed.all_reduce(expected_gradient)
        reductions.clear()
        torch.manual_seed(10 + rank)
        losses = recipe.backward(*data)
        assert sum(reductions) == (3 if name == "free_at" else 1) * sum(
            p.numel() for p in inner.parameters()
        ), (name, reductions)
        if compared:
            assert_equal(losses, expected, rtol=1e-9, atol=1e-12)
            gradient = torch.cat([p.grad.flatten() for p in inner.parameters()])
            assert torch.allclose(gradient, expected_gradient / 2, rtol=1e-9, atol=1e-12), (
                f"{name}: another gradient"
            )
        recipe.before_step()
        optimizer.step()
        recipe.after_step()
        recipe.epoch_end()
        own = recipe.parameters() if name == "arat" else []
        here = torch.cat([p.detach().flatten() for p in (*inner.parameters(), *own)])
        there = [torch.empty_like(here) for _ in range(2)]
        torch.distributed.all_gather(there, here)
        assert torch.equal(*there), f"{name}: the ranks have parted"
    if name != "free_at":
        reductions.clear()
        with wrapped.no_sync():
            recipe.backward(*data)
        assert not reductions and wrapped.require_backward_grad_sync, name
    recipe.close()


@pytest.mark.long
def test_under_ddp_only_the_last_backward_synchronises(tmp_path):
    """Two processes: this one and another."""
    path = str(tmp_path / "store")
    other = torch.multiprocessing.get_context("spawn").Process(target=one_rank, args=(1, path))
    other.start()
    try:
        one_rank(0, path)
        other.join()
        assert other.exitcode == 0
    finally:
        other.kill()


def test_free_at_does_not_step_ranks_apart(process_group):
    model = small()
    recipe = recipes.free_at(
        wrapped := nn.parallel.DistributedDataParallel(model), model.embedding, sgd(model)
    )
    before = state(model)
    with wrapped.no_sync(), pytest.raises(RuntimeError, match="no_sync"):
        recipe.backward(*batch())
    assert_equal(state(model), before, rtol=0, atol=0)
    recipe.backward(*batch())
