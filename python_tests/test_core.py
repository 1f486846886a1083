"""The generator, the choice of a backend and its error sentences; the compiled core through
`uegr_kernels._bindings`.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from uegr_kernels.core import backends, native, philox
from uegr_kernels.core.operator import Operator
from uegr_kernels.divergence.options import REDUCTIONS

# op defines the operators that are asked about
from uegr_kernels.selective import op, options

CPU = torch.device("cpu")

# Random123, kat_vectors: philox4x32, ten rounds: counter, key, output.
KNOWN_ANSWERS = [
    pytest.param(
        (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"
    ),
    pytest.param(
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        id="ones",
    ),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        id="pi",
    ),
]
PI_SEED = 0x299F31D0_A4093822


def word(index: int, **key) -> int:
    return philox.words(torch.tensor([index]), **key).item()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert philox.philox4x32(counter, key) == expected
    as_tensors = philox.philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(x) for x in as_tensors) == expected


def test_words_place_index_step_stream_and_seed_in_the_known_answers_counter():
    # Counter (q low, q high, step, stream); here the step is a full 32-bit word, as the vector has
    # it.
    # an element index is below 2^63
    q = 0x85A308D3_243F6A88 % 2**61
    place = {"seed": PI_SEED, "step": 0x13198A2E, "stream": 0x03707344}
    expected = philox.philox4x32(
        (q & 0xFFFFFFFF, q >> 32, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    )
    assert [word(4 * q + lane, **place) for lane in range(4)] == list(expected)
    zeros = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert [word(lane, seed=0, step=0, stream=0) for lane in range(4)] == list(zeros)


def test_words_past_two_to_the_33():
    # Index 2^34 + 5 is lane 1 of q = 2^32 + 1, counter words (1, 1): neither q nor the index fits
    # 32 bits.
    lanes = philox.philox4x32((1, 1, 7, 3), (11, 0))
    assert word(2**34 + 5, seed=11, step=7, stream=3) == lanes[1]
    assert word(2**34 + 5, seed=11, step=7, stream=3) != word(5, seed=11, step=7, stream=3)


def test_every_part_of_the_counter_and_key_changes_the_words():
    indices = torch.arange(64)
    base = {"seed": 5, "step": 1, "stream": 0}
    variants = [
        {},
        {"seed": 6},
        {"seed": 5 + 2**32},
        {"step": 2},
        {"stream": 1},
        {"rounding": True},
    ]
    drawn = {tuple(philox.words(indices, **(base | variant)).tolist()) for variant in variants}
    assert len(drawn) == len(variants)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_a_seed_is_its_two_complement(seed):
    signed = seed - 2**64 if seed >= 2**63 else seed
    indices = torch.arange(9)
    assert torch.equal(
        philox.words(indices, seed=seed, step=1, stream=0),
        philox.words(indices, seed=signed, step=1, stream=0),
    )
    in_tensor = philox.words(indices, seed=torch.tensor(signed), step=1, stream=0)
    assert torch.equal(philox.words(indices, seed=seed, step=1, stream=0), in_tensor)


def test_rounding_words_are_the_known_answer_under_the_key_that_undoes_the_xor():
    seed = 0x9E3779B9
    assert [word(lane, seed=seed, step=0, stream=0, rounding=True) for lane in range(4)] == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


def test_uniform_has_steps_of_two_to_the_minus_24_and_stays_below_one():
    words = torch.tensor([0, 255, 256, 0xFFFFFFFF])
    assert philox.uniform(words).tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]
    drawn = philox.uniform(
        philox.words(torch.arange(100_000), seed=3, step=1, stream=0), torch.float64
    )
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-9


# Layouts: offset, run, stride; the expected indices are those of NumPy's slices of the whole
# tensor.
LAYOUTS = [
    pytest.param((0, 12, 12), np.s_[:, :], id="whole"),
    pytest.param((4, 8, 8), np.s_[1:, :], id="rows"),
    pytest.param((1, 2, 4), np.s_[:, 1:3], id="columns"),
    pytest.param((3, 1, 4), np.s_[:, 3:], id="one column"),
]


@pytest.mark.parametrize(("layout", "part"), LAYOUTS)
def test_element_indices(layout, part):
    whole = np.arange(12).reshape(3, 4)
    assert philox.element_indices(whole[part].size, layout).tolist() == whole[part].ravel().tolist()


def test_element_indices_of_nothing_and_past_32_bits():
    assert philox.element_indices(0, (0, 0, 0)).tolist() == []
    assert philox.element_indices(3, (2**40 + 1, 2, 2**35)).tolist() == [
        2**40 + 1,
        2**40 + 2,
        2**40 + 1 + 2**35,
    ]


# why_not and choose

OPERATOR = "selective.selective_adamw_"


def test_the_reference_serves_everything():
    for device in ("cpu", "cuda", "meta"):
        for dtype in (*backends.DTYPES, torch.complex64, None):
            assert backends.why_not("reference", OPERATOR, torch.device(device), dtype) is None


@pytest.mark.parametrize("backend", [b for b in backends.BACKENDS if b != "reference"])
def test_why_not_names_the_reason_and_the_remedy(backend):
    # no backend but the reference runs there
    away = torch.device("meta")
    reason = backends.why_not(backend, OPERATOR, away)
    assert reason is not None and ("use backend=" in reason or "install" in reason)
    dtype_reason = backends.why_not(backend, OPERATOR, CPU, torch.complex64)
    assert (
        dtype_reason is not None
        and "complex64" in dtype_reason
        and "backend='reference'" in dtype_reason
    )


def test_cpp_on_another_device_names_both():
    reason = backends.why_not("cpp", OPERATOR, torch.device("cuda"))
    assert "cpu" in reason and "cuda" in reason


def test_choose_gives_the_best_usable_backend_and_never_fails_for_auto():
    best = backends.choose("auto", OPERATOR, CPU, torch.float32)
    assert best == (
        "cpp" if backends.why_not("cpp", OPERATOR, CPU, torch.float32) is None else "reference"
    )
    assert backends.choose("auto", OPERATOR, torch.device("meta"), torch.float32) == "reference"
    assert backends.choose("reference", OPERATOR, CPU) == "reference"


def test_choose_refuses_a_name_that_is_no_backend():
    with pytest.raises(
        ValueError,
        match=r"backend='fast' is not a backend; use one of 'auto', "
        r"'reference', 'cpp', 'cuda', 'triton'",
    ):
        backends.choose("fast", OPERATOR, CPU)


@pytest.mark.parametrize("backend", [b for b in backends.BACKENDS if b != "reference"])
def test_the_error_for_an_explicit_backend_is_its_why_not(backend):
    away = torch.device("meta")
    with pytest.raises(RuntimeError) as caught:
        backends.choose(backend, OPERATOR, away)
    assert str(caught.value) == (
        f"backend={backend!r} cannot serve {OPERATOR} on meta: "
        f"{backends.why_not(backend, OPERATOR, away)}"
    )


def test_an_instruction_set_that_is_none_is_refused(monkeypatch):
    load = native.load.__wrapped__
    monkeypatch.setenv("UEGR_KERNELS_ISA", "sse9")
    with pytest.raises(ValueError, match=r"UEGR_KERNELS_ISA='sse9'.*baseline, avx2, avx512"):
        load()


def test_a_library_that_was_not_built_is_a_sentence(monkeypatch, tmp_path):
    load = native.load.__wrapped__
    monkeypatch.delenv("UEGR_KERNELS_ISA", raising=False)
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    isa, reason = load()
    assert isa is None and "not built" in reason and "install" in reason
    (tmp_path / "not_built.txt").write_text("no compiler was found\n")
    assert "no compiler was found" in load()[1]


def test_a_library_that_does_not_load_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("UEGR_KERNELS_ISA", raising=False)
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    (tmp_path / "uegr_kernels_baseline.so").write_text("this is no library")
    isa, reason = native.load.__wrapped__()
    assert (
        isa is None
        and ("uegr_kernels_baseline.so does not load") in reason
        and "pip install" in reason
    )


def test_every_operator_of_the_folder_exists():
    names = [one.name for one in vars(op).values() if isinstance(one, Operator)]
    assert len(names) == 6
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(
            f"uegr_kernels::{name}", "CompositeExplicitAutograd"
        )


# The compiled core over NumPy arrays; the module is built in development installs.

FLOATS = [
    pytest.param("float", np.float32, id="float32"),
    pytest.param("double", np.float64, id="float64"),
]
SPECIALS = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1.0,
    -1.0,
    65504.0,
    65519.9,
    65520.0,
    1e38,
    3.4e38,
    6e-8,
    2.9e-8,
    3.1e-8,
    6.1e-5,
    1e-40,
    1e-45,
]


@pytest.fixture
def bindings():
    return pytest.importorskip(
        "uegr_kernels._bindings",
        reason="uegr_kernels._bindings is not built; run `python setup.py build_ext --inplace`",
    )


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_compiled_philox_known_answers(bindings, counter, key, expected):
    assert bindings.philox4x32(counter, key) == expected


def test_compiled_words_of_the_known_answers(bindings):
    begin, n, layout, step, seed = 0, 4, (0, 0, 4, 4), 0, 0
    assert bindings.element_words(begin, n, layout, step, seed).tolist() == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


# Layout: stream, offset, run, stride; begin; how many. What the vector lanes do with whole blocks,
# odd starts and runs of any length.
WORD_CASES = [
    pytest.param((0, 0, 1000, 1000), 0, 256, id="a block"),
    pytest.param((3, 0, 1000, 1000), 256, 256, id="the next"),
    pytest.param((3, 0, 1000, 1000), 512, 77, id="a part of one"),
    pytest.param((3, 5, 1000, 1000), 0, 256, id="odd offset"),
    pytest.param((2**32 - 1, 7, 1, 35), 0, 256, id="one column"),
    pytest.param((1, 10, 11, 35), 256, 200, id="columns"),
    pytest.param((1, 3, 300, 301), 256, 256, id="a run ends inside"),
    pytest.param((1, 2**34 - 130, 2**40, 2**40), 0, 256, id="q passes 2^32"),
    pytest.param((1, 2**40 + 1, 7, 2**33 + 3), 0, 256, id="far columns"),
    pytest.param((1, 0, 4, 4), 0, 0, id="nothing"),
]


@pytest.mark.parametrize("seed", [0, 5, 2**63 + 11, 2**64 - 1])
@pytest.mark.parametrize(("layout", "begin", "n"), WORD_CASES)
def test_compiled_words_are_the_references(bindings, layout, begin, n, seed):
    expected = philox.words(
        philox.element_indices(begin + n, layout[1:])[begin:],
        seed=seed,
        step=2**24 - 1,
        stream=layout[0],
    )
    found = bindings.element_words(begin, n, layout, 2**24 - 1, seed)
    assert found.tolist() == expected.tolist()


def test_numbers_that_two_languages_spell_are_the_same(bindings):
    assert {name: i for i, name in enumerate(options.NORMALIZATIONS)} == bindings.NORMALIZATIONS
    assert {name: i for i, name in enumerate(REDUCTIONS)} == bindings.REDUCTIONS
    assert bindings.RANK_BINS == options.RANK_BINS
    assert bindings.RANK_SAMPLED == options.RANK_SAMPLED
    strides = {
        1: 1,
        2**20: 1,
        2**20 + 1: 1,
        2**21: 3,
        3 * 2**20 - 1: 3,
        3 * 2**20: 3,
        2**22: 5,
        2**33 + 7: 8193,
    }
    assert {size: bindings.rank_stride(size) for size in strides} == strides
    assert {size: op.reference.rank_stride(size) for size in strides} == strides


@pytest.mark.parametrize(("suffix", "dtype"), FLOATS)
def test_power_of_two_is_numpys(bindings, suffix, dtype):
    reach = 125 if dtype == np.float32 else 1021
    x = np.concatenate(
        (
            np.linspace(-reach, reach, 200_001),
            np.arange(-reach, reach + 1),
            np.linspace(-1, 1, 10_001),
        )
    ).astype(dtype)
    found, expected = (
        getattr(bindings, f"power_of_two_{suffix}")(x),
        np.exp2(x.astype(np.longdouble)),
    )
    assert np.max(np.abs(found - expected) / expected) <= 2.5 * np.finfo(dtype).eps
    whole = x == np.round(x)
    np.testing.assert_array_equal(found[whole], expected[whole].astype(dtype))


def ulps(found, expected, dtype):
    """Gives the largest error in units of the last place, relative to NumPy's longdouble; zeros
    must be zeros.
    """
    assert np.array_equal(found == 0, expected.astype(dtype) == 0)
    gaps = np.abs(found - expected)[expected != 0] / np.abs(expected)[expected != 0]
    return np.max(gaps) / np.finfo(dtype).eps


@pytest.mark.parametrize(("suffix", "dtype"), FLOATS)
def test_exponential_is_numpys(bindings, suffix, dtype):
    low, high = (-87.3, 88) if dtype == np.float32 else (-708, 708)
    x = np.concatenate(
        (np.linspace(low, high, 400_001), np.linspace(-1, 1, 100_001), np.arange(low, high))
    ).astype(dtype)
    exponential = getattr(bindings, f"exponential_{suffix}")
    assert ulps(exponential(x), np.exp(x.astype(np.longdouble)), dtype) < 2
    special = exponential(np.array([0, -0.0, -np.inf, -1e30, -800, np.nan], dtype))
    np.testing.assert_array_equal(special, [1, 1, 0, 0, 0, np.nan])


@pytest.mark.parametrize(("suffix", "dtype"), FLOATS)
def test_half_complement_and_its_logarithm_are_numpys(bindings, suffix, dtype):
    t = np.concatenate((np.linspace(0, 40, 400_001), np.logspace(-30, 3, 100_001), [0])).astype(
        dtype
    )
    complement = getattr(bindings, f"half_complement_{suffix}")
    assert ulps(complement(-t), -np.expm1(-t.astype(np.longdouble)) / 2, dtype) < 2
    np.testing.assert_array_equal(
        complement(np.array([0, -1e4, -np.inf, np.nan], dtype)), [0, 0.5, 0.5, np.nan]
    )
    u = np.concatenate((np.linspace(0, 0.5, 400_001), np.logspace(-30, -1, 100_001))).astype(dtype)
    logarithm = getattr(bindings, f"minus_log_of_complement_{suffix}")
    assert ulps(logarithm(u), -np.log1p(-u.astype(np.longdouble)), dtype) < 2
    assert np.isnan(logarithm(np.array([np.nan], dtype)))


@pytest.mark.parametrize(("suffix", "dtype"), FLOATS)
def test_rank_bins_are_the_references(bindings, suffix, dtype):
    x = np.abs(
        np.random.default_rng(0).standard_normal(20_000)
        * 10.0 ** np.random.default_rng(1).integers(-44, 38, 20_000)
    ).astype(dtype)
    edges = (np.arange(0, 0x7F80, 17, dtype=np.uint32) << 16).view(np.float32).astype(dtype)
    x = np.concatenate(
        (x, edges, np.nextafter(edges, dtype(0)), np.nextafter(edges, dtype(np.inf)))
    )
    if dtype == np.float64:
        x = np.concatenate((x, [1e300, 1e-300, np.finfo(np.float64).max]))
    x = x[np.isfinite(x)]
    np.testing.assert_array_equal(
        getattr(bindings, f"rank_bin_{suffix}")(x), op.reference.bins(torch.from_numpy(x)).numpy()
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_16_bit_conversions_are_torchs(bindings, name, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    found, expected = (
        getattr(bindings, f"widen_{name}")(every.numpy()),
        every.view(dtype).float().numpy(),
    )
    finite = np.isfinite(expected) | np.isinf(expected)
    np.testing.assert_array_equal(found[finite].view(np.uint32), expected[finite].view(np.uint32))
    assert np.isnan(found[~finite]).all()

    values = expected[np.isfinite(expected)]
    # ties
    between = (np.sort(values)[:-1] / 2 + np.sort(values)[1:] / 2).astype(np.float32)
    noise = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate(
        (
            values,
            between,
            np.nextafter(between, np.float32(np.inf)),
            np.nextafter(between, -np.float32(np.inf)),
            noise[np.isfinite(noise)],
            SPECIALS,
        )
    )
    x = x.astype(np.float32)
    rounded = torch.from_numpy(getattr(bindings, f"round_{name}")(x)).view(dtype).float().numpy()
    np.testing.assert_array_equal(rounded, torch.from_numpy(x).to(dtype).float().numpy())
    np.testing.assert_array_equal(np.signbit(rounded)[~np.isnan(x)], np.signbit(x)[~np.isnan(x)])


def test_stochastic_cut_is_the_references(bindings):
    with np.errstate(over="ignore"):
        x = np.concatenate((np.random.default_rng(0).standard_normal(5000), SPECIALS)).astype(
            np.float32
        )
    for word in (0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x12345678):
        found = (
            torch.from_numpy(bindings.cut_bfloat16(x, word)).view(torch.bfloat16).float().numpy()
        )
        expected = (
            op.reference.round_stochastically(torch.from_numpy(x), torch.tensor(word & 0xFFFF))
            .float()
            .numpy()
        )
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("suffix", "dtype"), FLOATS)
@pytest.mark.parametrize("normalization", ["minmax", "range"])
@pytest.mark.parametrize("salient", [False, True], ids=["printed", "salient"])
@pytest.mark.parametrize("previous", [False, True], ids=["current", "previous"])
def test_inverse_probability_is_the_references(
    bindings, suffix, dtype, normalization, salient, previous
):
    # Kept statistics, a span of 0, one whose reciprocal overflows, nothing finite, the largest
    # float.
    largest, least = np.finfo(dtype).max, np.finfo(dtype).tiny
    for low, high in (
        (0.5, 2.0),
        (0.0, 1.0),
        (3.0, 3.0),
        (0.0, least / 4),
        (np.inf, -np.inf),
        (1.0, largest),
        (0.0, np.finfo(np.float64).max),
    ):
        for threshold, sharpness, floor in (
            (0.8, 5.0, 0.0),
            (-1.0, 0.0, 0.0),
            (0.5, 60.0, 0.0),
            (0.3, 5.0, 0.25),
            (1e30, 1e30, 0.0),
        ):
            ends = np.clip([low, high], 0, largest) if low <= high else np.array([0.0, 1.0])
            s = (
                np.linspace(*ends, 101).astype(dtype)
                if ends[1] < largest
                else np.array([1.0, 1e10, largest / 2, largest], dtype)
            )
            if previous:
                s = np.concatenate((s, np.array([0.0, 1e-30, 100.0, 1e30], dtype)))
            chosen = {
                "threshold": threshold,
                "sharpness": sharpness,
                "normalization": normalization,
                "min_probability": floor,
            }
            statistics = {
                "direction": options.DIRECTIONS[salient],
                "statistics": options.STATISTICS[previous],
            }
            selection = options.Selection(
                **chosen,
                **statistics,
                scope="tensor",
                rescale=True,
                keep_probability=1.0,
                target="gradient",
            )
            g, saliency = (
                torch.ones(s.shape, dtype=getattr(torch, np.dtype(dtype).name)),
                torch.from_numpy(s),
            )
            expected = op.reference.inverse_probability(
                g, saliency, torch.tensor([low, high], dtype=torch.float64), selection
            ).numpy()
            number = options.NORMALIZATIONS.index(normalization)
            found = getattr(bindings, f"inverse_probability_{suffix}")(
                s, low, high, threshold, sharpness, number, salient, previous, floor
            )
            np.testing.assert_allclose(
                found,
                expected,
                rtol=max(1.0, sharpness / 5) * (2e-6 if dtype == np.float32 else 1e-14),
            )
