"""The arrows of the design: who may import whom. Sources are read with `ast`; nothing is imported."""

import ast
import pathlib
import sys
from typing import NamedTuple

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "marsjax"

# What a module or a package of marsjax may import of marsjax beside itself, and beside EVERYONE. Data flow from the top
# to the bottom, and a stage imports no other stage on that way: `pipeline` hands values from one to the next. A
# new arrow is a decision about the design, taken here. A name covers the modules in it.
EVERYONE = {"records", "files", "stein"}
ALLOWED: dict[str, set[str]] = {
    "records": set(),
    "files": set(),
    "stein": set(),
    "progress": set(),
    "allocator": set(),
    "processors": set(),
    "products": set(),
    "compilation": set(),
    "data": set(),
    "features": {"data.feature_files", "progress"},  # an array that was made elsewhere is an encoder too
    "hosts": set(),
    "training": {"hosts", "progress"},
    "alignment_losses": set(),
    "alignment": {"alignment_losses", "products", "training.optimizer", "training.sharding", "training.step"},
    "embeddings": {"alignment", "data.histories", "progress"},  # embeds with the encoder of the alignment
    "retrieval": set(),
    "augmentation": {"data.grades", "data.histories", "progress"},
    "ctr": {"processors", "products", "training.optimizer", "training.sharding", "training.step"},
    "evaluation": {"features.images"},  # pages show what encoders see
    # Answers requests with what trained the model: it comes after all of these.
    "serving": {
        "alignment", "augmentation.mars", "augmentation.posterior", "ctr", "data.content", "data.histories",
        "data.priors", "embeddings", "evaluation.page", "retrieval", "training",
    },
    "provenance": set(),
    "stages": {"hosts", "provenance"},
    "jobs": {"allocator", "processors", "progress"},
    "configuration": set(),
    "defaults": {"data.synthetic"},  # its arguments are configuration keys
    "study": set(),
    "sources": {"configuration", "data", "features.text"},
    "pipeline": {
        "alignment", "augmentation", "configuration", "ctr", "data", "embeddings", "evaluation", "features", "hosts",
        "progress", "retrieval", "sources", "stages", "training",
    },
    "cells": {"configuration", "data", "evaluation", "jobs", "pipeline", "provenance", "stages", "study"},
    "commands": {
        "alignment", "augmentation", "cells", "data", "embeddings", "evaluation", "features", "hosts", "jobs",
        "pipeline", "provenance", "retrieval", "serving", "sources", "stages", "study",
    },
    # And the commands, by importlib once the flags are read.
    "main": {"allocator", "compilation", "configuration", "defaults", "hosts", "progress"},
}  # fmt: skip

# Packages that only the files behind which they are hidden may import.
ONLY_IN = {
    "orbax": {"training/checkpoint.py"},
    "usearch": {"retrieval.py"},
    "grain": {"data/batches.py"},
    "ml_collections": {
        "main.py",
        "pipeline.py",
        "cells.py",
        "commands.py",
        "sources.py",
        "configuration.py",
        "defaults.py",
    },
}
CORE = {"jax", "flax", "optax", "numpy", "scipy", "rich", "absl", *ONLY_IN}
EXTRAS = {
    "PIL",
    "flatbuffers",
    "pyarrow",
    "huggingface_hub",
    "safetensors",
    "tensorboardX",
    "tokenizers",
    "torch",
    "transformers",
}  # may be missing, so imported inside the function that uses them
# Files that are made of one optional extra, so that they name its packages at their top; they themselves are imported
# inside the function that needs them, or by one another.
MADE_OF = {
    "serving/service.py": {"fastapi", "uvicorn", "starlette", "pydantic", "pydantic_core", "prometheus_client"},
    "serving/direct.py": {"starlette", "pydantic"},  # a layer in front of the service
    "serving/measures.py": {"prometheus_client"},
    "serving/redis_storage.py": {"redis"},
    "serving/ray_rebuild.py": {"ray"},
}


class Import(NamedTuple):
    """An imported module with its dots; `level` counts those of a relative import."""

    module: str
    line: int
    level: int
    in_function: bool


