"""What compilers make of the forward stage's Triton kernels for GPUs that are not here: no
spills, wide loads and stores.
"""

import itertools
import json
import re

import pytest

from bench import gpu_model, triton_code

triton = pytest.importorskip("triton", reason="Triton is not installed; run `pip install triton`")


def loss(m, n, c, dtype, labels="indices", call="", backward="", strided=False):
    """Gives a statement that computes a UEGR loss, and what comes after. strided: the logits'
    classes are apart.
    """
    y = (
        f"torch.zeros({n}, dtype=torch.long)"
        if labels == "indices"
        else (f"torch.zeros({n}, {c}, dtype=torch.{dtype})")
    )
    rows, turned = (f"{c}, {n}", ".mT") if strided else (f"{n}, {c}", "")
    x, z = (
        f"torch.zeros({passes}{rows}, dtype=torch.{dtype}, requires_grad=True){turned}"
        for passes in ("", f"{m}, ")
    )
    return f"loss = uk.uegr_loss({x}, {z}, {y}, {call}); {backward}"


FORWARD = "with torch.no_grad(): "
# Passes that are an axis: how many, classes of the longest rows that registers hold beside a clean
# pass, and a thread's logits of each.
LONGEST = [
    (2, 5461, 24),
    (3, 4095, 16),
    (4, 3276, 16),
    (5, 2730, 12),
    (6, 2340, 12),
    (7, 2047, 8),
    (8, 1820, 8),
]
G = "torch.zeros(16, 128, 768)"
WEIGHTS = "[torch.zeros(768, 3), torch.zeros(5), torch.zeros(7, dtype=torch.bfloat16)]"
# Losses: rows of whole 128 bits and others, one block and many, few passes and many; chain rules of
# all rows and of each. Not in float64: on gfx942 those spill scalar registers.
STATEMENTS = {
    "loss m=2 float32": loss(2, 4, 32000, "float32", backward="(2 * loss).backward()"),
    "loss m=2 bfloat16, C odd, smoothed": loss(2, 4, 32003, "bfloat16", call="label_smoothing=0.1"),
    "loss m=2 bfloat16, C=2": loss(
        2, 16, 2, "bfloat16", call="reduction='none'", backward="(2 * loss).sum().backward()"
    ),
    "loss m=2 float32, read once": loss(2, 4, 5000, "float32"),
    "loss m=3 float32, read once": loss(3, 4, 4096, "float32"),
    "loss m=4 bfloat16, read once": loss(4, 4, 2048, "bfloat16", "soft"),
    **{
        f"loss m={m} float32, longest rows read once": loss(m, 4, c, "float32")
        for m, c, _ in LONGEST
    },
    **{
        f"loss m={m} float32, longest rows, soft labels smoothed": loss(
            m, 4, c, "float32", "soft", "label_smoothing=0.1"
        )
        # of m = 3 they spill 40 bytes on sm_90
        for m, c, _ in LONGEST
        if m != 3
    },
    "loss m=3 float32, longest rows, soft labels": loss(3, 4, 4095, "float32", "soft"),
    "loss m=5 bfloat16, longest rows, soft labels": loss(5, 4, 2730, "bfloat16", "soft"),
    "loss m=8 float32, longest rows, smoothed": loss(
        8, 4, 1820, "float32", call="label_smoothing=0.1"
    ),
    "loss m=4 float32, longest rows, strided": loss(4, 4, 3276, "float32", strided=True),
    "loss m=8 float32, strided": loss(8, 4, 1500, "float32", strided=True),
    "loss m=5 float32, C=40000, strided": loss(5, 4, 40000, "float32", strided=True),
    "loss m=2 float32, forward alone": FORWARD + loss(2, 4, 5000, "float32"),
    "loss m=2 float32, C=32000, forward alone": FORWARD + loss(2, 4, 32000, "float32"),
    "loss m=4 float32, soft labels, smoothed": loss(
        4, 4, 32003, "float32", "soft", "label_smoothing=0.1"
    ),
    "loss m=3 float16, soft labels": loss(3, 4, 3000, "float16", "soft"),
    "loss m=8 float32": loss(8, 4, 32000, "float32"),
    "loss m=8 bfloat16": loss(8, 4, 128256, "bfloat16", backward="(2 * loss).backward()"),
    "labels alone float32": "uk.uegr_loss(torch.zeros(4, 32000, requires_grad=True), None, "
    "torch.zeros(4, dtype=torch.long), label_smoothing=0.1)",
    "loss m=2 float32, by row": loss(
        2, 4, 32000, "float32", call="reduction='none'", backward="(2 * loss).sum().backward()"
    ),
    "regression m=2 float32": loss(2, 4, 3, "float32", "values", "task='regression'"),
    "fgm by sample": f"uk.fgm_perturbation({G}, 0.1, mask=torch.ones(16, 128), "
    "keep_probability=0.5, seed=1)",
    "fgm by token": f"uk.fgm_perturbation({G}.bfloat16(), 0.1, norm='linf', per='token', "
    "keep_probability=0.5, seed=1)",
    "pgd by sample": f"uk.pgd_step({G}, {G}, step_size=0.1, radius=1.0)",
    "pgd by token": f"uk.pgd_step({G}, {G}, step_size=0.1, radius=1.0, per='token', "
    "mask=torch.ones(16, 128))",
    "weights": f"w = {WEIGHTS}\nwith uk.perturbed_weights(w, 0.1, gradients=w, "
    "keep_probability=0.5, seed=1): pass",
    "dropout float32": "uk.AdaptiveDropout(3072)(torch.zeros(64, 3072, "
    "requires_grad=True)).sum().backward()",
    "dropout bfloat16, odd": "uk.AdaptiveDropout(257)(torch.zeros(64, 257, dtype=torch.bfloat16, "
    "requires_grad=True)).sum().backward()",
}
WIDE = {"loss m=2 float32": "loss_kernel", "dropout float32": "drop_kernel"}
KERNELS = {
    "loss": {"loss_kernel", "add_up_kernel", "scale_kernel"},
    "fgm": {"group_kernel", "part_kernel"},
    "weights": {"part_kernel"},
}
KERNELS |= {"dropout": {"drop_kernel", "add_parts_kernel", "rates_kernel"}}


