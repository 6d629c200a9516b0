"""
Lists the uses of the TensorRT Python API that some version of it lacks. Exit status 1 if there is one.

    python tests/tensorrt_api/check_usage.py deploy benchmarks --min 8.5

Compares the syntax trees of all `*.py` below the paths with `versions.json.xz`, read from the real bindings of 25
versions, 8.5.3 to 11.4: version -> `classes` (members with their signatures), `enums`, `enum_values`, `functions`,
`constants`, `bases` of classes. A use is an attribute chain on the module (`trt.BuilderFlag.FP16`), which goes by the
names `trt` and `tensorrt`, also as `self.trt` or `self._trt`; or `from tensorrt import X`. What `hasattr` or `getattr`
with a default asks for may be missing. A line with the comment `# trt-ok` is skipped.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import lzma
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

VERSIONS = Path(__file__).with_name("versions.json.xz")
MODULE_NAMES = ("trt", "tensorrt")
Chain = Tuple[str, ...]


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="List uses of the TensorRT API that some version of it lacks.")
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--min", default="8.5", help="oldest version that matters (default: 8.5)")
    options = parser.parse_args(argv)
    apis = [Api(version, api) for version, api in load_versions().items() if numbers(version) >= numbers(options.min)]
    checked = missing = 0
    for file in sorted(file for path in options.paths for file in (path.rglob("*.py") if path.is_dir() else [path])):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        for line, chain in sorted(set(uses(ast.parse(text, str(file))))):
            if "# trt-ok" in lines[line - 1]:
                continue
            checked += 1
            lacking = [api.version for api in apis if not api.has(chain)]
            if lacking:
                missing += 1
                print(f"{file}:{line}: trt.{'.'.join(chain)} is missing in {', '.join(lacking)}")
    print(f"{checked} uses, {missing} missing somewhere in {apis[0].version} .. {apis[-1].version}", file=sys.stderr)
    return int(missing > 0)


def load_versions() -> Dict[str, Dict[str, Any]]:
    """Version -> its API, from the oldest to the newest."""
    with lzma.open(VERSIONS, "rt", encoding="utf-8") as file:
        found = json.load(file)
    return {version: found[version] for version in sorted(found, key=numbers)}


def numbers(version: str) -> Tuple[int, ...]:
    """(10, 13, 3, 9) of "10.13.3.9"."""
    return tuple(int(part) for part in version.split("."))


class Api:
    """The API of one version."""

    def __init__(self, version: str, api: Dict[str, Any]) -> None:
        self.version = version
        self.classes, self.functions, self.bases = api["classes"], api["functions"], api["bases"]
        self.enums, self.enum_values = api["enums"], api["enum_values"]
        parts = itertools.chain(self.classes, self.enums, self.functions, api["constants"], api["submodules"])
        self.top = {name for name in parts if "." not in name}

    def member(self, owner: str, name: str) -> Optional[str]:
        """The signature of a class's own or inherited member ("property rw: int" of a property); None if missing."""
        members = self.classes.get(owner, {})
        if name in members:
            return members[name]
        return next(filter(None, (self.member(base, name) for base in self.bases.get(owner, []))), None)

    def has(self, chain: Chain) -> bool:
        """Whether `trt.A.B...` exists; True where it leaves what can be known (a member of a member)."""
        top, rest = chain[0], chain[1:]
        if top not in self.top:
            return top.startswith("__")
        if not rest or rest[0].startswith("__"):
            return True
        if top in self.enums:
            return rest[0] in self.enums[top] or rest[0] in ("name", "value")
        if top not in self.classes or self.member(top, rest[0]) is not None:
            nested = ".".join(chain[:2])
            return len(rest) == 1 or nested not in self.enums or rest[1] in self.enums[nested]
        return False


def uses(tree: ast.AST) -> Iterator[Tuple[int, Chain]]:
    """(line, chain) of all that a module needs of TensorRT."""
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "tensorrt":
            yield from ((node.lineno, (alias.name,)) for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            chain = chain_of(node.args[0])
            if chain is not None and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
                yield node.lineno, (*chain, node.args[1].value)
        elif isinstance(node, ast.Attribute) and node not in inner:
            inner.update(part for part in ast.walk(node) if isinstance(part, ast.Attribute))
            chain = chain_of(node)
            if chain:
                yield node.lineno, chain


def chain_of(node: ast.AST) -> Optional[Chain]:
    """("BuilderFlag", "FP16") of `trt.BuilderFlag.FP16` or `self._trt.BuilderFlag.FP16`; None of anything else."""
    names: List[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    if node.id == "self" and names:
        return tuple(names[1:]) if names[0].lstrip("_") in MODULE_NAMES else None
    return tuple(names) if node.id in MODULE_NAMES else None


if __name__ == "__main__":
    sys.exit(main())