def imports(source: str) -> list[Import]:
    """Every import, wherever it stands. `from a.b import c` is a.b.c: c may be a module."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, 0, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{node.module}." if node.module else ""
            found.extend(Import(module + alias.name, node.lineno, node.level, in_function) for alias in node.names)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def refusals(name: str, source: str) -> list[str]:
    """What the file `name` (relative to marsjax/) imports and may not."""
    unit = name.split("/")[0].removesuffix(".py")
    refused = []
    for module, line, level, in_function in imports(source):
        top, _, inner = module.partition(".")
        if level:
            reason = "relative"
        elif top == "marsjax":
            targets = ALLOWED.get(unit, set()) | EVERYONE | {unit, "__version__"}
            reason = (
                "" if any(f"{inner}.".startswith(f"{target}.") for target in targets) else "not an arrow of ALLOWED"
            )
            made = any(f"{inner}.".startswith(file.removesuffix(".py").replace("/", ".") + ".") for file in MADE_OF)
            if made and not in_function and name not in MADE_OF:
                reason = "made of an optional extra, outside a function"
        elif top in MADE_OF.get(name, ()):
            reason = ""
        elif top in EXTRAS:
            reason = "" if in_function else "an optional package outside a function"
        elif name not in ONLY_IN.get(top, {name}):
            reason = f"only in {', '.join(sorted(ONLY_IN[top]))}"
        else:
            reason = "" if top in CORE | sys.stdlib_module_names else "neither in the core nor an optional package"
        if reason:
            refused.append(f"marsjax/{name}:{line} {module}: {reason}")
    return refused


def sources() -> dict[str, str]:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_import_is_allowed():
    assert [refusal for name, source in sources().items() for refusal in refusals(name, source)] == []


def test_every_module_has_its_place_in_the_design():
    units = {name.split("/")[0].removesuffix(".py") for name in sources()} - {"__init__"}
    assert units - set(ALLOWED) == set()


def test_allowed_imports_have_no_cycle():
    """A unit is removed when all that it may import is removed; what cannot be removed is a cycle."""
    left = {unit: {target.split(".")[0] for target in targets} for unit, targets in ALLOWED.items()}
    while free := [unit for unit, targets in left.items() if not targets & left.keys()]:
        for unit in free:
            del left[unit]
    assert left == {}


def test_nothing_is_imported_by_a_string_but_the_commands():
    """Such an import would escape the tests above."""
    dynamic = [name for name, source in sources().items() if "import_module(" in source or "__import__(" in source]
    assert dynamic == ["main.py"]
    assert sources()["main.py"].count("import_module(") == 1


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("ctr/din.py", "from marsjax.augmentation import mars", "not an arrow"),
        ("ctr/din.py", "def f():\n    import marsjax.augmentation.mars", "not an arrow"),
        ("ctr/din.py", "from marsjax.training.loop import fit", "not an arrow"),
        ("data/splits.py", "from marsjax import retrieval", "not an arrow"),
        ("evaluation/metrics.py", "import marsjax.alignment", "not an arrow"),
        ("alignment.py", "from marsjax.pipeline import load", "not an arrow"),
        ("records.py", "from marsjax import filesystem", "not an arrow"),  # a prefix of letters is no prefix of names
        ("training/loop.py", "from . import step", "relative"),
        ("training/loop.py", "from .step import TrainState", "relative"),
        ("training/loop.py", "import orbax.checkpoint as ocp", "only in training/checkpoint.py"),
        ("pipeline.py", "from usearch.index import Index", "only in retrieval.py"),
        ("data/histories.py", "import grain.python", "only in data/batches.py"),
        ("alignment.py", "from ml_collections import ConfigDict", "only in cells.py, commands.py, configuration.py"),
        ("data/tabular.py", "import pyarrow", "outside a function"),
        ("data/tabular.py", "try:\n    import pyarrow\nexcept ImportError:\n    pass", "outside a function"),
        ("stein.py", "import sklearn", "neither in the core"),
        ("pipeline.py", "from marsjax.serving import service", "made of an optional extra"),
        ("serving/storage.py", "from marsjax.serving.redis_storage import RedisStorage", "made of an optional extra"),
        ("serving/engine.py", "import fastapi", "neither in the core"),
    ],
)
def test_a_forbidden_import_is_seen(name, source, reason):
    (refusal,) = refusals(name, source)
    assert reason in refusal


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ctr/din.py", "from marsjax.ctr.items import ItemEmbedding\nfrom marsjax.records import CtrBatch"),
        ("serving/bundle.py", "from marsjax import __version__, files\nfrom marsjax.training import checkpoint"),
        ("training/checkpoint.py", "import orbax.checkpoint as ocp"),
        ("data/tabular.py", "def f():\n    try:\n        import pyarrow.csv\n    except ImportError:\n        pass"),
        ("serving/service.py", "import uvicorn\nfrom marsjax.serving.measures import Measures"),
        ("commands.py", "def serve():\n    from marsjax.serving import service"),
        ("pipeline.py", "import jax, json\nfrom marsjax.data import batches"),
    ],
)
def test_an_allowed_import_is_let_through(name, source):
    assert refusals(name, source) == []