def test_the_model_of_the_kernels_is_of_this_code():
    document = json.loads(gpu_model.RESULTS.read_text())
    if document["triton"] != triton.__version__:
        pytest.skip("another Triton made the model")
    lines = {line["case"]: line for line in document["records"] if line["gpu"] == "MI300X"}
    for case in gpu_model.TRITON_CASES:
        found = gpu_model.in_triton(case, gpu_model.MI300X.arch)
        assert found == lines[case.name]["code"], f"{case.name}: run `python -m bench.gpu_model`"


@pytest.fixture(scope="module")
def found():
    return triton_code.kernels(*STATEMENTS.values())


@pytest.mark.parametrize("target", triton_code.TARGETS)
@pytest.mark.parametrize("name", STATEMENTS)
def test_nothing_is_spilled(found, name, target):
    kernels = found[STATEMENTS[name], target]
    most = triton_code.MOST_SPILLED
    assert kernels and all(kernel.spilled <= most for kernel in kernels), kernels


@pytest.mark.parametrize("target", triton_code.TARGETS)
def test_every_kernel_is_compiled(found, target):
    names = {
        kernel.name
        for (_, compiled_for), kernels in found.items()
        if compiled_for == target
        for kernel in kernels
    }
    assert names == set().union(*KERNELS.values())


@pytest.mark.parametrize("target", triton_code.TARGETS)
@pytest.mark.parametrize("name", WIDE)
def test_aligned_rows_are_read_and_written_128_bits_at_a_time(found, name, target):
    kernels = [kernel for kernel in found[STATEMENTS[name], target] if kernel.name == WIDE[name]]
    assert kernels and all(min(kernel.wide) > 0 for kernel in kernels)


