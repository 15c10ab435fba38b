"""The architecture's rules, read from the source: who may import whom, and what no module may do.

Imports that only a type checker sees (`if TYPE_CHECKING:`) are no arrows, except between the packages: there, even a
type of the server's in the adapter package would turn an arrow around.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVER = ROOT / "server" / "loramux_server"
ADAPTERS = ROOT / "adapters" / "loramux_adapters"
LOADTESTS = ROOT / "loadtests"
MAX_LINES = 500
MAX_MODULES = 15  # of a folder: more are several rooms

TORCH_FREE = (
    "adapters/loramux_adapters/lora/slots.py",
    "adapters/loramux_adapters/lora/windows.py",
    "server/loramux_server/api",
    "server/loramux_server/config",
    "server/loramux_server/metrics",
    "server/loramux_server/engine/client.py",
    "server/loramux_server/engine/engine.py",
    "server/loramux_server/engine/scheduling",
)
DEVICE_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
BUILDER = SERVER / "engine" / "build.py"  # puts an engine together, for servers and local engines alike
PARTS = ("Engine", "EngineClient", "ModelRunner", "AdapterStore", "HostCache", "Metrics", "load_base_model")


def modules(*places: Path) -> list[Path]:
    """The source files in these folders or at these paths; a path that does not exist holds none."""
    found: list[Path] = []
    for place in places:
        found += sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.exists() else []
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_wiring(path: Path) -> bool:
    """True for the modules that may build objects, read the environment and print."""
    return (
        path.is_relative_to(SERVER / "cli")
        or path.parent == SERVER / "serving"
        or path == SERVER / "config" / "environment.py"
    )


def walk(tree: ast.AST, *, type_checking: bool) -> Iterator[ast.AST]:
    """Every node, without the bodies of `if TYPE_CHECKING:` unless they are asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not type_checking:
            for other in node.orelse:
                yield other
                yield from walk(other, type_checking=type_checking)
            continue
        yield node
        yield from walk(node, type_checking=type_checking)


def imports(path: Path, *, type_checking: bool = False) -> set[str]:
    """Full names of what a module imports, relative imports resolved, those inside functions included."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    package = package[1:] if package[0] in ("server", "adapters") else package
    names: set[str] = set()
    for node in walk(tree_of(path), type_checking=type_checking):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def offences(paths: list[Path], wrong: Callable[[str], bool], *, type_checking: bool = False) -> list[str]:
    """`file imports name` for every import that is wrong."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in sorted(imports(path, type_checking=type_checking))
        if wrong(name)
    ]


def within(*packages: str) -> Callable[[str], bool]:
    return lambda name: any(name == package or name.startswith(package + ".") for package in packages)


def test_the_sources_are_where_these_rules_look_for_them() -> None:
    assert SERVER / "engine" / "scheduling" / "sequence.py" in modules(SERVER)
    assert ADAPTERS / "errors.py" in modules(ADAPTERS)
    assert "torch" in imports(ADAPTERS / "base_info.py", type_checking=True)
    assert "torch" not in imports(ADAPTERS / "base_info.py")


def test_relative_imports_are_resolved() -> None:
    assert "loadtests.sweep" in imports(LOADTESTS / "__main__.py")


def test_the_adapter_package_knows_nothing_of_the_server() -> None:
    assert offences(modules(ADAPTERS), within("loramux_server"), type_checking=True) == []


def test_load_tests_import_nothing_of_ours() -> None:
    assert offences(modules(LOADTESTS), within("loramux_server", "loramux_adapters"), type_checking=True) == []


def test_policy_and_the_api_do_not_touch_the_device() -> None:
    assert offences(modules(*(ROOT / path for path in TORCH_FREE)), within(*DEVICE_LIBRARIES)) == []


def test_the_engine_gets_its_runner_passed_in() -> None:
    in_engine = (f"loramux_server.engine.{name}" for name in ("model_runner", "sampler", "step_questions"))
    device_side = within("loramux_server.kernels", *in_engine)
    policy = [SERVER / "engine" / f"{name}.py" for name in ("client", "engine")]

    assert offences(modules(*policy, SERVER / "engine" / "scheduling"), device_side) == []


def test_the_engine_knows_nothing_of_http() -> None:
    assert offences(modules(SERVER / "engine"), within("loramux_server.api", "fastapi", "starlette", "uvicorn")) == []


def test_the_api_reaches_the_engine_through_its_facade_alone() -> None:
    names = ("engine", "scheduling.scheduler", "scheduling.kv_blocks", "model_runner")
    inside = within(*(f"loramux_server.engine.{name}" for name in names))

    assert offences(modules(SERVER / "api"), inside) == []


def test_nothing_below_the_command_line_imports_it() -> None:
    below = [path for path in modules(SERVER, ADAPTERS) if not is_wiring(path) and path != SERVER / "__main__.py"]

    assert offences(below, within("loramux_server.cli", "loramux_server.serving")) == []
    assert offences(modules(SERVER / "serving"), within("loramux_server.cli")) == []


