"""Whether and how a repository hides what it holds: block ids, and the seal on stored bytes.

A keyed repository has AES-256-GCM (NIST SP 800-38D) with nonces of 96 bits made from the sealed bytes themselves, so that
one nonce never serves two contents. ``docs/packs.md`` gives the derivation of every key.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vmsnap.stores.blocks import HOLE
from vmsnap.stores.packs.names import damaged

NONCE_BYTES = 12
TAG_BYTES = 16


class Seal(Protocol):
    """Turns a block's digest into its id, and plain bytes into stored ones. Safe to use from several threads."""

    @property
    def keyed(self) -> bool:
        """Tell whether a key is needed to read."""

    def block_id(self, digest: bytes) -> bytes:
        """Return the id of a block with that SHA-256; a hole stays a hole."""

    def seal(self, data: bytes) -> bytes:
        """Return the bytes to store."""

    def unseal(self, data: bytes, *, name: str) -> bytes:
        """Return the plain bytes. Raises VerificationError that names the object."""

    def signature(self, text: bytes) -> str:
        """Return what vouches for a text, in hexadecimal."""


class OpenSeal:
    """Hides nothing: ids are the digests themselves, and what is stored is plain."""

    keyed = False

    def block_id(self, digest: bytes) -> bytes:
        """Return the digest."""
        return digest

    def seal(self, data: bytes) -> bytes:
        """Return the bytes as they are."""
        return data

    def unseal(self, data: bytes, *, name: str) -> bytes:  # noqa: ARG002 - nothing can fail
        """Return the bytes as they are."""
        return data

    def signature(self, text: bytes) -> str:
        """Return the SHA-256 of a text."""
        return hashlib.sha256(text).hexdigest()


class KeyedSeal:
    """AES-256-GCM and keyed ids, from one key and the repository's id."""

    keyed = True

    def __init__(self, key: bytes, *, repository: str) -> None:
        def derived(purpose: str) -> bytes:
            return hmac.digest(key, f"vmsnap packs 1 {purpose} {repository}".encode(), "sha256")

        # What 'openssl enc -md sha256 -nosalt' makes of a password, so that a program can be given it without an argument.
        self._cipher = AESGCM(hashlib.sha256(derived("data").hex().encode()).digest())
        self._nonce_key = derived("nonce")
        self._id_key = derived("id")
        self._signature_key = derived("signature")
        self.key_check = derived("check").hex()

    def block_id(self, digest: bytes) -> bytes:
        """Return the keyed digest of the digest."""
        return HOLE if digest == HOLE else hmac.digest(self._id_key, digest, "sha256")

    def seal(self, data: bytes) -> bytes:
        """Return nonce, ciphertext and tag."""
        nonce = hmac.digest(self._nonce_key, hashlib.sha256(data).digest(), "sha256")[:NONCE_BYTES]
        return nonce + self._cipher.encrypt(nonce, data, None)

    def unseal(self, data: bytes, *, name: str) -> bytes:
        """Return the plain bytes. Raises VerificationError where they were changed, or sealed with another key."""
        try:
            return self._cipher.decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], None)
        except (InvalidTag, ValueError) as error:
            raise damaged(name, what="its seal is broken") from error

    def signature(self, text: bytes) -> str:
        """Return the keyed digest of a text."""
        return hmac.digest(self._signature_key, text, "sha256").hex()
