"""The house's rules on who imports and includes whom and on what stands where. Each rule is
shown to fail on a bad example first.
"""

import ast
import collections
import dataclasses
import functools
import importlib
import io
import pathlib
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator

import pytest

from uegr_kernels.bistage import StageOptions
from uegr_kernels.divergence import LossOptions

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "uegr_kernels"
FOLDERS = {
    folder.name
    for folder in (ROOT / PACKAGE).iterdir()
    if folder.is_dir() and folder.name[0] != "_"
}
OPERATORS = sorted(FOLDERS - {"core", "recipes", "analysis", "integrations", "finetune"})
OPERATOR = f"({'|'.join(OPERATORS)})"
# An operator's public files, what stands between them and `op`, and the rest.
PUBLIC = ("api", "optimizers", "functional")
BETWEEN = ("batch", "state", "cached_step")
LAYERS = (*PUBLIC, *BETWEEN, "options", "op", "reference", "triton")
MODULES = (
    "bistage",
    "passes",
    "batch_axis",
    "recipes",
    "analysis",
    "integrations",
    "finetune",
    "models",
    "core",
    "_bindings",
    "__main__",
)


@dataclasses.dataclass(frozen=True)
class Rule:
    sentence: str
    # a regular expression over whole paths
    files: str
    check: Callable[[pathlib.PurePosixPath, str], Iterator[str]]
    # "path | text"
    bad: tuple[str, ...]
    good: tuple[str, ...]


RULES: list[Rule] = []


def rule(sentence: str, files: str, *, bad: list[str], good: list[str]):
    """Registers a function that yields what breaks the rule in one file; `bad` and `good` are
    examples, "path | text".
    """

    def register(check):
        RULES.append(Rule(sentence, files, check, tuple(bad), tuple(good)))
        return check

    return register


@functools.cache
def tree_files() -> tuple[pathlib.PurePosixPath, ...]:
    folders = {
        PACKAGE: (".py",),
        "python_tests": (".py",),
        "bench": (".py",),
        "csrc": (".h", ".cuh", ".cpp", ".cu"),
    }
    found = [
        file
        for folder, endings in folders.items()
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in endings
    ]
    return tuple(
        pathlib.PurePosixPath(file.relative_to(ROOT).as_posix())
        for file in [ROOT / "setup.py", *found]
    )


# ---- Python: what a file imports, and which layer a module belongs to


@dataclasses.dataclass(frozen=True)
class Import:
    # absolute; for `from a import b`, a.b
    module: str
    # inside a function
    lazy: bool

    @property
    def ours(self) -> bool:
        return self.module.split(".")[0] == PACKAGE

    @property
    def operator(self) -> str | None:
        words = self.module.split(".")
        return words[1] if self.ours and len(words) > 1 and words[1] in OPERATORS else None

    @property
    def layer(self) -> str:
        """Gives the package for a foreign module; for ours the operator's layer, the module's name,
        or "public".
        """
        words = self.module.split(".")
        if not self.ours:
            return words[0]
        if self.operator:
            return words[2] if len(words) > 2 and words[2] in LAYERS else "public"
        return words[1] if len(words) > 1 and words[1] in MODULES else "public"