def loss_kernel(found, name, target):
    (kernel,) = (one for one in found[STATEMENTS[name], target] if one.name == "loss_kernel")
    return kernel


@pytest.mark.parametrize("target", triton_code.TARGETS)
def test_rows_that_registers_hold_are_read_once(found, target):
    # 3 rows of 5 blocks, the last of them behind a mask; a thread has 128 bits of each
    assert loss_kernel(found, "loss m=2 float32, read once", target).wide[0] == 3 * 5
    assert loss_kernel(found, "loss m=3 float32, read once", target).wide[0] == 4 * 4
    assert loss_kernel(found, "loss m=2 float32", target).wide[0] > 3 * 2


@pytest.mark.parametrize("target", triton_code.TARGETS)
def test_rows_in_16_bits_are_read_once(found, target):
    # 6 rows of 2 blocks, the labels' among them; a thread has 64 bits of each
    kernel = loss_kernel(found, "loss m=4 bfloat16, read once", target)
    reads = r"LDG\..*\b64\b.*" if target.startswith("sm") else r"(global|buffer)_load_(dwordx2|b64)"
    assert kernel.count(reads) == 6 * 2 and kernel.wide[0] == 0, kernel.memory


@pytest.mark.parametrize("target", triton_code.TARGETS)
@pytest.mark.parametrize(("m", "c", "logits"), LONGEST)
def test_the_longest_rows_that_registers_hold_are_read_once(found, target, m, c, logits):
    kernel = loss_kernel(found, f"loss m={m} float32, longest rows read once", target)
    alone = r"LDG\.E(\.(EF|EL|CONSTANT|STRONG|SYS))*" if target.startswith("sm") else None
    reads = kernel.count(alone or r"(global|buffer)_load_(dword|b32)")
    # beside them a label's logit of each pass, and those of the passes' likeliest classes
    assert (m + 1) * logits <= reads <= (m + 1) * (logits + 4), kernel.memory


@pytest.mark.parametrize(
    "shape", [(2, 4, 5000), (2, 4, 5461), (8, 4, 1820), (8, 4, 32000)], ids=str
)
def test_gradients_go_over_a_labels_logit_behind_a_barrier_alone(shape):
    statement = loss(*shape, "float32", call="inplace_backward=True").replace(
        "=True)", "=True) * 1"
    )
    (kernel,) = (
        one for one in triton_code.assembly(statement, "sm_90") if one.name == "loss_kernel"
    )
    # blocks are read with a policy, addresses have 64 bits
    found = re.findall(
        r"^(ld\.global\.b32|st\.global\.L1::evict_first|bar\.sync)", "\n".join(kernel.lines), re.M
    )
    assert len(set(found)) == 3
    assert ("ld.global.b32", "st.global.L1::evict_first") not in set(itertools.pairwise(found))


@pytest.mark.parametrize("target", triton_code.TARGETS)
def test_the_forward_alone_is_cheaper(found, target):
    def reads_and_writes(name):
        return loss_kernel(found, name, target).wide

    once, long = "loss m=2 float32, read once", "loss m=2 float32"
    assert reads_and_writes("loss m=2 float32, forward alone") == (reads_and_writes(once)[0], 0)
    # a visit less, which has three rows; and no row is written
    reads, writes = reads_and_writes("loss m=2 float32, C=32000, forward alone")
    assert reads <= reads_and_writes(long)[0] - 3 and writes == 0


@pytest.mark.parametrize("target", triton_code.TARGETS)
@pytest.mark.parametrize("name", ["fgm by sample", "pgd by sample"])
def test_whole_blocks_of_parts_are_read_and_written_128_bits_at_a_time(found, name, target):
    kernels = [kernel for kernel in found[STATEMENTS[name], target] if kernel.name == "part_kernel"]
    assert all(kernel.wide[0] > 0 for kernel in kernels)
    # the others write sums alone
    assert sum(kernel.wide[1] > 0 for kernel in kernels) == 1
