"""The two packages are translations of each other, and imports flow one way."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import minillm_core
import minillm_jax
import minillm_torch
from parity_tests.conftest import ROOT

PACKAGES = [
    path for name in ("core", "jax", "torch", "cli") for path in (ROOT / f"minillm_{name}").rglob("__init__.py")
]


def test_imports_flow_one_way() -> None:
    """The contracts in pyproject.toml: the order of the packages, no framework in core, no train step in decoding."""
    done = subprocess.run(["lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_public_names_of_core() -> None:
    """The face has exactly what the API reference lists of core, and imports each name only when it is used."""
    names = {*minillm_core.__all__} - {"__version__"}
    assert names == minillm_core._MODULES.keys()
    listed = re.findall(r"^::: (minillm_core\.\S+)\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert {name for _, name in listed} - {"BaseGenerator"} == names  # shown for the two classes `Generator`
    for module, name in listed:
        assert getattr(importlib.import_module(module), name) is not None
    assert all(getattr(minillm_core, name) is not None for name in names)
    code = "import sys, minillm_core; assert not [m for m in sys.modules if m.startswith('minillm_core.')], sys.modules"
    subprocess.run([sys.executable, "-c", code.replace("minillm_core.'", "minillm_core.t'")], check=True)


def test_libraries_do_not_mention_scripts() -> None:
    """Only the command line knows how it was started, so only it tells the user what to type."""
    for package in ("minillm_core", "minillm_jax", "minillm_torch"):
        for path in (ROOT / package).rglob("*.py"):
            assert "python scripts/" not in path.read_text(), path


def signature_of(function: ast.FunctionDef) -> list[str]:
    """One line per argument (how it is passed, its name, type and default), then the type of the result."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    kinds = [
        ("positional", positional, [*defaults, *given.defaults]),
        ("keyword", given.kwonlyargs, given.kw_defaults),
        ("rest", [a for a in (given.vararg, given.kwarg) if a], [None, None]),
    ]
    lines = []
    for kind, arguments, values in kinds:
        for argument, value in zip(arguments, values, strict=kind != "rest"):
            if argument.arg not in ONE_SIDED_ARGUMENTS:
                default = f" = {ast.unparse(value)}" if value else ""
                lines.append(f"{kind} {argument.arg}: {type_of(argument.annotation)}{default}")
    return [*lines, f"-> {type_of(function.returns)}"]


def type_of(annotation: ast.expr | None) -> str:
    """An annotation, with the same name for the arrays and for the dtypes of both frameworks."""
    text = ast.unparse(annotation) if annotation else "none given"
    return re.sub(
        r"\b(jnp\.dtype|DTypeLike|torch\.dtype)\b", "dtype", re.sub(r"\b(jax\.Array|Tensor)\b", "array", text)
    )


def public_names(path: Path) -> dict[str, list[str]]:
    """Public functions and classes of a file with their public methods, and the signature of each."""
    names = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        members = [node]
        if isinstance(node, ast.ClassDef):
            if node.name.startswith("_"):
                continue
            names[node.name] = []
            members = [(node, member) for member in node.body if isinstance(member, ast.FunctionDef)]
        for member in members:
            owner, function = member if isinstance(member, tuple) else (None, member)
            if isinstance(function, ast.FunctionDef) and (
                not function.name.startswith("_") or function.name in ("__init__", "__call__")
            ):
                names[f"{owner.name}.{function.name}" if owner else function.name] = signature_of(function)
    return names


# What only one framework needs, with the reason.
ONE_SIDED = {
    # XLA's precision is an argument, torch's a setting; XLA compiles away a cast to the same dtype
    "precision.py": {"precision_of", "cast"},
    # JAX has a default device, takes numpy arrays and returns numbers that are read when asked for
    "device.py": {"default_device", "to_device", "to_host", "compiler_options", "use_deterministic_algorithms"}
    | {"deterministic_kernels", "without_scatter"}  # XLA's own deterministic scatter is broken
    | {"target_device", "compiling_for"}  # JAX also compiles for a device that is not there
    | {"compiled"},  # JAX always compiles
    # the jitted functions before they are compiled, for minillm_jax/compiled
    "train.py": {"jit_train_step"},
    "generate.py": {"jit_prefill", "jit_prefill_logits", "jit_decode", "new_state"}
    | {"untied_structure", "with_head", "for_one_row"}  # XLA does not choose the layout of arguments
    | {"to_numpy"},  # numpy reads jax arrays
    "sampling.py": {"Options", "Options.of", "Options.static", "apply_options"},  # torch has `if`, JAX `lax.cond`
    "layers.py": {"weight_gradient"}  # on a CPU, its fastest order depends on the shapes
    | {"silu"}  # XLA rounds a row in the same way at every place of a batch
    | {"rows_of"},  # torch's deterministic index_add works
    "kv_cache.py": {"writable"},  # torch writes in place
    "weights.py": {"model_structure", "merge_model", "split_model"}  # torch modules hold their own structure
    | {"stack_layers", "unstack_layers"},  # `train.scan_layers` shortens JAX's compilation
}
ONE_SIDED_ARGUMENTS = {"device", "compile"}  # JAX has a default device, and always compiles
ONE_SIDED_ARGUMENTS |= {"scan_layers"}  # shortens JAX's compilation
SIGNATURES_DIFFER = {
    "make_optimizer",  # torch.optim holds parameters and gradients itself
    "apply_update",
    "start_writing",  # Orbax takes jax arrays
}