def imports(path: pathlib.PurePosixPath, text: str) -> list[Import]:
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.parts[: len(path.parts) - node.level] if node.level else ()
            start = ".".join([*above, *([node.module] if node.module else [])])
            found.extend(Import(f"{start}.{alias.name}", lazy) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(
                child, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            )

    visit(ast.parse(text), False)
    return found


def unless(
    allowed: Callable[[Import], bool], path: pathlib.PurePosixPath, text: str
) -> Iterator[str]:
    return (f"imports {entry.module}" for entry in imports(path, text) if not allowed(entry))


def own(path: pathlib.PurePosixPath, entry: Import) -> bool:
    return entry.operator == path.parts[1]


def standard(entry: Import) -> bool:
    return entry.layer in sys.stdlib_module_names


@rule(
    "`__init__` imports the operators, `bistage` and `recipes` only (anything else of ours inside "
    "a function, on demand)",
    f"{PACKAGE}/__init__.py",
    bad=[
        "uegr_kernels/__init__.py | from .core import native",
        "uegr_kernels/__init__.py | from .selective.op import choose",
    ],
    good=[
        "uegr_kernels/__init__.py | from .selective import SelectiveAdamW\nfrom .bistage import "
        "BiStage\nfrom . import recipes"
    ],
)
def init_imports(path, text):
    return unless(
        lambda entry: (
            entry.lazy or not entry.ours or entry.layer in ("public", *PUBLIC, "bistage", "recipes")
        ),
        path,
        text,
    )


@rule(
    "An operator's `__init__` re-exports its `api`, or `optimizers` and `functional`, and nothing "
    "else",
    f"{PACKAGE}/{OPERATOR}/__init__.py",
    bad=[
        "uegr_kernels/selective/__init__.py | from .op import choose",
        "uegr_kernels/selective/__init__.py | from .options import Selection",
        "uegr_kernels/selective/__init__.py | import torch",
    ],
    good=[
        "uegr_kernels/divergence/__init__.py | from .api import uegr_loss",
        "uegr_kernels/selective/__init__.py | from .optimizers import SelectiveAdamW",
    ],
)
def operator_init_imports(path, text):
    return unless(lambda entry: own(path, entry) and entry.layer in PUBLIC, path, text)


@rule(
    "An operator never imports another operator: `bistage` is the only place where they meet",
    f"{PACKAGE}/{OPERATOR}/.*",
    bad=[
        "uegr_kernels/selective/optimizers.py | from ..divergence import pairwise_js",
        "uegr_kernels/selective/op.py | def f():\n  from ..divergence import op",
    ],
    good=["uegr_kernels/selective/optimizers.py | from . import op"],
)
def operators_apart(path, text):
    return unless(lambda entry: entry.operator is None or own(path, entry), path, text)


@rule(
    "The public files (`api`, `optimizers`, `functional`) import their own `op`, what leads to it "
    "(`options`, `batch`, `state`, `cached_step`) and `core`: they never go past `op` to "
    "`reference` or `triton`",
    f"{PACKAGE}/{OPERATOR}/({'|'.join(PUBLIC)}).py",
    bad=[
        "uegr_kernels/divergence/api.py | from . import reference",
        "uegr_kernels/selective/optimizers.py | from . import reference",
        "uegr_kernels/selective/functional.py | from . import optimizers",
        "uegr_kernels/selective/functional.py | from .. import bistage",
    ],
    good=[
        "uegr_kernels/selective/optimizers.py | import torch\nfrom ..core import backends\nfrom . "
        "import op\nfrom .batch import Batch"
    ],
)
def public_imports(path, text):
    allowed = (*BETWEEN, "options", "op", "core")
    return unless(lambda entry: not entry.ours or entry.layer in allowed, path, text)


@rule(
    "`batch`, `state` and `cached_step` stand between the public files and `op`: each imports "
    "`op`, `options`, `core` and those named before it",
    f"{PACKAGE}/{OPERATOR}/({'|'.join(BETWEEN)}).py",
    bad=[
        "uegr_kernels/selective/batch.py | from .state import Packed",
        "uegr_kernels/selective/state.py | from .optimizers import SelectiveAdamW",
        "uegr_kernels/selective/batch.py | from . import reference",
    ],
    good=["uegr_kernels/selective/state.py | from ..core import memory\nfrom .batch import Batch"],
)
def imports_between(path, text):
    allowed = (*BETWEEN[: BETWEEN.index(path.stem)], "options", "op", "core")
    return unless(lambda entry: not entry.ours or entry.layer in allowed, path, text)


@rule(
    "`options` imports `core.checks` alone",
    f"{PACKAGE}/{OPERATOR}/options.py",
    bad=[
        "uegr_kernels/selective/options.py | from . import op",
        "uegr_kernels/selective/options.py | from ..core import memory",
    ],
    good=["uegr_kernels/selective/options.py | import dataclasses\nfrom ..core import checks"],
)
def options_imports(path, text):
    allowed = f"{PACKAGE}.core.checks"
    return unless(lambda entry: not entry.ours or entry.module.startswith(allowed), path, text)


@rule(
    "`op` imports `core`, its own `options` and `reference`, and its own `triton` at first use, "
    "inside a function",
    f"{PACKAGE}/{OPERATOR}/op.py",
    bad=[
        "uegr_kernels/selective/op.py | from . import triton",
        "uegr_kernels/selective/op.py | from . import batch",
    ],
    good=[
        "uegr_kernels/selective/op.py | from ..core import backends\nfrom . import "
        "reference\ndef f():\n  from . import triton"
    ],
)
def op_imports(path, text):
    return unless(
        lambda entry: (
            not entry.ours
            or entry.layer in ("core", "options", "reference")
            or (entry.layer == "triton" and entry.lazy)
        ),
        path,
        text,
    )


@rule(
    "`reference` imports torch, `core.philox` and `options`, and no more than "
    "Python itself besides",
    f"{PACKAGE}/{OPERATOR}/reference.py",
    bad=[
        f"uegr_kernels/selective/reference.py | {text}"
        for text in ("import numpy", "from ..core import backends", "from . import op")
    ],
    good=[
        "uegr_kernels/selective/reference.py | import math\nimport torch\nfrom ..core import "
        "philox\nfrom ..core.philox import words\nfrom .options import Selection"
    ],
)
def reference_imports(path, text):
    return unless(
        lambda entry: (
            standard(entry)
            or entry.layer == "torch"
            or entry.layer == "options"
            or entry.module.startswith(f"{PACKAGE}.core.philox")
        ),
        path,
        text,
    )


@rule(
    "`triton.py`, or the folder `triton/`, imports torch, triton, `core.triton_ops`, `options` and "
    "its own files, and no more than Python itself besides",
    f"{PACKAGE}/{OPERATOR}/triton(/.*)?.py",
    bad=[
        f"uegr_kernels/perturbation/triton.py | {text}"
        for text in ("from . import reference", "from ..core import philox", "import numpy")
    ]
    + [
        f"uegr_kernels/selective/triton/launch.py | {text}"
        for text in ("from .. import op", "from ...core import checks", "import numpy")
    ],
    good=[
        "uegr_kernels/perturbation/triton.py | import torch\nimport triton.language as tl\nfrom "
        "..core import triton_ops",
        "uegr_kernels/selective/triton/launch.py | import torch\nimport triton\nfrom "
        "...core.triton_ops import bits\nfrom ..options import Selection\nfrom .kernels import "
        "Form",
    ],
)
# "[triton" would be taken for a backend's case
def imports_of_triton(path, text):
    allowed = ("torch", "triton")
    own_files = f"{PACKAGE}.{path.parts[1]}.triton."
    return unless(
        lambda entry: (
            standard(entry)
            or (not entry.ours and entry.layer in allowed)
            or (own(path, entry) and entry.layer == "options")
            or entry.module.startswith((f"{PACKAGE}.core.triton_ops", own_files))
        ),
        path,
        text,
    )


@rule(
    "`core` imports nothing of ours but `core`",
    f"{PACKAGE}/core/.*",
    bad=[
        "uegr_kernels/core/backends.py | from ..selective import op",
        "uegr_kernels/core/native.py | import uegr_kernels.bistage",
    ],
    good=["uegr_kernels/core/backends.py | import torch\nfrom . import native"],
)
def core_imports(path, text):
    return unless(lambda entry: not entry.ours or entry.layer == "core", path, text)


@rule(
    "`bistage`, and `passes` and `batch_axis` below it, compose the operators' public names; they "
    "know none of their layers",
    f"{PACKAGE}/(bistage|passes|batch_axis).py",
    bad=[
        "uegr_kernels/bistage.py | from .divergence import op",
        "uegr_kernels/bistage.py | from .selective.reference import selection_mask",
        "uegr_kernels/passes.py | from .recipes import recipe",
        "uegr_kernels/passes.py | from .bistage import BiStage",
    ],
    good=[
        "uegr_kernels/bistage.py | from .core.backends import BACKENDS\nfrom .passes import Pass\n"
        "from .divergence import uegr_loss",
        "uegr_kernels/passes.py | from .batch_axis import InputBatch\nfrom .dropout import x",
    ],
)
def bistage_imports(path, text):
    allowed = ("public", *PUBLIC, "core", "passes", "batch_axis")
    return unless(lambda entry: not entry.ours or entry.layer in allowed, path, text)


@functools.cache
def exported(folder: str) -> frozenset[str]:
    return frozenset(importlib.import_module(f"{PACKAGE}.{folder}").__all__)


# What the users of the public names may import besides, by folder.
BESIDES = {
    "recipes": ("passes", "core.checks", "options"),
    "analysis": ("passes", "core.checks"),
    "integrations": ("integrations",),
    "finetune": ("models", "integrations", "finetune", "core.checks"),
}


@rule(
    "`recipes`, `analysis`, `integrations` and `finetune` use public names, as a user would: of "
    "each other's folder what its `__all__` names; `recipes` and `analysis` make passes of their "
    "own with `passes` and use `core.checks`, and `recipes` the operators' `options`; `finetune` "
    "uses `models`, `integrations` and `core.checks`",
    f"{PACKAGE}/(recipes|analysis|integrations|finetune)/.*",
    bad=[
        "uegr_kernels/recipes/weight_ascent.py | from ..core import philox",
        "uegr_kernels/recipes/recipe.py | from ..models import TextCNN",
        "uegr_kernels/recipes/recipe.py | from ..batch_axis import Inputs",
        "uegr_kernels/analysis/cka.py | from ..selective.op import SCHEMAS",
        "uegr_kernels/analysis/cka.py | from ..selective.options import Selection",
        "uegr_kernels/integrations/transformers.py | from ..core import checks",
        "uegr_kernels/integrations/transformers.py | from ..passes import Runner",
        "uegr_kernels/finetune/command.py | from ..core import native",
        "uegr_kernels/finetune/train.py | from ..passes import Runner",
        "uegr_kernels/finetune/train.py | from ..selective.api import SelectiveAdamW",
        "uegr_kernels/finetune/report.py | from ..analysis.calibration import ood_auroc",
        "uegr_kernels/analysis/cka.py | def f():\n  from ..recipes.registry import NAMES",
        "uegr_kernels/integrations/transformers.py | from ..recipes import options",
    ],
    good=[
        "uegr_kernels/recipes/weight_ascent.py | from .. import perturbed_weights\nfrom ..bistage "
        "import BiStage\nfrom ..passes import Pass",
        "uegr_kernels/recipes/recipe.py | from ..core import checks\nfrom ..core.checks import "
        "number",
        "uegr_kernels/recipes/selection.py | from ..selective.options import Selection",
        "uegr_kernels/analysis/attack.py | from ..core import checks\nfrom ..passes import Runner",
        "uegr_kernels/finetune/train.py | from .. import recipes\nfrom ..analysis import cka\n"
        "from ..analysis.pictures import figure\nfrom ..models import MODELS\n"
        "from .data import Data",
    ],
)
def users_import(path, text):
    allowed = ("public", "bistage", "recipes", "analysis", *BESIDES[path.parent.name])

    def may(entry: Import) -> bool:
        checks = entry.module.startswith(f"{PACKAGE}.core.checks")
        if entry.layer in ("recipes", "analysis") and entry.layer != path.parent.name:
            folder, name = [*entry.module.split("."), "*"][1:3]
            return name == "*" or name in exported(folder)
        return not entry.ours or ("core.checks" if checks else entry.layer) in allowed

    return unless(may, path, text)


@rule(
    "`finetune` is the commands' alone: in the package only `__main__` imports it",
    f"{PACKAGE}/(?!finetune/).*",
    bad=[
        "uegr_kernels/analysis/cka.py | from ..finetune import data",
        "uegr_kernels/__init__.py | from .finetune.train import train",
    ],
    good=["uegr_kernels/__main__.py | def main():\n  from .finetune import command"],
)
def finetune_is_imported(path, text):
    return unless(
        lambda entry: entry.layer != "finetune" or (path.name == "__main__.py" and entry.lazy),
        path,
        text,
    )


@rule(
    "The package needs torch alone: anything else is imported inside a function (Triton by "
    "triton.py or triton/, and core/triton_ops.py)",
    f"{PACKAGE}/(?!integrations/|finetune/(train|report|intervals).py|.*triton(_ops)?.py|"
    ".*/triton/).*",
    bad=[
        "uegr_kernels/analysis/cka.py | import matplotlib.pyplot as plt",
        "uegr_kernels/core/backends.py | try:\n  import triton\nexcept ImportError: ...",
    ],
    good=[
        "uegr_kernels/analysis/cka.py | import math\nimport torch\nfrom .. import BiStage\ndef "
        "plot_cka():\n  import matplotlib"
    ],
)
def torch_alone(path, text):
    return unless(
        lambda entry: entry.lazy or standard(entry) or entry.ours or entry.layer == "torch",
        path,
        text,
    )


@rule(
    "Pictures have one style: `analysis/pictures.py` alone imports matplotlib",
    f"({PACKAGE}|bench)/(?!analysis/pictures[.]py).*[.]py",
    bad=[
        "uegr_kernels/analysis/cka.py | def plot():\n  from matplotlib.figure import Figure",
        "bench/plot.py | import matplotlib",
    ],
    good=["bench/plot.py | from uegr_kernels.analysis.pictures import figure"],
)
def one_style(path, text):
    return unless(lambda entry: entry.layer != "matplotlib", path, text)


@rule(
    "Tests import public names, `reference` by name, and what `core`, `op` and `options` hold",
    "python_tests/.*",
    bad=[
        "python_tests/test_core.py | from uegr_kernels.selective.optimizers import x",
        "python_tests/test_divergence.py | from uegr_kernels.divergence import triton",
    ],
    good=[
        "python_tests/test_core.py | import uegr_kernels as uk\nfrom uegr_kernels.selective "
        "import op, reference\nimport scipy"
    ],
)
def imports_of_tests(path, text):
    return unless(
        lambda entry: not entry.ours or entry.layer not in (*PUBLIC, *BETWEEN, "triton"), path, text
    )


@rule(
    "Benches import public names, and `reference` by name",
    "bench/.*",
    bad=[
        "bench/bench_selective.py | from uegr_kernels.selective import op",
        "bench/bench_selective.py | from uegr_kernels.selective import triton",
    ],
    good=[
        "bench/bench_selective.py | import torch\nimport uegr_kernels as uk\nfrom "
        "uegr_kernels.selective import reference"
    ],
)
def imports_of_benches(path, text):
    return unless(
        lambda entry: not entry.ours or entry.layer in ("public", "reference", *MODULES), path, text
    )


@rule(
    "bench/ is speed alone: the research in bench/evidence is imported by the two commands that "
    "lead to it",
    "bench/(?!evidence/).*",
    bad=[
        "bench/harness.py | from .evidence import training",
        "bench/readme.py | from bench.evidence.report import summary",
    ],
    good=[
        "bench/accuracy.py | from .evidence.accuracy import main",
        "bench/harness.py | from . import timer",
    ],
)
def speed_alone(path, text):
    leads = path.name in ("accuracy.py", "analyses.py")
    return unless(lambda entry: leads or "evidence" not in entry.module.split("."), path, text)


@rule(
    "setup.py imports Python and setuptools: no torch, no network",
    "setup.py",
    bad=[
        "setup.py | import torch",
        "setup.py | def f():\n  import urllib.request",
        "setup.py | import requests",
    ],
    good=["setup.py | import os\nfrom setuptools import setup"],
)
def setup_imports(path, text):
    network = ("urllib", "http", "socket", "ftplib", "ssl")
    return unless(
        lambda entry: (
            entry.layer == "setuptools" or (standard(entry) and entry.layer not in network)
        ),
        path,
        text,
    )


# ---- Python: what stands where

FORMULA = (
    "exp",
    "exp2",
    "expm1",
    "log",
    "log2",
    "log1p",
    "sqrt",
    "rsqrt",
    "sigmoid",
    "tanh",
    "softmax",
    "log_softmax",
)


def calls(text: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else node.func.id
                if isinstance(node.func, ast.Name)
                else ""
            )
            yield node.lineno, name.removesuffix("_")


@rule(
    "No formula outside of `reference`: mathematics stands in `reference`, in Triton and in the "
    "headers, once in each language",
    f"{PACKAGE}/{OPERATOR}/(?!reference|triton).*.py",
    bad=[
        "uegr_kernels/selective/functional.py | p = torch.sigmoid(s)",
        "uegr_kernels/divergence/op.py | def f(x):\n  return x.sqrt_()",
    ],
    good=["uegr_kernels/selective/optimizers.py | op.selective_adamw_(exp_avg)"],
)
def no_formula(path, text):
    return (f"line {line} calls {name}" for line, name in calls(text) if name in FORMULA)


@rule(
    "Below the public files every argument is required: a default is written once, in the public "
    "signature or in `options`",
    f"{PACKAGE}/{OPERATOR}/({'|'.join(BETWEEN)}|op|reference|triton(/.*)?).py",
    bad=[
        "uegr_kernels/selective/op.py | def f(x, eps=1e-8): ...",
        "uegr_kernels/selective/triton/launch.py | def f(x, eps=1e-8): ...",
        "uegr_kernels/selective/reference.py | def f(x, *, eps=1e-8): ...",
        "uegr_kernels/selective/triton/launch.py | class Call:\n  seed: int = 0",
        "uegr_kernels/selective/batch.py | class Batch:\n  sizes: list = field()",
    ],
    good=[
        "uegr_kernels/selective/op.py | def f(x, *, eps): ...",
        "uegr_kernels/selective/batch.py | class Batch:\n  seed: int\n  KEYS: ClassVar[int] = 1",
    ],
)
def no_defaults(path, text):
    for node in ast.walk(ast.parse(text)):
        for field in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign) and field.value is not None:
                if "ClassVar" not in ast.unparse(field.annotation):
                    yield f"line {field.lineno} gives a field of {node.name} a default"
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and (
            node.args.defaults or any(node.args.kw_defaults)
        ):
            yield f"line {node.lineno} gives {getattr(node, 'name', 'a lambda')} a default"


