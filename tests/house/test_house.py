"""The house: who may import whom, how full a folder may be, and what an import of the package itself costs."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deltaformer_jax

ROOT = Path(__file__).parents[2]

# From the ground up. Names on one floor do not import each other; a package stands for all in it but what has a floor
# of its own. docs/architecture.md says what each is for.
FLOORS = [
    ["deltaformer_jax.host"],
    ["deltaformer_jax.compiled"],
    ["deltaformer_jax.processes"],
    ["pallas_kernels"],
    ["deltaformer_jax.ops.common"],
    ["deltaformer_jax.ops.cache"],
    ["deltaformer_jax.ops.position_bias"],
    [f"deltaformer_jax.ops.{op}" for op in ("softmax", "deltaformer", "gated", "shift_mix")],
    ["deltaformer_jax.ops.generalized"],
    ["deltaformer_jax.ops"],
    ["deltaformer_jax.config"],
    ["deltaformer_jax.sharding"],
    ["deltaformer_jax.layers"],
    ["deltaformer_jax.layers.mixers"],
    ["deltaformer_jax.model"],
    ["deltaformer_jax.model_parts"],
    ["deltaformer_jax.tasks"],
    ["deltaformer_jax.data"],
    ["deltaformer_jax.decoding"],
    ["deltaformer_jax.interop"],
    ["deltaformer_jax.training"],
    ["deltaformer_jax.surgery"],
    ["deltaformer_jax.evaluate.corpus", "deltaformer_jax.evaluate.by_position"],
    ["deltaformer_jax.plot"],
    ["deltaformer_jax.extension"],
    ["deltaformer_jax.reproduce"],
    ["deltaformer_jax.help_config"],
    [
        f"deltaformer_jax.{program}"
        for program in ("train", "sample", "evaluate", "convert", "compile", "prune", "edit", "inspect", "drift")
    ],
    ["deltaformer_jax.extend"],
]
FLOOR_OF = {name: (height, name) for height, floor in enumerate(FLOORS) for name in floor}
# Beside the one order: in pallas_kernels the accelerators do not know each other, nor DeltaFormer's kernels the gated
# ops', and none of them knows deltaformer_jax.
APART = [
    ("pallas_kernels.triton", "pallas_kernels.tpu"),
    ("pallas_kernels.triton.delta", "pallas_kernels.triton.gated"),
    ("pallas_kernels.tpu.delta", "pallas_kernels.tpu.gated"),
    ("pallas_kernels", "deltaformer_jax"),
]
APART += [(another, one) for one, another in APART[:3]]


def modules():
    """Module -> (path, its tree)."""
    found = {}
    for package in ("deltaformer_jax", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = (path, ast.parse(path.read_text(encoding="utf-8")))
    return found


MODULES = modules()


def imports(name):
    """The modules of ours that a module imports, at its top or inside a function."""
    for node in ast.walk(MODULES[name][1]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES or node.module in MODULES:
                    yield whole if whole in MODULES else node.module


def floor_of(name):
    if name == "deltaformer_jax":  # its face gathers names of all floors but the programs'
        return FLOOR_OF["deltaformer_jax.training"]
    while name not in FLOOR_OF:
        name = name.rpartition(".")[0]
        assert name, "every module stands on a floor"
    return FLOOR_OF[name]


INSIDE = [name for name in MODULES if name != "deltaformer_jax"]  # which is the face, and imports nothing by itself


def test_imports_point_down():
    upward = []
    for name in INSIDE:
        height, own = floor_of(name)
        for other in imports(name):
            if (name, other) == ("deltaformer_jax.config.files", "deltaformer_jax"):
                continue  # asks where the package lies
            if other.startswith(f"{name}."):
                continue  # a package gathers what is in it
            below, theirs = floor_of(other)
            if below > height or (below == height and theirs != own):
                upward.append(f"{name} imports {other}")
            if any(name.startswith(one) and other.startswith(another) for one, another in APART):
                upward.append(f"{name} imports {other}")
    assert not upward, upward


def test_no_module_imports_itself_through_others():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in imports(name):
            # A package's own modules may be what it gathers; they are imported before it is.
            if other != name and not f"{name}.".startswith(f"{other}."):
                visit(other)
        path.pop()
        done.add(name)

    for name in INSIDE:
        visit(name)


def test_no_folder_is_full():
    folders = {path.parent for path in ROOT.rglob("*.py") if ".venv" not in path.parts and "build" not in path.parts}
    full = {folder: count for folder in folders if (count := len(list(folder.glob("*.py")))) > 14}
    assert not full, full


def test_no_file_holds_two_ideas():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, (path, _) in MODULES.items()}
    assert max(lengths.values()) <= 450, {name: length for name, length in lengths.items() if length > 450}


def test_prose_keeps_to_the_lines_length():
    pages = [*ROOT.glob("*.md"), *ROOT.rglob("docs/**/*.md"), *ROOT.glob("pallas_kernels/*.md")]
    long = [
        f"{page.name}:{number}"
        for page in pages
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120 and not line.startswith("|")  # a row of a table is one line
    ]
    assert len(pages) > 6 and not long, long


def test_the_extra_is_what_the_tests_compile_with():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    assert set(project["project"]["optional-dependencies"]["triton"]) < set(project["dependency-groups"]["kernels"])


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_package_is_imported_without_jax():
    run("import sys, deltaformer_jax; assert not {'jax', 'flax', 'numpy'} & set(sys.modules), sys.modules.keys()")


PROGRAMS = ("train", "sample", "evaluate", "plot", "data.prepare", "reproduce", "extend", "drift")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_given_without_jax(program):
    """Under a second of processor time, most of which Python itself takes."""
    heavy = {"jax", "flax", "orbax", "matplotlib", "rich", *([] if program == "data.prepare" else ["numpy"])}
    run(
        "import runpy, sys, contextlib\n"
        "sys.argv = ['program', '--help']\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    runpy.run_module('deltaformer_jax.{program}', run_name='__main__')\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )


@pytest.mark.parametrize("program", ["train", "prune"])
def test_a_program_of_the_package_may_be_run_as_a_file(program):
    """Its folder is then first on Python's path. A name that Python has too must give way, as inspect does."""
    folder = Path(deltaformer_jax.__file__).parent
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names & sys.stdlib_module_names == {"inspect"}
    done = subprocess.run([sys.executable, folder / f"{program}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--workdir" in done.stdout, done.stderr
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import inspect; print(inspect.signature(inspect.isclass))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "(object)\n"


def test_what_is_exported():
    for name in deltaformer_jax.__all__:
        assert getattr(deltaformer_jax, name).__name__ == name
        assert name in dir(deltaformer_jax)
    with pytest.raises(AttributeError, match="no attribute 'delta_attentoin'"):
        _ = deltaformer_jax.delta_attentoin
    tree = ast.parse(Path(deltaformer_jax.__file__).read_text(encoding="utf-8"))
    for_checkers = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert set(for_checkers) - {"annotations", "TYPE_CHECKING", "Any"} == set(deltaformer_jax.__all__)
