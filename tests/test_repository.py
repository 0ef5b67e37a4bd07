"""Guard rails of the repository's shape: what review would otherwise have to remember."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import lvrpo
from lvrpo import info
from lvrpo.backends import library

ROOT = Path(__file__).parents[1]

#: One op is one stem; every layer has a file for it.
LAYERS = (
    "lvrpo/ops/{}.py",
    "lvrpo/reference/{}.py",
    "csrc/cpu/{}.cpp",
    "kernels/{}.py",
    "tests/ops/test_{}.py",
    "tests/mutants/{}.py",
    "docs/ops/{}.md",
    "benchmarks/bench_{}.py",
)
#: Ops that run the kernels of others and have none of their own, so that a backend or a loss that
#: is added there is theirs at once. What they add, GEMMs in chunks, is torch's on every device.
COMPOSED = set(library.COMPOSITES)
KERNEL_LAYERS = {"csrc/cpu/{}.cpp", "kernels/{}.py"}
#: Among them those with a Triton kernel, which runs the device functions of the others on one row.
FUSED = {"logits_grpo_loss"}
#: Lines of a function's body, without signature and docstring, that a reader can hold. An exception
#: is granted here, with the reason it deserves. A file is one idea, however long: what holds files
#: together is `MAY_IMPORT`.
FUNCTION_LINES = 80
ONE_FORMULA = (
    "a reference reads from top to bottom like its formula; parts would need names of their own"
)
EXCEPTIONS: dict[str, tuple[int, str]] = {
    "kernels/grpo_loss.py:_terms_kernel": (110, "what an if leaves out is out of the kernel"),
    "kernels/logits_grpo_loss.py:_row_loss_kernel": (85, "a row stays in its program's registers"),
    "lvrpo/reference/flow_policy_loss.py:flow_policy_loss": (95, ONE_FORMULA),
    "lvrpo/reference/normalize_advantages.py:normalize_advantages": (95, ONE_FORMULA),
}
#: Modules that users run or import themselves, and nothing inside lvrpo needs to.
DOORS = {"lvrpo", "lvrpo.__main__", "lvrpo.info", "lvrpo.real.__main__", "lvrpo.testing"}
ENVIRONMENT_VARIABLES = {"LVRPO_BACKEND", "LVRPO_BUILD", "LVRPO_CHECK"}
ENVIRONMENT_VARIABLES |= {"TRITON_INTERPRET"}  # Triton's own
#: Read by setup.py, defined by others.
TOOLCHAIN_VARIABLES = {"CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"}


def tracked() -> list[Path]:
    """Files of the repository, new ones included and ignored ones not."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout", allow_module_level=True)
    paths = [ROOT / line for line in listed.splitlines()]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