@rule(
    "Defaults of the loss's options stand in `LossOptions`: what is built on them names it, or "
    "`StageOptions`, which does",
    f"{PACKAGE}/(recipes|integrations|finetune)/.*",
    bad=[
        "uegr_kernels/recipes/recipe.py | class A:\n  task: str = choice('classification', TASKS)",
        "uegr_kernels/recipes/recipe.py | class A:\n  ignore_index: int = integer(-100)",
        "uegr_kernels/recipes/recipe.py | class A:\n  label_smoothing: float = number(0.0, 0, 1)",
        "uegr_kernels/finetune/train.py | def f(*, js_weight=0.01): ...",
        "uegr_kernels/finetune/train.py | def f(*, task='classification'): ...",
    ],
    good=[
        "uegr_kernels/recipes/recipe.py | class A:\n  task: str = choice(StageOptions.task, TASKS)",
        "uegr_kernels/recipes/consolidation.py | class A:\n  kappa: float = number(10.0)",
    ],
)
def loss_defaults(path, text):
    names = LossOptions.__dataclass_fields__.keys() & StageOptions.__dataclass_fields__.keys()
    for node in ast.walk(ast.parse(text)):
        given = []
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            given = [(node.target.id, node.value)]
        elif isinstance(node, (ast.FunctionDef, ast.Lambda)):
            arguments = [*node.args.posonlyargs, *node.args.args]
            given = [*zip(reversed(arguments), reversed(node.args.defaults), strict=False)]
            given += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            given = [(argument.arg, value) for argument, value in given]
        for name, value in given:
            if name in names and value is not None:
                first = value.args[0] if isinstance(value, ast.Call) and value.args else value
                if not isinstance(first, ast.Attribute):
                    yield f"line {value.lineno} gives {name} the default {ast.unparse(first)}"


