"""The two invariants as types: who may make the keys that resume a clone and publish a snapshot."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmsnap

ROOT = Path(vmsnap.__file__).parent
KEYS = {
    # Each hypervisor's fence, and nobody else.
    "IsolationProof": {"network/fence.py", "hypervisors/hyperv/fence.py"},
    "IsolationEvidence": {"workflow/identity.py"},
    "CleanShutdown": {"workflow/proof.py"},
}
# Each key's lock is in one place too, so that nobody else asks for it.
# A clone whose NIC was plugged anew is resumed a second time, by a new proof.
LOCKS = {"resume_clone": {"workflow/backup.py", "workflow/reach.py"}, "publish": {"workflow/backup.py"}}


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("testing/"):
            yield name, ast.parse(path.read_text(encoding="utf-8"), filename=name)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


@pytest.mark.parametrize("key", list(KEYS))
def test_a_key_is_made_where_it_belongs_only(key: str) -> None:
    makers = {
        name
        for name, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _called(node) == key
    }
    assert makers == KEYS[key]


@pytest.mark.parametrize("key", list(KEYS))
def test_a_key_is_not_made_by_another_name_or_from_another_key(key: str) -> None:
    for name, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not [alias for alias in node.names if alias.name == key and alias.asname], name
            if isinstance(node, ast.ClassDef):
                assert key not in [getattr(base, "id", "") for base in node.bases], name
            if isinstance(node, ast.Call) and _called(node) in {"replace", "__new__", "__setattr__"}:
                used = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
                assert not used & {key, "proof", "evidence", "clean"}, f"{name}:{node.lineno}"


@pytest.mark.parametrize("method", list(LOCKS))
def test_a_lock_is_opened_where_it_belongs_only(method: str) -> None:
    users = {
        name
        for name, tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _called(node) == method and not name.startswith("stores/")
    }
    assert users == LOCKS[method]
