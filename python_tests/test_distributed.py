"""The optimizers over several processes (gloo): masks and trajectories are those of one
process that has everything.
"""

import functools
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import uegr_kernels as uk

STEPS = 4


def processes(world):
    """Runs the test's body, a function of `rank, path`, in `world` processes; the first error
    of any is raised here.
    """

    def decorate(body):
        @functools.wraps(body)
        def test(tmp_path):
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch", "uegr_kernels", __name__])
            errors = context.SimpleQueue()
            workers = [
                context.Process(
                    target=_work, args=(body.__name__, rank, world, str(tmp_path), errors)
                )
                for rank in range(world)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(120)
            late = [worker for worker in workers if worker.is_alive()]
            for worker in late:
                worker.kill()
            if not errors.empty():
                pytest.fail(errors.get(), pytrace=False)
            assert not late and all(worker.exitcode == 0 for worker in workers)

        BODIES[body.__name__] = body
        # pytest asks it for its arguments
        del test.__wrapped__
        return test

    return decorate


BODIES = {}


def _work(name, rank, world, path, errors):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(f"{path}/store", world), rank=rank, world_size=world
        )
        BODIES[name](rank, path)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(13, 6),
        torch.nn.Flatten(),
        torch.nn.Linear(30, 7),
        torch.nn.ReLU(),
        torch.nn.Linear(7, 3),
    )