@rule(
    "No environment variable chooses anything outside `core`, and there none chooses a backend",
    f"{PACKAGE}/.*",
    bad=[
        "uegr_kernels/selective/op.py | import os\nos.environ.get('UEGR_X')",
        "uegr_kernels/core/backends.py | os.getenv('UEGR_KERNELS_BACKEND')",
    ],
    good=[
        "uegr_kernels/core/native.py | os.environ.get('UEGR_KERNELS_ISA')",
        "uegr_kernels/core/backends.py | os.environ.get('TRITON_INTERPRET')",
    ],
)
def environment(path, text):
    allowed = ("UEGR_KERNELS_ISA", "TRITON_INTERPRET") if path.parent.name == "core" else ()
    for found in re.finditer(r"(environ|getenv)\b(\W+get)?\W*(\w*)", text):
        if found[3] not in allowed:
            yield f"reads {found[0]!r}"


@rule(
    "A wrong argument raises an error that names it: the package has no `assert`, and leaves the "
    "process to its caller",
    f"{PACKAGE}/.*",
    bad=[
        "uegr_kernels/selective/optimizers.py | assert lr >= 0",
        "uegr_kernels/core/native.py | import sys\nsys.exit('no library')",
    ],
    good=[
        "uegr_kernels/selective/optimizers.py | if lr < 0:\n  raise ValueError(lr)",
        "uegr_kernels/__main__.py | sys.exit(main())",
    ],
)
def errors(path, text):
    yield from (
        f"line {node.lineno} asserts"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assert)
    )
    if path.name != "__main__.py":
        yield from (
            f"line {line} calls exit" for line, name in calls(text) if name in ("exit", "quit")
        )