def test_same_files_and_public_names() -> None:
    """And the same arguments in the same order, with the same types and defaults."""
    ours = {path.name for path in (ROOT / "minillm_jax").glob("*.py")}
    theirs = {path.name for path in (ROOT / "minillm_torch").glob("*.py")}
    assert ours == theirs
    assert minillm_jax.__all__ == minillm_torch.__all__
    compared = 0
    for name in sorted(ours):
        jax_names = public_names(ROOT / "minillm_jax" / name)
        torch_names = public_names(ROOT / "minillm_torch" / name)
        jax_names = {name.replace(".__call__", ".forward"): signature for name, signature in jax_names.items()}
        assert set(jax_names) ^ set(torch_names) == ONE_SIDED.get(name, set()), name
        for function in (set(jax_names) & set(torch_names)) - SIGNATURES_DIFFER:
            assert jax_names[function] == torch_names[function], f"{name}: {function}"
            compared += sum(" = " in line for line in jax_names[function])
    assert compared, "no default was compared"


@pytest.mark.parametrize("difference", ["c: int = 2", "c: float = 1", "c: int", "*, c: int = 1", "d: int = 1"])
def test_signatures_that_differ(difference: str) -> None:
    """A different default, type, kind or name of an argument is seen."""
    signatures = []
    for line in ("c: int = 1", difference, "c: int = 1, device: str = 'cpu'"):
        (function,) = ast.parse(f"def f(a: Tensor, {line}) -> int: ...").body
        assert isinstance(function, ast.FunctionDef)
        signatures.append(signature_of(function))
    assert signatures[0] != signatures[1]
    assert signatures[0] == signatures[2]


SHARED_CODE = {"write_payload", "read_payload", "open_weights", "_open_group"}


def test_checkpoint_code_is_the_same() -> None:
    """Where the two packages have the same code, over their own payload.py, it stays the same."""
    ours, theirs = (
        {
            node.name: ast.dump(node)
            for node in ast.parse((ROOT / package / "checkpoint.py").read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name in SHARED_CODE
        }
        for package in ("minillm_jax", "minillm_torch")
    )
    assert ours.keys() == SHARED_CODE
    assert ours == theirs


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("minillm_core", {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers", "scripts"}),
        ("minillm_jax", {"torch", "transformers", "scripts"}),
        ("minillm_torch", {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "scripts"}),
    ],
)
def test_what_importing_a_package_loads(package: str, forbidden: set[str]) -> None:
    """Every module of it, in a process of its own."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / package).rglob("*.py"))
    ]
    code = f"import importlib, sys; [importlib.import_module(m.removesuffix('.__init__')) for m in {modules}]; "
    code += f"print(*({forbidden} & sys.modules.keys()))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split() == []


def test_jax_alone_does_not_need_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = " ".join(project["dependencies"])
    assert "torch" not in required
    assert "transformers" not in required
    assert "jax>=0.10,!=0.10.2" in required


@pytest.mark.parametrize(
    "folder", ["configs", "scripts", "parity_tests", *sorted(str(path.parent.relative_to(ROOT)) for path in PACKAGES)]
)
def test_every_folder_has_a_readme(folder: str) -> None:
    """At most 20 lines, with links and files that exist; a room of core names all its files."""
    path = ROOT / folder / "README.md"
    text = path.read_text()
    assert len(text.splitlines()) <= 20
    assert "docs/" in text
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (path.parent / target).exists(), target
    named = set(re.findall(r"`([\w/.]+\.(?:py|yaml))`", text))
    for name in named:
        assert (path.parent / name).is_file() or (ROOT / name).is_file(), name
    if folder.startswith("minillm_core/"):
        assert {file.name for file in path.parent.glob("*.py")} - {"__init__.py"} <= named
