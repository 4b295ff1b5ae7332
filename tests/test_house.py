"""The import rules: which room may know which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "mmdit",
    "baselines",
    "flow",
    "data",
    "metrics",
    "engine",
    "storage",
    "pipeline",
    "training",
    "studies",
    "tokens",
    "web",
)
VERBS = ("train", "sample", "evaluate", "encode", "compare", "app")
OURS = (*ROOMS, *VERBS, "cli")
MAY_IMPORT = {
    "mmdit": {"mmdit", "storage"},
    "baselines": {"baselines", "mmdit", "storage"},  # for the record of conditions, which is the network's contract
    "flow": {"flow"},
    "data": {"data", "storage"},
    "tokens": {"tokens", "mmdit", "flow", "data", "storage"},
    "metrics": {"metrics", "flow", "storage"},
    "engine": {"engine", "storage"},
    "storage": {"storage"},
    "pipeline": {"pipeline", "mmdit", "baselines", "tokens", "flow", "data", "storage", "cli"},
    "training": {
        "training",
        "engine",
        "pipeline",
        "metrics",
        "mmdit",
        "baselines",
        "tokens",
        "flow",
        "data",
        "storage",
        "cli",
    },
    "studies": set(OURS) - set(VERBS) - {"web"},
    "web": {"web", "pipeline", "metrics", "mmdit", "flow", "data", "storage", "cli"},
    "cli": set(),
} | {verb: set(OURS) - set(VERBS) - {"studies", "web"} for verb in VERBS}
for verb in ("compare", "evaluate"):
    MAY_IMPORT[verb] |= {"studies"}
MAY_IMPORT["app"] |= {"web"}


def imported(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files() -> list[tuple[str, Path]]:
    """(room, file) of everything that rules apply to."""
    inside = [(room, file) for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    return inside + [(name, ROOT / f"{name}.py") for name in OURS if name not in ROOMS]


@pytest.mark.parametrize(
    ("room", "file"), files(), ids=lambda x: str(x.relative_to(ROOT)) if isinstance(x, Path) else x
)
def test_rooms_know_only_what_they_may(room: str, file: Path) -> None:
    tops = {name.partition(".")[0] for name in imported(file)}
    shared = {"cli"} if file.name == "__main__.py" else set()  # a room's own command line
    assert tops & set(OURS) <= MAY_IMPORT[room] | shared
    if room == "flow":
        third_party = {name for name in tops if (ROOT / name).exists() is False} - {"torch"}
        assert third_party <= {
            "abc",
            "collections",
            "functools",
            "inspect",
            "itertools",
            "math",
            "typing",
            "dataclasses",
        }
    if room not in ("data", "pipeline"):
        allowed = {
            "baselines/unet.py": {"diffusers"},
            "baselines/classifier.py": {"diffusers"},
            "training/autoencoder.py": {"diffusers"},
            "metrics/features.py": {"transformers"},
            "tokens/dalle.py": {"transformers"},
        }  # opponents, CLIP
        found = tops & {"transformers", "diffusers", "tokenizers"}
        assert found <= allowed.get(str(file.relative_to(ROOT)), set())
    if "gradio" in tops:
        assert room in ("web", "app")
    if "lightning" in tops:
        assert room in ("train", "training", "engine") or file == ROOT / "data/module.py"


def test_no_circles() -> None:
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): imported(file) for _, file in files()}
    edges = {name: {other for other in modules if other != name and other in used} for name, used in modules.items()}
    while edges:
        leaves = {name for name, used in edges.items() if not used & edges.keys()}
        assert leaves, f"these import each other in a circle: {sorted(edges)}"
        edges = {name: used for name, used in edges.items() if name not in leaves}


def test_every_room_is_here() -> None:
    assert {file.parent.name for file in ROOT.glob("*/__init__.py")} == set(ROOMS)
    assert {file.stem for file in ROOT.glob("*.py")} == set(OURS) - set(ROOMS)