# What docstrings begin with. A new verb is added here on purpose.
VERBS = set(
    """
    Adds Advances Anneals Applies Balances Brings Calls Checks Chooses Classifies Clears
    Computes Copies Counts Cuts Declares Defines Divides Does Draws Drops Estimates Finds
    Forgets Gives Goes Hands Has Holds Inverts Joins Keeps Launches Leaves Loads Makes Masks
    Moves Multiplies Names Normalises Numbers Passes Performs Puts Raises Reads Remembers
    Removes Returns Rounds Runs Says Selects Sets Signals Squares Starts Steps Stores Sums Takes
    Tells Trains Turns Types Undoes Updates Visits Works Writes Yields
    """.split()
)


@rule(
    "The docstring of a public function, class or method begins with a verb in the third person, "
    "one of VERBS",
    f"{PACKAGE}/.*",
    bad=[
        f"uegr_kernels/selective/optimizers.py | {text}"
        for text in (
            "def f():\n  'The sum of squares.'",
            "def f():\n  'Return the sum of squares.'",
            "async def f():\n  'Whether it is so.'",
            "class C:\n  'A batch.'",
            "class _C:\n  def f(self):\n    'x, rounded.'",
            "def f():\n  'Returns one.'\n  def g():\n    'One.'",
            "@triton.jit\ndef f(x):\n  'An address.'",
        )
    ],
    good=[
        "uegr_kernels/selective/batch.py | def f():\n  'Returns one.'\nclass C:\n  'Holds one.'",
        "uegr_kernels/selective/optimizers.py | def _f():\n  'One.'\ndef g(): ...",
        "uegr_kernels/selective/optimizers.py | def f():\n  'Squares: s = g*g.'",
    ],
)
def docstrings(path, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and node.name[0] != "_" and words[0].rstrip(".,:;") not in VERBS:
                yield f"line {node.lineno}: {node.name}'s begins with {words[0]!r}"


@rule(
    "The choice of a backend never catches an exception to mean no",
    f"{PACKAGE}/core/backends.py",
    bad=[
        "uegr_kernels/core/backends.py | try:\n  import triton\nexcept ImportError:\n  triton = "
        "None"
    ],
    good=["uegr_kernels/core/backends.py | usable = find_spec('triton') is not None"],
)
def no_catching(path, text):
    return (
        f"line {node.lineno} catches"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Try)
    )


# Where a question is asked by trying, and nothing is written: whether options can be hashed;
# `passes` adds words to what a model raises, which goes on.
MAY_CATCH = ("selective/options[.]py", "passes[.]py")