def train(net, optimizer, steps=STEPS, first=0, skip=None):
    """Trains on the same batch on every process: gradients are bit-equal to one process's."""
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        ids, labels = torch.randint(0, 13, (8, 5)), torch.randint(0, 3, (8,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(ids), labels).backward()
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(net, other, exactly=True):
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        p = whole(p.detach())
        assert torch.equal(p, q) if exactly else torch.allclose(p, q, atol=1e-6), (
            name,
            (p - q).abs().max(),
        )


ADAMW = functools.partial(uk.SelectiveAdamW, lr=0.05, threshold=0.3, seed=7)
SGD = functools.partial(uk.SelectiveSGD, lr=0.05, momentum=0.9, threshold=0.3, seed=7)
OPTIONS = [
    (ADAMW, {}),
    (ADAMW, {"normalization": "range", "amsgrad": True}),
    (ADAMW, {"statistics": "previous"}),
    (ADAMW, {"scope": "global"}),
    (ADAMW, {"scope": "global", "statistics": "previous", "state_dtype": torch.bfloat16}),
    (ADAMW, {"normalization": "rank", "direction": "salient"}),
    (ADAMW, {"normalization": "rank", "scope": "global"}),
    (ADAMW, {"normalization": "constant", "keep_probability": 0.4}),
    (ADAMW, {"backend": "reference", "statistics": "previous"}),
    (SGD, {}),
    (SGD, {"target": "update"}),
]


@processes(2)
def test_ddp_agrees_on_a_seed_and_equals_one_process(rank, path):
    # other seeds are drawn
    torch.manual_seed(rank)
    net, alone = model(), model()
    torch.manual_seed(10 + rank)
    optimizer = uk.SelectiveAdamW(net.parameters(), lr=0.05, threshold=0.3)
    train(torch.nn.parallel.DistributedDataParallel(net), optimizer)
    seeds = [None, None]
    dist.all_gather_object(seeds, optimizer.param_groups[0]["seed"])
    assert seeds[0] == seeds[1]
    train(alone, uk.SelectiveAdamW(alone.parameters(), lr=0.05, threshold=0.3, seed=seeds[0]))
    same(net, alone)


def shard(net):
    from torch.distributed.fsdp import fully_shard

    for layer in net:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    return fully_shard(net)


def fsdp_equals_one_process():
    for make, options in OPTIONS:
        net, alone = shard(model()), model()
        optimizer, other = make(net.parameters(), **options), make(alone.parameters(), **options)
        train(net, optimizer), train(alone, other)
        same(net, alone, exactly=options.get("normalization") != "rank")
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            for key, value in other.state[q].items():
                got = whole(optimizer.state[p][key])
                assert got.dtype == value.dtype and torch.allclose(
                    got.float(), value.float(), atol=1e-6
                ), (options, key)


@processes(2)
def test_fsdp_on_two_processes_equals_one(rank, path):
    fsdp_equals_one_process()


@pytest.mark.long
@processes(4)
def test_fsdp_on_four_processes_equals_one(rank, path):
    # the last layer has fewer rows than processes: empty parts
    fsdp_equals_one_process()


@processes(2)
def test_one_collective_joins_all_tensors_statistics(rank, path):
    calls = []
    all_reduce = dist.all_reduce
    previous = {"statistics": "previous"}
    for options in (
        {},
        previous,
        previous | {"scope": "global"},
        {"scope": "global"},
        {"normalization": "rank"},
        {"normalization": "constant", "keep_probability": 0.5},
    ):
        net = shard(model())
        optimizer = ADAMW(net.parameters(), **options)
        train(net, optimizer, 1)
        dist.all_reduce = lambda *args, **kwargs: (calls.append(args), all_reduce(*args, **kwargs))[
            1
        ]
        optimizer.step()
        dist.all_reduce = all_reduce
        assert len(calls) == (0 if options.get("normalization") == "constant" else 1), options
        calls.clear()


@processes(4)
def test_placements(rank, path):
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    cases = [
        (line, (9, 5), [Shard(0)]),
        (line, (9, 5), [Shard(1)]),
        (line, (3, 7, 5), [Shard(1)]),
        (line, (3, 7, 5), [Shard(2)]),
        (line, (2,), [Shard(0)]),
        (line, (6,), [Replicate()]),
        (square, (9, 5), [Replicate(), Shard(1)]),
        (square, (9, 5), [Shard(0), Replicate()]),
        (square, (9, 5), [Shard(0), Shard(1)]),
        (square, (9, 5), [Shard(1), Shard(0)]),
        (square, (9, 5), [Shard(1), Shard(1)]),
        (square, (3, 7, 5), [Shard(0), Shard(1)]),
    ]
    for options in ({}, {"normalization": "rank"}, {"statistics": "previous"}, {"scope": "global"}):
        torch.manual_seed(0)
        wholes = [torch.nn.Parameter(torch.randn(shape)) for _, shape, _ in cases]
        parts = [
            torch.nn.Parameter(distribute_tensor(p.detach().clone(), *case[::2]))
            for p, case in zip(wholes, cases, strict=True)
        ]
        make = functools.partial(uk.SelectiveSGD, lr=1.0, threshold=0.3, seed=3, **options)
        optimizers = make(wholes), make(parts)
        for _ in range(2):
            for p, part, (mesh, _, placements) in zip(wholes, parts, cases, strict=True):
                p.grad = torch.randn_like(p)
                part.grad = distribute_tensor(p.grad.clone(), mesh, placements)
            for optimizer in optimizers:
                optimizer.step()
        for p, part, case in zip(wholes, parts, cases, strict=True):
            assert torch.equal(part.detach().full_tensor(), p.detach()), (case, options)


@processes(4)
def test_a_placement_that_cannot_be_stated_is_refused_and_changes_nothing(rank, path):
    mesh = init_device_mesh("cpu", (2, 2))
    plain = torch.nn.Parameter(torch.ones(3))
    odd = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6, 8), mesh, [Shard(1), Shard(2)]))
    plain.grad, odd.grad = (
        torch.ones(3),
        distribute_tensor(torch.ones(4, 6, 8), mesh, [Shard(1), Shard(2)]),
    )
    optimizer = uk.SelectiveAdamW([plain, odd], seed=0)
    with pytest.raises(
        ValueError,
        match=r"parameter 1 of shape \(4, 6, 8\) has placements .*shard "
        r"it along one dimension",
    ):
        optimizer.step()
    assert not optimizer.state and bool((plain == 1).all())


@processes(2)
def test_a_gradient_in_other_placements_is_moved_and_a_plain_one_refused(rank, path):
    mesh = init_device_mesh("cpu", (2,))
    value = torch.arange(10.0).view(5, 2)
    p, q = (
        torch.nn.Parameter(distribute_tensor(value.clone(), mesh, [Shard(0)])),
        torch.nn.Parameter(value.clone()),
    )
    p.grad, q.grad = distribute_tensor(value, mesh, [Replicate()]), value.clone()
    for x in (p, q):
        uk.SelectiveAdamW([x], seed=0).step()
    assert torch.equal(p.detach().full_tensor(), q.detach())
    version = p._version
    p.grad = None
    p.grad = distribute_tensor(value, mesh, [Shard(0)])
    uk.SelectiveAdamW([p], seed=0).step()
    assert p._version > version


