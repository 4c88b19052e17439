"""TensorRT for RTX compiles kernels for the card at the first run of a shape; this keeps them beside the engine.

``<engine>.sm86.cache`` is a header of five lines, then what the SDK serialized:

    repvgg runtime cache 1
    <SHA-256 of the engine>
    <SDK version>
    sm86
    <SHA-256 of what follows>

The header is a function of engine, SDK version, card and content, so it is never parsed: it is made anew and must be
equal. Anything else, stale, damaged or of another engine, is ignored, and written over when the engine is closed; an
unwritable directory is ignored too. A cache only saves time, so none of this is an error. (The SDK then checks driver
and device for itself before it uses one.)

A cache holds kernels: it is native code, as a plan is. Its digest finds damage and mix-ups, not forgery; whoever can
write it can also write the engine and its sidecar beside it, and is trusted as much. An engine that was loaded
unverified is one whose origin nobody vouched for, so no cache is read from beside it, and none is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

from engines.errors import OutputFailed
from engines.files import write_whole

MAGIC = "repvgg runtime cache 1"


@dataclasses.dataclass(frozen=True)
class RuntimeCacheFile:
    """Where the cache of an engine on a kind of card is, and what it must have been made for."""

    path: pathlib.Path
    engine_sha256: str
    sdk_version: str
    compute_capability: int

    @classmethod
    def beside(
        cls, engine: pathlib.Path, engine_sha256: str, sdk_version: str, compute_capability: int
    ) -> RuntimeCacheFile:
        """That of the engine file ``engine``: ``model.fp16.engine`` to ``model.fp16.engine.sm86.cache``."""
        path = engine.with_name(f"{engine.name}.sm{compute_capability}.cache")
        return cls(path, engine_sha256, sdk_version, compute_capability)

    def read(self) -> bytes | None:
        """What the SDK serialized, or None: there is none, or it is stale, damaged, or of something else."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return None
        kernels = content[len(self._header(b"")) :]
        return kernels if kernels and content == self._header(kernels) + kernels else None

    def write(self, kernels: bytes) -> bool:
        """Writes the file whole; False when it cannot be written."""
        try:
            write_whole(self.path, self._header(kernels) + kernels)
        except OutputFailed:
            return False
        return True

    def _header(self, kernels: bytes) -> bytes:
        digest = hashlib.sha256(kernels).hexdigest()
        lines = (MAGIC, self.engine_sha256, self.sdk_version, f"sm{self.compute_capability}", digest)
        return "".join(f"{line}\n" for line in lines).encode()