@rule(
    "What may have written is never tried again: no `except` in the operators, their stages and "
    "the recipes; what is to be undone stands in an ExitStack or a `finally`",
    f"{PACKAGE}/(?!{'|'.join(MAY_CATCH)})({OPERATOR}/.*|recipes/.*|bistage.py|passes.py|"
    "batch_axis.py)",
    bad=[
        "uegr_kernels/selective/optimizers.py | try:\n  step()\nexcept RuntimeError:\n  step()",
        "uegr_kernels/recipes/recipe.py | def f():\n  try: step()\n  except BaseException: raise",
        "uegr_kernels/divergence/op.py | with contextlib.suppress(TypeError): f()",
    ],
    good=["uegr_kernels/recipes/recipe.py | try:\n  step()\nfinally:\n  close()"],
)
def no_except(path, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            yield f"line {node.lineno} catches"
    yield from (f"line {line} suppresses" for line, name in calls(text) if name == "suppress")


# ---- C++ and CUDA

STANDARD_HEADER = re.compile(r"<[a-z_0-9]+>|<immintrin\.h>|<arm_neon\.h>")
CUDA_HEADER = re.compile(r'[<"](cuda|cub|cooperative_groups|thrust|nv|curand)')
TORCH_HEADER = re.compile(r'[<"](torch|ATen|c10|caffe2)/')


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', text, re.MULTILINE)


def resolve(path: pathlib.PurePosixPath, header: str) -> str:
    """Tells where a quoted header lies: beside the file, or from csrc/; as a path from csrc/."""
    words = []
    name = header.strip('"')
    for word in [
        *(path.parent.parts[1:] if name.startswith("..") or "/" not in name else []),
        *name.split("/"),
    ]:
        words = words[:-1] if word == ".." else [*words, word]
    return "/".join(words)


def unless_header(
    allowed: Callable[[str], bool], path: pathlib.PurePosixPath, text: str
) -> Iterator[str]:
    """Yields what is not allowed: `allowed` sees <header> as it stands and "header" as a path from
    csrc/.
    """
    seen = {
        header: header if header.startswith("<") else resolve(path, header)
        for header in includes(text)
    }
    return (f"includes {header}" for header, place in seen.items() if not allowed(place))


@rule(
    "An operator's header includes its operator's own, `core` except `tensor.h`, and the standard "
    "library: no torch, no CUDA, no host check, no other operator",
    "csrc/(?!core/)[^/]+/(?!arguments[.]h$)[^/]+[.](h|cuh)",
    bad=[
        f"csrc/selective/selective.h | #include {header}"
        for header in (
            "<cuda_runtime.h>",
            '"../core/tensor.h"',
            '"core/tensor.h"',
            "<torch/a.h>",
            '"../dropout/dropout.h"',
            '"arguments.h"',
        )
    ],
    good=[
        'csrc/selective/rows.cuh | #include "selective.h"\n#include "../core/loops_cuda.cuh"',
        'csrc/selective/selective.h | #include <cmath>\n#include "../core/math.h"\n#include '
        '"core/philox.h"',
    ],
)
def operator_header(path, text):
    return unless_header(
        lambda place: (
            bool(STANDARD_HEADER.fullmatch(place))
            or (
                place.startswith(("core/", f"{path.parent.name}/"))
                and place not in ("core/tensor.h", f"{path.parent.name}/arguments.h")
            )
        ),
        path,
        text,
    )


@rule(
    "`X_cpu.cpp`, `X_cuda.cu` and `arguments.h`, their host checks, include their own `X.h` and "
    "`core`: torch only through `tensor.h`, no other operator",
    "csrc/(?!core/)[^/]+/([^/]+[.](cpp|cu)|arguments[.]h)",
    bad=[
        f"csrc/selective/{file} | #include {header}"
        for file in ("selective_cpu.cpp", "arguments.h")
        for header in ("<torch/csrc/stable/ops.h>", '"../dropout/dropout.h"', "<ATen/ATen.h>")
    ],
    good=[
        "csrc/selective/selective_cpu.cpp | #include <vector>\n#include "
        '"../core/tensor.h"\n#include "arguments.h"\n#include "selective.h"',
        'csrc/selective/arguments.h | #include "../core/tensor.h"\n#include "selective.h"',
    ],
)
def operator_source(path, text):
    def allowed(place: str) -> bool:
        cuda = path.suffix == ".cu" and CUDA_HEADER.match(place)
        return bool(STANDARD_HEADER.fullmatch(place) or cuda) or place.startswith(
            ("core/", f"{path.parent.name}/")
        )

    return unless_header(allowed, path, text)


@rule(
    "`core/tensor.h` is the only file that includes torch",
    "csrc/(?!core/tensor.h).*",
    bad=[
        "csrc/core/loops_cpu.h | #include <torch/csrc/stable/ops.h>",
        "csrc/library.cpp | #include <c10/util/Half.h>",
    ],
    good=['csrc/library.cpp | #include "core/tensor.h"'],
)
def one_torch(path, text):
    return (f"includes {header}" for header in includes(text) if TORCH_HEADER.match(header))


@rule(
    "`bindings.cpp` includes no torch, not even through a header of ours",
    "csrc/bindings.cpp",
    bad=[
        'csrc/bindings.cpp | #include "core/tensor.h"',
        "csrc/bindings.cpp | #include <torch/extension.h>",
    ],
    good=['csrc/bindings.cpp | #include <pybind11/numpy.h>\n#include "core/philox.h"'],
)
def bindings_without_torch(path, text):
    seen, todo = set(), [(path, text)]
    while todo:
        place, content = todo.pop()
        for header in includes(content):
            if TORCH_HEADER.match(header):
                yield (
                    f"includes {header}"
                    if place == path
                    else (f"includes {place}, which includes {header}")
                )
            elif header.startswith('"') and (name := resolve(place, header)) not in seen:
                seen.add(name)
                file = ROOT / "csrc" / name
                todo.append(
                    (pathlib.PurePosixPath("csrc", name), file.read_text() if file.exists() else "")
                )


@rule(
    "The CUDA runtime is included by .cu and .cuh files and `library_cuda.cpp` only",
    "csrc/.*[.](h|cpp)",
    bad=[
        "csrc/core/platform.h | #include <cuda_runtime.h>",
        "csrc/selective/selective_cpu.cpp | #include <cub/cub.cuh>",
    ],
    good=[
        "csrc/library_cuda.cpp | #include <cuda_runtime.h>",
        "csrc/core/math.h | #include <cmath>",
    ],
)
def cuda_runtime(path, text):
    return (
        f"includes {header}"
        for header in includes(text)
        if CUDA_HEADER.match(header) and path.name != "library_cuda.cpp"
    )


@rule(
    "`core/platform.h` is the only file that asks whether nvcc is compiling",
    "csrc/(?!core/platform.h).*",
    bad=[
        "csrc/core/math.h | #ifdef __CUDACC__",
        "csrc/selective/selective.h | #if defined(__CUDA_ARCH__)",
    ],
    good=["csrc/core/math.h | #ifdef __AVX512F__"],
)
def one_platform(path, text):
    return (
        f"asks for {found}"
        for found in re.findall(r"__CUDACC__|__CUDA_ARCH__|__NVCC__|__HIPCC__", text)
    )


@rule(
    "No formula in `*_cpu.cpp` or `*_cuda.cu`: they differ in how elements arrive, the mathematics "
    "is the header's",
    "csrc/.*_(cpu.cpp|cuda.cu)",
    bad=[
        "csrc/selective/selective_cpu.cpp | p = std::exp(x);",
        "csrc/dropout/dropout_cuda.cu | r = sqrtf(n);",
    ],
    good=[
        "csrc/selective/selective_cpu.cpp | probability.inverse(s); // exp(z) is the "
        "header's\nexp_avg(x);"
    ],
)
def no_formula_in_loops(path, text):
    code = re.sub(r"//.*|/\*.*?\*/", "", text)
    return (
        f"calls {name}"
        for name in re.findall(
            r"\b(?:std::|_*)?((?:exp|exp2|expm1|log|log2|log1p|sqrt|rsqrt|pow|tanh)f?)\s*\(", code
        )
    )


# ---- Any file


@rule(
    "Philox's multipliers stand once in each language: core/philox.py and core/philox.h",
    f"({PACKAGE}|csrc)/(?!core/philox[.](py|h)).*",
    bad=[
        "uegr_kernels/selective/reference.py | x * 0xD2511F53",
        "csrc/core/loops_cpu.h | 0xcd9e8d57u",
    ],
    good=["uegr_kernels/selective/reference.py | philox.words(x)"],
)
def one_generator(path, text):
    return re.findall(r"(?i)0x(?:D2511F53|CD9E8D57)|3528531795|3449720151", text)


@rule(
    "A name says what a file does: no fused, fast, v2, utils, common, helpers",
    ".*",
    bad=["csrc/core/utils.h | ", "uegr_kernels/selective/fused_adamw.py | ", "bench/helpers.py | "],
    good=["csrc/core/loops_cpu.h | ", "uegr_kernels/selective/op.py | "],
)
def names(path, text):
    return (
        f"is called {path.name}"
        for word in path.stem.split("_")
        if word in ("fused", "fast", "v2", "utils", "util", "common", "helpers", "misc")
    )


@rule(
    "No `--use_fast_math` and no `-ffast-math`: the masks must agree between backends",
    "setup.py",
    bad=["setup.py | FLAGS = '-O3 -ffast-math'", "setup.py | NVCC = ['--use_fast_math']"],
    good=["setup.py | FLAGS = '-O3 -fno-math-errno'"],
)
def exact_math(path, text):
    return re.findall(r"-ffast-math|-Ofast|-?-use_fast_math", text)


SHAPE = re.compile(r"(#|//) (\([^)]*\)|\[[^]]*\]|\w{1,2}(, \w{1,2})+)")
FOR_A_TOOL = re.compile(r"(#|//) *(noqa|type:|pragma|fmt:|NOLINT|namespace)")
CODE_AND_COMMENT = re.compile(r'((?:[^"/]|"(?:[^"\\]|\\.)*"|/(?!/))*\S)\s*(//.*)')


def trailing_comments(path: pathlib.PurePosixPath, text: str) -> Iterator[tuple[int, str]]:
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip():
                yield token.start[0], token.string
    else:
        for number, line in enumerate(text.splitlines(), 1):
            found = CODE_AND_COMMENT.fullmatch(line)
            if found and line.lstrip()[:1] not in "#/":
                yield number, found[2]


@rule(
    "A comment stands on a line of its own, above what it is on; at a line's end stand shapes, and "
    "words for tools",
    ".*",
    bad=[
        "uegr_kernels/bistage.py | x = 1  # of each pass",
        "uegr_kernels/bistage.py | f(\n  x,  # s\n)",
        "csrc/core/math.h | int x = 1; // bytes",
        'csrc/core/math.h | f("//"); // (why)not',
    ],
    good=[
        "uegr_kernels/bistage.py | # of each pass\nx = 1  # (N, C)\ny = 2  # m, N, C\nz = '# s'",
        "uegr_kernels/bistage.py | import x  # noqa: F401\nw: int = y  # type: ignore[misc]",
        'csrc/core/math.h | // bytes\nint x = 1; // [N]\n#endif // X\nf("a // b");',
        "csrc/core/math.h | } // namespace uegr",
    ],
)
def comments_above(path, text):
    for number, comment in trailing_comments(path, text):
        if not SHAPE.fullmatch(comment) and not FOR_A_TOOL.match(comment):
            yield f"line {number} ends with {comment}"


HALF_A_SENTENCE = re.compile(r" *// *((What|Whether|Which|How|Where|The same)\b.*)")


@rule(
    "A comment of C++ is complete by itself: one on a declaration begins with a verb, none with "
    "What, Whether, Which, How, Where or The same",
    "csrc/.*",
    bad=[
        "csrc/core/math.h | // Whether x is whole.\nbool is_whole(float x);",
        "csrc/core/view.h | // What a kernel knows of a tensor.\n#pragma once",
        "csrc/core/view.h | int f();\n    // The same, in place.\n    int f_();",
    ],
    good=[
        "csrc/core/math.h | // Returns whether x is whole.\nbool is_whole(float x);",
        "csrc/core/view.h | // Holds an address.\n// What else there is, is not here.\nint x;",
    ],
)
def comments_are_whole(path, text):
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        found = HALF_A_SENTENCE.fullmatch(line)
        if found and not inside:
            yield f"line {number} begins with {found[1]}"
        inside = line.lstrip().startswith("//")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.check.__name__)
