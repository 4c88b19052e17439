"""What must hold before an engine is deserialized, in this order; deserializing a plan is running native code.

    1  the file is there, and its sidecar beside it, which is sane
    2  the file's SHA-256 is the sidecar's
    3  its header is sane, and agrees with the sidecar on SDK, version and cards       ``checked_engine`` up to here
    4  the SDK is installed                                                            ``check_sdk_installed``
    5  in the engine's version                                                         ``check_sdk_version``
    6  a GPU is here, and its compute capability is among the engine's                 ``check_card``

So nothing is asked of an SDK or a GPU on behalf of a file that is not what it should be. A refusal is one line that
ends with the command that makes a right engine. SHA-256 guards against mix-ups and damage: whoever can replace both
files can make them agree, so the way they travelled must be trusted, too.
"""

from __future__ import annotations

import pathlib
import shlex

from engines.errors import InputRejected, SdkMissing
from engines.files import sha256_of
from engines.kind import graph_of_engine, graphs_beside
from engines.manifest import Manifest, manifest_from_file, sidecar_path
from engines.plan import Header, header_from_file
from engines.sdk import RTX_CARDS, SDKS, Sdk, is_installed


def checked_engine(path: pathlib.Path, *, allow_unverified: bool = False) -> tuple[Header, Manifest | None]:
    """Steps 1 to 3 for the engine at ``path``.

    Args:
        path: the engine; its sidecar is ``<engine>.json`` beside it.
        allow_unverified: goes on without a sidecar, or with one that is another file's; no manifest is returned then.

    Raises:
        InputRejected: something does not hold.
    """
    if not path.is_file():
        raise InputRejected(f"{path}: no such engine; check the path")
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        if allow_unverified:
            return header_from_file(path), None
        raise InputRejected(
            f"{path}: its sidecar {sidecar.name} is missing, so nothing says what this engine is; put it beside, or "
            f"{_rebuild(path)}"
        )
    manifest = manifest_from_file(sidecar)
    digest = sha256_of(path)
    if digest != manifest.sha256["engine"]:
        if allow_unverified:
            return header_from_file(path), None
        raise InputRejected(
            f"{path}: its SHA-256 is {digest[:12]}..., its sidecar's is {manifest.sha256['engine'][:12]}...: damaged, "
            f"replaced, or the sidecar is another engine's; {_rebuild(path, manifest)}"
        )
    header = header_from_file(path)
    _check_header(path, header, manifest)
    return header, manifest


def _check_header(path: pathlib.Path, header: Header, manifest: Manifest) -> None:
    """Of a full TensorRT engine the header is held to the SDK's name alone: where it has more is not documented."""
    written = [("SDK", header.sdk, manifest.sdk["name"])]
    if header.sdk == "tensorrt_rtx":
        written.append(("version", header.version_text, manifest.sdk["version"]))
        written.append(
            ("cards", cards_text(header.compute_capabilities), cards_text(tuple(sorted(manifest.compute_capabilities))))
        )
    for what, found, said in written:
        if found != said:
            raise InputRejected(
                f"{path}: its header says {what} {found}, its sidecar {said}; {_rebuild(path, manifest)}"
            )


def cards_text(cards: tuple[int, ...]) -> str:
    """As in ``sm80, sm86``."""
    return ", ".join(f"sm{card}" for card in cards) or "unknown"


def sdk_of(header: Header) -> Sdk:
    """The SDK that the engine needs."""
    return next(sdk for sdk in SDKS if sdk.module == header.sdk)


def check_sdk_installed(path: pathlib.Path, header: Header, manifest: Manifest | None) -> None:
    """Step 4; imports nothing.

    Raises:
        SdkMissing: the SDK that the engine needs is not on this machine.
    """
    sdk = sdk_of(header)
    if is_installed(sdk):
        return
    other = next(other for other in SDKS if other is not sdk)
    raise SdkMissing(
        f"{path}: needs {sdk.title} {sdk_version_of(header, manifest)}, which is not installed here; {sdk.install}, or "
        f"{_rebuild(path, manifest, sdk=other)}"
    )


def sdk_version_of(header: Header, manifest: Manifest | None) -> str:
    """The version of the SDK that made the engine, by its sidecar where there is one."""
    return header.version_text if manifest is None else manifest.sdk["version"]


def check_sdk_version(path: pathlib.Path, header: Header, manifest: Manifest | None, installed: str) -> None:
    """Step 5: an engine runs in the version that made it.

    Of a full TensorRT engine without a sidecar only the runtime knows the version, and refuses any other itself.

    Args:
        path: the engine.
        header: as ``checked_engine`` gives it.
        manifest: as ``checked_engine`` gives it.
        installed: ``__version__`` of the SDK's module.

    Raises:
        SdkMissing: another version is installed.
    """
    made_by, sdk = sdk_version_of(header, manifest), sdk_of(header)
    if installed == made_by or (manifest is None and header.sdk == "tensorrt"):
        return
    raise SdkMissing(
        f"{path}: made by {sdk.title} {made_by}, and {installed} is installed here; install {made_by}, or "
        f"{_rebuild(path, manifest, sdk=sdk)}"
    )


def check_card(path: pathlib.Path, header: Header, manifest: Manifest | None, capability: int | None) -> None:
    """Step 6. Where neither header nor sidecar names a card, the runtime has to know.

    Args:
        path: the engine.
        header: as ``checked_engine`` gives it; ``newer_cards`` admits those newer than the newest that it names.
        manifest: as ``checked_engine`` gives it.
        capability: of the GPU to run on, as in 86; None where no GPU answers.

    Raises:
        SdkMissing: there is no GPU, or one that the engine was not built for.
    """
    if capability is None:
        raise SdkMissing(f"{path}: no GPU answers here, and an engine runs on nothing else; run {_onnx_beside(path)}")
    cards = header.compute_capabilities or (() if manifest is None else manifest.compute_capabilities)
    if not cards or capability in cards or (header.newer_cards and capability > max(cards)):
        return
    full, rtx = SDKS
    sdk = rtx if header.sdk == rtx.module and capability in RTX_CARDS else full
    card = f" --gpu sm{capability}" if sdk is rtx else ""
    raise SdkMissing(
        f"{path}: built for {cards_text(cards)}, and this GPU is sm{capability}; "
        f"{_rebuild(path, manifest, sdk=sdk)}{card}"
    )


def _rebuild(path: pathlib.Path, manifest: Manifest | None = None, *, sdk: Sdk | None = None) -> str:
    """The command that builds the engine again from the typed ONNX file that it came from, or from that of ``sdk``."""
    command = f"python -m engines build {_onnx_beside(path, manifest, sdk)}"
    return f"{command} --sdk {sdk.module}" if sdk else command


def _onnx_beside(path: pathlib.Path, manifest: Manifest | None = None, sdk: Sdk | None = None) -> str:
    """``model.fp16.onnx`` for ``model.fp16.engine``, with its directory where the very file is there."""
    plain, for_rtx = graphs_beside(path)
    if for_rtx.is_file() and plain.is_file() and sdk is not None:  # two graphs, one for each SDK
        return shlex.quote(str(for_rtx if sdk.module == SDKS[1].module else plain))
    onnx = graph_of_engine(path, None if manifest is None else manifest.sha256["onnx"])
    return shlex.quote(plain.name if onnx is None else str(onnx))
