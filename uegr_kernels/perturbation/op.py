"""The perturbing operators, which all write into tensors they are given: schemas and fakes."""

from ..core.operator import Operator, writes_only
from . import reference as reference

# To the compiled kernels a norm and what it is taken over are positions here
# (csrc/perturbation/perturbation.h has the same order).
NORMS = ("l2", "linf")
PERS = ("sample", "token", "all")
WORDS = {"norm": NORMS, "per": PERS}
NO_VMAP = "{} of uegr_kernels does not run under torch.func.vmap; give the whole batch"


def _load_triton() -> None:
    """Gives the operators their Triton functions."""
    from . import triton

    fgm_perturbation_.triton = triton.fgm_perturbation_
    pgd_step_.triton = triton.pgd_step_
    perturb_weights_.triton = triton.perturb_weights_


# seed: a 0-d int64 tensor, on the CPU or beside the others, which only kernels read; None: no
# random mask.
fgm_perturbation_ = Operator(
    __package__,
    "fgm_perturbation_(Tensor grad, Tensor? mask, Tensor? seed, Tensor(a!) out, *, float epsilon, "
    "int norm, int per, float keep_probability, int step) -> ()",
    reference.fgm_perturbation_,
    load_triton=_load_triton,
    fake=writes_only,
    words=WORDS,
    no_vmap=NO_VMAP.format("fgm_perturbation"),
)
pgd_step_ = Operator(
    __package__,
    "pgd_step_(Tensor delta, Tensor grad, Tensor? mask, Tensor(a!) out, *, float step_size, "
    "float radius, int norm, int per) -> ()",
    reference.pgd_step_,
    load_triton=_load_triton,
    fake=writes_only,
    words=WORDS,
    no_vmap=NO_VMAP.format("pgd_step"),
)
perturb_weights_ = Operator(
    __package__,
    "perturb_weights_(Tensor(a!)[] params, Tensor[] grads, Tensor? seed, *, int[] streams, "
    "float epsilon, bool together, float keep_probability, int step) -> ()",
    reference.perturb_weights_,
    load_triton=_load_triton,
    fake=writes_only,
    words={},
    no_vmap=NO_VMAP.format("perturb_weights"),
)