def test_rule_can_fail(rule):
    for example, breaks in [
        *((example, True) for example in rule.bad),
        *((example, False) for example in rule.good),
    ]:
        path, text = example.split(" | ", 1)
        assert re.fullmatch(rule.files, path), f"{path} is no file that the rule looks at"
        assert bool(list(rule.check(pathlib.PurePosixPath(path), text))) == breaks, (
            f"{example!r}: {rule.sentence}"
        )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.check.__name__)
def test_rule(rule):
    files = [
        path
        for path in tree_files()
        if re.fullmatch(rule.files, str(path)) and path.name != "test_house.py"
    ]
    broken = [
        f"  {path} {what}" for path in files for what in rule.check(path, (ROOT / path).read_text())
    ]
    if broken:
        pytest.fail("\n".join([f"{rule.sentence}:", *broken]), pytrace=False)


# lines of the package
MOST_ANY = 120


def without_a_type(texts: dict[str, str]) -> list[str]:
    """Returns "path:line" of the lines with `Any`, an alias of it, `cast(` or `type: ignore`."""
    trees = [ast.parse(text) for text in texts.values()]
    names = {"Any"}
    while more := {name for tree in trees for name in aliases(tree, names)} - names:
        names |= more
    found = re.compile(rf"\b({'|'.join(sorted(names))})\b|\bcast\(|type: ignore")
    return [
        f"{path}:{number}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if found.search(line)
    ]