def module_name(path: Path) -> str:
    """The dotted name by which a source file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows(*, between_folders: bool) -> dict[str, set[str]]:
    """What each module, or each folder, imports of ours. `__init__` and `__main__` hold no code and are left out."""
    ours = {module_name(path): path for path in modules(SERVER, ADAPTERS)}
    found: dict[str, set[str]] = {}
    for name, path in ours.items():
        if path.stem in ("__init__", "__main__"):
            continue
        needed = {other for other in imports(path) if other in ours and ours[other].stem != "__init__"}
        if between_folders:
            name, needed = name.rpartition(".")[0], {other.rpartition(".")[0] for other in needed}
        found.setdefault(name, set()).update(needed - {name})
    return found


def cycles(arrows: dict[str, set[str]]) -> list[str]:
    """Names that need each other, found by taking away layer by layer those that need nothing that is left."""
    left = dict(arrows)
    while bottom := [name for name, needs in left.items() if not needs & left.keys()]:
        left = {name: needs for name, needs in left.items() if name not in bottom}
    return [f"{name} needs {sorted(needs & left.keys())}" for name, needs in left.items()]


@pytest.mark.parametrize("between_folders", [True, False], ids=["folders", "modules"])
def test_folders_and_modules_form_layers_without_cycles(between_folders: bool) -> None:
    found = arrows(between_folders=between_folders)

    assert len(found) > 20
    assert cycles(found) == []


def test_a_cycle_is_seen() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycles({"a": {"b"}, "b": {"a"}, "c": set()}) == ["a needs ['b']", "b needs ['a']"]


@pytest.mark.parametrize("place", [SERVER, ADAPTERS], ids=lambda place: place.name)
def test_a_folder_is_a_room_with_few_modules(place: Path) -> None:
    counts = Counter(path.parent for path in modules(place) if path.stem != "__init__")

    assert {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > MAX_MODULES} == {}


def shared_class_names(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Public class names that more than one of these modules define, with the modules."""
    found: dict[str, set[str]] = {}
    for path in paths:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, set()).add(str(path))
    return {name: sorted(places) for name, places in found.items() if len(places) > 1}


def test_a_class_name_means_one_class(tmp_path: Path) -> None:
    assert shared_class_names(modules(SERVER, ADAPTERS)) == {}

    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f"class Lease: ...\nclass _Own: ...\nclass Only{name}: ...\n")
    assert shared_class_names(modules(tmp_path)) == {"Lease": [str(tmp_path / "a.py"), str(tmp_path / "b.py")]}


def test_the_server_never_imports_peft_and_never_loads_a_pickle() -> None:
    served = [path for path in modules(SERVER, ADAPTERS) if "training" not in path.parts]

    assert offences(served, within("peft")) == []
    assert offences(modules(SERVER, ADAPTERS), within("pickle", "dill", "cloudpickle", "shelve", "marshal")) == []


def test_torch_load_is_called_nowhere() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules(SERVER, ADAPTERS)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.hub.load")
    ]

    assert calls == []


def test_parts_are_put_together_in_the_wiring_alone() -> None:
    built = [
        f"{path.relative_to(ROOT)}:{node.lineno} builds {node.func.id}"
        for path in modules(SERVER, ADAPTERS)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PARTS
        if not is_wiring(path) and path != BUILDER and "training" not in path.parts
    ]

    assert built == []


def test_the_environment_is_read_on_the_command_line_alone() -> None:
    read = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules(SERVER, ADAPTERS)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
        if not is_wiring(path)
    ]

    assert read == []


def test_nothing_prints_but_the_command_line() -> None:
    prints = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules(SERVER, ADAPTERS)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if not is_wiring(path)
    ]

    assert prints == []


def asks_for_a_kind_of_device(tree: ast.Module) -> list[int]:
    """Lines that use `torch.cuda` or `torch.device("cuda")`, or ask a tensor or a place what kind it is."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names_cuda = ast.unparse(node) in ("torch.cuda", "torch.backends.cuda", "torch.accelerator")
            asks = node.attr in ("is_cuda", "is_cpu") or ast.unparse(node).endswith((".device.type", "place.type"))
            if names_cuda or asks:
                lines.append(node.lineno)
        elif isinstance(node, ast.Compare):
            compared = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            if compared & {"cuda", "cpu"} and "type" in ast.unparse(node):
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.device", "torch.Tensor.cuda"):
            if any(isinstance(arg, ast.Constant) and str(arg.value).startswith("cuda") for arg in node.args):
                lines.append(node.lineno)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if any(name.startswith("torch.cuda") for name in names) or (names[0] == "torch" and "cuda" in names):
                lines.append(node.lineno)
    return lines


def test_what_differs_between_devices_is_asked_of_the_device_alone() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules(SERVER, ADAPTERS)
        for line in asks_for_a_kind_of_device(tree_of(path))
        if path.parent != ADAPTERS / "device"
    ]

    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.synchronize()",
        "from torch.cuda import Stream",
        "import torch.cuda.graphs",
        "from torch import cuda",
        "x = torch.device('cuda:1')",
        "if x.device.type == 'cpu': ...",
        "kind = x.device.type",
        "if x.is_cuda: ...",
        "if device.type == 'cuda': ...",
    ],
)
def test_a_question_for_the_kind_of_device_is_seen(line: str) -> None:
    assert asks_for_a_kind_of_device(ast.parse(line)) != []
    assert asks_for_a_kind_of_device(ast.parse("x = torch.zeros(1, device=device.place)")) == []


@pytest.mark.parametrize("place", [SERVER, ADAPTERS, LOADTESTS], ids=lambda place: place.name)
def test_no_file_is_longer_than_a_reader_can_hold(place: Path) -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in modules(place)}

    assert {name: length for name, length in lengths.items() if length >= MAX_LINES} == {}