FILES = tracked()
PYTHON = [path for path in FILES if path.suffix == ".py"]
PACKAGE = [path for path in PYTHON if path.is_relative_to(ROOT / "lvrpo")]
SOURCES = [p for p in FILES if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
HERE = Path(__file__)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def where(pattern: str, paths: list[Path]) -> list[str]:
    """`file:line: text` of every match outside this file."""
    return [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in paths
        if path != HERE
        for number, line in enumerate(lines_of(path), 1)
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_op_is_a_whole_slice(layer):
    excused = COMPOSED if layer in KERNEL_LAYERS else set()
    ops = [op for op in info.op_names() if op not in excused]
    missing = [op for op in ops if not (ROOT / layer.format(op)).exists()]
    assert not missing, f"no {layer} for these ops"


def test_a_composed_op_has_no_kernels_of_its_own():
    assert set(info.op_names()) >= COMPOSED
    fused = {ROOT / f"kernels/{op}.py" for op in FUSED}
    own = {ROOT / layer.format(op) for layer in KERNEL_LAYERS for op in COMPOSED}
    assert {path for path in own if path.exists()} == fused


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_has_a_file_without_an_op(layer):
    folder, pattern = (ROOT / layer).parent, Path(layer).name
    prefix, suffix = pattern.split("{}")
    files = folder.glob(pattern.replace("{}", "*"))
    stems = {path.name.removeprefix(prefix).removesuffix(suffix) for path in files}
    strangers = {stem for stem in stems if not stem.startswith("_")} - set(info.op_names())
    if layer.startswith("tests/ops"):  # test_<op>_<part>.py, where one file would be too long
        strangers = {
            s for s in strangers if not s.startswith(tuple(f"{op}_" for op in info.op_names()))
        }
    if layer.startswith("benchmarks"):
        strangers -= {"dispatch", "loss_head", "train_step", "update"}  # several ops, a step
    assert not strangers


def test_the_public_names_are_listed_once():
    door = ast.parse((ROOT / "lvrpo/__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in door.body if isinstance(node, ast.ImportFrom)]
    assert lvrpo.__all__ == sorted({alias.name for node in imports for alias in node.names})
    assert set(info.op_names()) <= set(lvrpo.__all__)


def test_functions_are_short():
    long = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{name_of(path)}:{node.name}"
                body = node.body[bool(ast.get_docstring(node)) :] or node.body
                lines = node.end_lineno - body[0].lineno + 1
                if lines > EXCEPTIONS.get(name, (FUNCTION_LINES, ""))[0]:
                    long.append(f"{name}: {lines} lines, budget {FUNCTION_LINES}")
    assert not long, "\n".join(long)


def test_every_exception_is_needed_and_has_a_reason():
    for name, (_, reason) in EXCEPTIONS.items():
        assert len(reason) > 20, name
        assert (ROOT / name.split(":")[0]).exists(), name


def imports_of(path: Path) -> set[str]:
    """Names of modules that a file may import: for `from a import b` both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


#: Who may know whom: a room, that is `lvrpo.<room>`, and the rooms whose modules it may import,
#: anywhere in a file. A room that is not here imports nothing of lvrpo but itself.
MAY_IMPORT = {
    "dtypes": "kept",
    "token_layout": "checks",
    "groups": "checks kept",
    "token_selection": "dtypes token_layout",
    "reference": "params masks dtypes token_selection",
    "masks": "params checks",
    "kernels": "params masks",
    "backends": "params masks kernels checks dtypes testing token_layout kept",
    "ops": "params masks reference backends checks dtypes token_layout token_selection groups kept",
    "sampler_correction": "params checks dtypes token_layout token_selection _sampler_inputs",
    "_sampler_inputs": "params checks dtypes token_layout",
    "covariance": "params dtypes token_layout _sampler_inputs",
    "token_advantages": "params checks dtypes token_layout groups _sampler_inputs",
    "distributed": "ops params reference backends checks dtypes token_layout groups "
    "sampler_correction",
    "info": "lvrpo ops backends",
    "data": "info random",
    "rewards": "info data",
    "digits": "info data random rewards",
    "real": "rewards",
    "models": "info data random ops params masks dtypes integrations",
    "trainer": "info data random rewards models ops params sampler_correction intervals "
    "distributed",
    "runs": "info lvrpo data random rewards models ops params backends trainer intervals digits "
    "planning",
    "report": "info data intervals runs trainer",
    "planning": "masks models ops",
    "studies": "info data random rewards trainer runs report intervals",
    "integrations": "info lvrpo covariance masks ops params checks token_layout token_advantages",
    "cli": "info lvrpo planning runs report studies trainer",
    "__main__": "info cli",
    "lvrpo": "covariance params masks ops sampler_correction token_advantages",
}
#: The model families and the embedded demo: parts that one module puts together, and that nothing
#: else knows.
PARTS = (
    *("lvrpo.digits", "lvrpo.models.unified", "lvrpo.models.bagel"),
    "lvrpo.models.huggingface",
)
KNOW_PARTS = (
    *("lvrpo.runs.setup", "lvrpo.runs.unified_family", "lvrpo.runs.huggingface_family"),
    "lvrpo.runs.bagel_family",
    *PARTS,
)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "lvrpo"


def import_graph() -> dict[str, set[str]]:
    """Modules of the package and those of it that they import, anywhere and for whatever."""
    modules = {module_of(path) for path in PACKAGE}
    modules |= {f"lvrpo.kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")}
    paths = [*PACKAGE, *(path for path in PYTHON if path.parent == ROOT / "kernels")]
    graph = {}
    for path in paths:
        in_kernels = path.parent == ROOT / "kernels"
        module = f"lvrpo.kernels.{path.stem}" if in_kernels else module_of(path)
        names = {name for name in imports_of(path) if name in modules}
        # `from package import module` is of the module, not of the package's face.
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in names:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                if full <= modules:
                    names.discard(node.module)
        graph[module] = names - {module}
    return graph


GRAPH = import_graph()
ARROWS = [(user, used) for user, names in sorted(GRAPH.items()) for used in sorted(names)]


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_rooms_know_only_what_is_below_them():
    assert {room for _, rooms in MAY_IMPORT.items() for room in rooms.split()} <= set(
        map(room_of, GRAPH)
    )
    wrong = [
        f"{user} imports {used}"
        for user, used in ARROWS
        if room_of(used) not in {room_of(user), *MAY_IMPORT.get(room_of(user), "").split()}
    ]
    assert not wrong, "\n".join(wrong)


def test_one_module_knows_the_parts():
    wrong = [
        f"{user} imports {used}"
        for user, used in ARROWS
        if is_within(used, PARTS) and not is_within(user, KNOW_PARTS)
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_private_stays_in_its_package():
    wrong = []
    for user, used in ARROWS:
        package, _, name = used.rpartition(".")
        if re.match(r"_[a-z]", name) and not is_within(user, (package,)):
            wrong.append(f"{user} imports {used}")
    assert not wrong, "\n".join(wrong)


def test_no_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_every_module_is_used():
    users = [path for path in PYTHON if not path.is_relative_to(ROOT / "tests")]
    imported: dict[Path, set[str]] = {path: imports_of(path) for path in users}
    unused = []
    for path in PACKAGE:
        module = module_of(path)
        others = set().union(*(names for user, names in imported.items() if user != path))
        packages_only = path.name == "__init__.py" or module.startswith("lvrpo.integrations.")
        if module not in others | DOORS and not packages_only:
            unused.append(module)
    assert not unused, "nothing but tests imports these modules"


def test_environment_variables_are_on_the_register():
    pattern = r"""(?:environ(?:\.\w+)?|getenv)\s*[\[(]\s*["'](\w+)["']"""
    for path in [*PACKAGE, ROOT / "setup.py", *(p for p in SOURCES if "csrc" in p.parts)]:
        allowed = ENVIRONMENT_VARIABLES | (
            TOOLCHAIN_VARIABLES if path.name == "setup.py" else set()
        )
        found = set(re.findall(pattern, path.read_text(encoding="utf-8")))
        assert found <= allowed, f"{name_of(path)} reads {found - allowed}"


def test_tolerances_are_in_one_place():
    found = where(r"\b(atol|rtol)\s*=", PYTHON)
    assert [line for line in found if not line.startswith("lvrpo/testing.py")] == []


def test_notes_to_oneself_have_a_link():
    found = where(r"\b(TODO|FIXME|XXX|HACK)\b", SOURCES)
    assert [line for line in found if "http" not in line] == []


def test_kernels_are_packaged_by_a_link():
    assert (ROOT / "lvrpo/kernels").readlink() == Path("../kernels")
    # With an __init__.py it would shadow the package `kernels` of others; see test_import.py.
    assert not (ROOT / "kernels/__init__.py").exists()


def test_no_path_of_somebodys_machine():
    text = [p for p in FILES if p.suffix in (".py", ".md", ".toml", ".h", ".cpp", ".txt", "")]
    assert where(r"(?<![\w.])/(root|home|Users|work|tmp)/\w", text) == []


def test_version_is_the_same_everywhere():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{lvrpo.__version__}"\n' in pyproject
    assert f"\n## {lvrpo.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_direct_dependency_is_pinned():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = {line.split("==")[0] for line in lines_of(ROOT / "constraints.txt") if "==" in line}
    groups = re.findall(r"^(?:dependencies|train|report|dev) = \[(.*?)\]$", pyproject, re.M | re.S)
    wanted = {name.lower() for g in groups for name in re.findall(r'"([A-Za-z0-9_-]+)', g)}
    assert len(groups) == 4
    assert wanted <= pinned


def documented(docstring: str, section: str) -> list[str]:
    """Names that a Google docstring lists under `section`, in order."""
    match = re.search(rf"^{section}:\n((?:[ ]+.*\n?|\n)+)", inspect.cleandoc(docstring), re.M)
    if match is None:
        return []
    entries = re.findall(r"^ {4}(\*{0,2}\w+(?:, \w+)*):", match[1], re.M)
    return [name.lstrip("*") for entry in entries for name in entry.split(", ")]


def public_objects() -> list[tuple[str, object]]:
    found = []
    for path in PACKAGE:
        try:
            module = importlib.import_module(module_of(path))
        except ModuleNotFoundError:
            if room_of(module_of(path)) != "integrations":
                raise
            continue  # of a package that is not there
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", None) != module.__name__ or name.startswith("_"):
                continue
            if inspect.isclass(thing):
                found.append((f"{module.__name__}.{name}", thing))
                methods = inspect.getmembers(thing, callable)
                found += [
                    (f"{module.__name__}.{name}.{method_name}", method)
                    for method_name, method in methods
                    if method_name in vars(thing) and not method_name.startswith("_")
                ]
            elif inspect.isfunction(thing):
                found.append((f"{module.__name__}.{name}", thing))
    return found


def test_docstrings_name_what_is_there():
    wrong = []
    for name, thing in public_objects():
        docstring = vars(thing).get("__doc__") or getattr(thing, "__doc__", None) or ""
        if inspect.isclass(thing):
            listed = set(documented(docstring, "Attributes"))
            if dataclasses.is_dataclass(thing):
                actual = {field.name for field in dataclasses.fields(thing)}
                actual |= {key for key, value in vars(thing).items() if isinstance(value, property)}
            else:
                continue
            wrong += [f"{name}: {entry} is no field" for entry in sorted(listed - actual)]
            continue
        listed = documented(docstring, "Args")
        parameters = [p for p in inspect.signature(thing).parameters if p not in ("self", "cls")]
        if listed and listed != parameters:
            wrong.append(f"{name}: documents {listed}, takes {parameters}")
    assert not wrong, "\n".join(wrong)


def test_every_config_field_is_read():
    config = pytest.importorskip("lvrpo.trainer.config", reason="the trainer's extra is missing")
    reading = "\n".join(
        path.read_text(encoding="utf-8") for path in PACKAGE if path.name != "config.py"
    )
    sections = [field.default_factory for field in dataclasses.fields(config.TrainConfig)]
    fields = [(s.__name__, f.name) for s in sections for f in dataclasses.fields(s)]
    prefixes = re.findall(r'getattr\(\w+, f"(\w+){', reading)  # getattr(section, f"lr_{kind}")
    unread = [
        f"{section}.{name}"
        for section, name in fields
        if not re.search(rf"""\.{name}\b|\["{name}"\]""", reading)
        and not name.startswith(tuple(prefixes))
    ]
    assert not unread