def aliases(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Yields the names that a module gives to types that hold one of `names`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (a.asname for a in node.names if a.name in names and a.asname)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            inside = list(ast.walk(node.value))
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            # a value that is called for is no type
            if not any(isinstance(part, ast.Call) for part in inside) and names & {
                getattr(part, "id", getattr(part, "attr", "")) for part in inside
            }:
                yield from (target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("def f(x: Any) -> int: ...", [1]),
        ("def f(x: typing.Any) -> int: ...", [1]),
        ("x = typing.cast(int, y)", [1]),
        ("x = y  # type: ignore[attr-defined]", [1]),
        ("Given = dict[str, Any]\n\ndef f(x: Given) -> Given: ...", [1, 3]),
        ("Given: TypeAlias = dict[str, Any]\nMore = list[Given]\nx: More = []", [1, 2, 3]),
        ("from typing import Any as Loose\nx: Loose = 1", [1, 2]),
        ("Inputs = int | str\ndef f(x: Inputs, any: object) -> object: ...", []),
        ("x = broadcast(y)\nAnything = int", []),
    ],
)
def test_lines_without_a_type_are_found(text, lines):
    assert without_a_type({"a.py": text, "b.py": ""}) == [f"a.py:{line}" for line in lines]


def test_any_stands_at_the_border():
    """`Any` is for what torch and the frameworks hand over; inside, types say what is meant."""
    found = without_a_type(
        {str(path): (ROOT / path).read_text() for path in tree_files() if path.parts[0] == PACKAGE}
    )
    if len(found) > MOST_ANY:
        files = collections.Counter(line.split(":")[0] for line in found)
        pytest.fail(
            "\n".join(
                [
                    f"`Any`, aliases of it, `cast(` and `type: ignore` stand on {len(found)} lines "
                    f"of the package, and {MOST_ANY} are the most; give types in some of:",
                    *(f"  {path} {lines}" for path, lines in files.most_common()),
                ]
            ),
            pytrace=False,
        )


def classes(texts: dict[str, str]) -> dict[str, list[str]]:
    """Returns the files of every class's name."""
    found = collections.defaultdict(list)
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(path)
    return found


def test_a_class_has_a_name_of_its_own():
    """One word, one thing; `Form` is what an operator's Triton kernels are compiled for."""
    bad = classes({"a.py": "class Plan: ...", "b.py": "def f():\n  class Plan: ..."})
    assert bad == {"Plan": ["a.py", "b.py"]}
    found = classes(
        {str(path): (ROOT / path).read_text() for path in tree_files() if path.parts[0] == PACKAGE}
    )
    named_alike = {name: files for name, files in found.items() if len(files) > 1}
    assert named_alike.keys() <= {"Form"}, f"one class's name is another's: {named_alike}"


TEXTS = ("Makefile", ".clang-format", "pyproject.toml", "mkdocs.yml", "requirements*.txt")


def too_long(texts: dict[str, str]) -> list[str]:
    """Returns "path:line" of the lines of more than 100 columns."""
    return [
        f"{path}:{number}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > 100
    ]


def test_lines_have_at_most_100_columns():
    """Of what neither ruff nor clang-format looks at."""
    assert too_long({"Makefile": f"{'x' * 100}\n{'y' * 101}"}) == ["Makefile:2"]
    files = [file for pattern in TEXTS for file in sorted(ROOT.glob(pattern))]
    assert len(files) > len(TEXTS)
    assert not too_long({file.name: file.read_text() for file in files})


def test_folders_of_csrc_carry_the_packages_words():
    strangers = {folder.name for folder in (ROOT / "csrc").iterdir() if folder.is_dir()} - FOLDERS
    assert not strangers, (
        f"a folder is an operator (or core), with one name in csrc/ and {PACKAGE}/: "
        f"{sorted(strangers)}"
    )


def test_no_module_of_recipes_bears_a_recipes_name():
    """`uk.recipes.sam` is what is called: an import of a module of that name would put the
    module there.
    """
    modules = {path.stem for path in (ROOT / PACKAGE / "recipes").glob("*.py")}
    named = re.findall(
        r"^from \S+ import \w+ as (\w+)$",
        (ROOT / PACKAGE / "recipes/__init__.py").read_text(),
        re.MULTILINE,
    )
    assert len(named) > 20 and not modules & set(named)


def test_no_built_binary_is_in_git():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    built = [
        name
        for name in tracked
        if re.search(r"\.(so|o|a|pyd|dll|dylib|whl|pyc|cubin|fatbin)$", name)
    ]
    assert not built, f"built binaries do not belong in git: {built}"


def test_make_uses_no_name_ahead_of_its_definition():
    """Such a name is empty: a target that was to be phony is taken to be up to date."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    run = subprocess.run(
        ["make", "--warn-undefined-variables", "-n", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # what the caller may give
    assert set(re.findall(r"undefined variable '(\w+)'", run.stderr)) <= {"ARGS"}
