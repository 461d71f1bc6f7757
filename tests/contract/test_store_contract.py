"""The store's contract, over the fake and over plain files without reflinks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vmsnap.model.manifest import Snapshot
from vmsnap.stores.images import ImagesStore
from vmsnap.testing.memory_store import MemoryStore
from vmsnap.testing.store_contract import BLOCK, StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> MemoryStore:
        return MemoryStore(tmp_path / "shown")

    @pytest.fixture
    def shares_blocks(self) -> bool:
        return True

    @pytest.fixture
    def damage(self, store: MemoryStore) -> Callable[[Snapshot], None]:
        return lambda snapshot: store.damage(snapshot, target="vda")


class TestImagesStoreWithCopies(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ImagesStore:
        root = tmp_path / "store"
        root.mkdir()
        return ImagesStore(root, allow_copies=True)

    @pytest.fixture
    def shares_blocks(self, store: ImagesStore) -> bool:
        return any("shares blocks" in finding.message for finding in store.findings(needed_bytes=0))

    @pytest.fixture
    def damage(self, store: ImagesStore) -> Callable[[Snapshot], None]:
        def change(snapshot: Snapshot) -> None:
            path = Path(store.images(snapshot)[0].path)
            path.chmod(0o600)
            with path.open("r+b") as file:
                file.seek(BLOCK + 100)
                file.write(b"damage")

        return change