def checkpoint(net, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, states = get_state_dict(net, optimizer)
    return {"model": weights, "optimizer": states}


SAVED = {"statistics": "previous", "state_dtype": torch.bfloat16}


def save(rank, path):
    import torch.distributed.checkpoint as dcp

    net = shard(model())
    optimizer = ADAMW(net.parameters(), **SAVED)
    train(net, optimizer, 3)
    dcp.save(checkpoint(net, optimizer), checkpoint_id=f"{path}/checkpoint")


@processes(4)
def _saved_on_four(rank, path):
    save(rank, path)


@processes(2)
def _resumed_on_two(rank, path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    net, alone = shard(model()), model()
    optimizer, other = (
        ADAMW(net.parameters(), **SAVED | {"seed": 1}),
        ADAMW(alone.parameters(), **SAVED),
    )
    found = checkpoint(net, optimizer)
    dcp.load(found, checkpoint_id=f"{path}/checkpoint")
    set_state_dict(
        net, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
    )
    assert optimizer.param_groups[0]["seed"] == 7
    train(net, optimizer, 3, first=3)
    train(alone, other, 6)
    same(net, alone)


def test_a_checkpoint_of_four_processes_resumes_on_two(tmp_path):
    _saved_on_four(tmp_path)
    (tmp_path / "store").unlink()
    _resumed_on_two(tmp_path)


# Adaptive dropout: each process has its own norms


def dropping(num_features=None):
    net = model()
    net[3] = torch.nn.Sequential(net[3], uk.AdaptiveDropout(num_features, 0.4))
    return net


def learn(net, rank, steps=3):
    """Trains on data of each process's own; the weights stay alike."""
    for step in range(steps):
        torch.manual_seed(1000 * rank + step)
        net.zero_grad()
        torch.nn.functional.cross_entropy(
            net(torch.randint(13, (4, 5))), torch.randint(3, (4,))
        ).backward()
    return next(module for module in net.modules() if isinstance(module, uk.AdaptiveDropout))


def differ(layer):
    """Checks that the norms are those of each process's data, and nobody's were broadcast."""
    found = [torch.empty(3, 7) for _ in range(dist.get_world_size())]
    dist.all_gather(found, uk.AdaptiveDropout.get_extra_state(layer))
    assert all(each[:2].isfinite().all() and each[:2].any() for each in found)
    assert not torch.equal(*found)


@processes(2)
def test_each_process_has_its_own_norms_under_ddp(rank, path):
    for num_features in (None, 7):
        differ(learn(torch.nn.parallel.DistributedDataParallel(dropping(num_features)), rank))


@processes(2)
def test_each_process_has_its_own_norms_under_fsdp(rank, path):
    for num_features in (None, 7):
        differ(learn(shard(dropping(num_features)), rank))
        with torch.device("meta"):
            net = dropping(num_features)
        net = shard(net)
        net.to_empty(device="cpu")
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter)
        differ(learn(net, rank))


@processes(2)
def test_norms_in_a_distributed_checkpoint(rank, path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    net = shard(dropping(7))
    # the same on both: a checkpoint has one
    state = learn(net, 0).get_extra_state()
    dcp.save({"model": get_model_state_dict(net)}, checkpoint_id=f"{path}/checkpoint")
    again = shard(dropping(7))
    found = {"model": get_model_state_dict(again)}
    dcp.load(found, checkpoint_id=f"{path}/checkpoint")
    set_model_state_dict(again, found["model"])
    assert torch.equal(again[3][1].get_extra_state(), state) and state[:2].any()


@processes(2)
def test_uegr_lends_dropout_to_a_wrapped_model(rank, path):
    for wrap in (torch.nn.parallel.DistributedDataParallel, shard):
        net = model()
        net[3] = torch.nn.Sequential(net[3], torch.nn.Dropout(0.4))
        dropout, embedding = net[3][1], net[0]
        net = wrap(net)
        recipe = uk.recipes.uegr(net, embedding, seed=0)
        for step in range(3):
            torch.manual_seed(1000 * rank + step)
            recipe.backward(torch.randint(13, (4, 5)), torch.randint(3, (4,)))
        assert list(recipe.state_dict()["adaptive_dropout"]) == ["3.1"]
        differ(dropout)
        recipe.close()
        assert type(dropout) is torch.nn.Dropout and dropout in list(net.modules())
