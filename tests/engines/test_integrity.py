"""What is refused before anything is deserialized, in which order, and with which command to make it right."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import struct

import pytest

from engines import integrity
from engines.errors import InputRejected, SdkMissing
from engines.files import sha256_of
from engines.integrity import check_card, check_sdk_installed, check_sdk_version, checked_engine
from engines.manifest import manifest_from_file, sidecar_path
from engines.plan import Header, PlanRejected
from engines.runner import load
from engines.sdk import SDKS
from tests.networks import Shape

FULL, RTX = SDKS
RTX_HEADER = Header("tensorrt_rtx", (1, 7, 1, 116), 1000, (80, 86, 89), newer_cards=False)
NEWER_HEADER = dataclasses.replace(RTX_HEADER, newer_cards=True)
FULL_HEADER = Header("tensorrt", (0, 0, 0, 0), 1000, (), newer_cards=False)


@pytest.fixture
def engine(fashion):
    return fashion / "fashion.fp16.engine"


class Asked(Exception):
    """A backend, an SDK or a GPU was asked for."""


@pytest.fixture
def nothing_is_asked(monkeypatch):
    """Makes every such question fail."""

    def asked(*_):
        raise Asked

    for target in ("engines.integrity.is_installed", "engines.runner.backend_for", "ctypes.CDLL"):
        monkeypatch.setattr(target, asked)


def rewrite(engine, **fields):
    """Replaces fields of the sidecar."""
    sidecar = sidecar_path(engine)
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **fields}))


def write_over(engine, position, content):
    """Writes into the engine, and the new SHA-256 into the sidecar."""
    data = bytearray(engine.read_bytes())
    data[position : position + len(content)] = content
    engine.write_bytes(data)
    rewrite(engine, sha256={**json.loads(sidecar_path(engine).read_text())["sha256"], "engine": sha256_of(engine)})


def flip_a_byte(engine):
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)


def cut_short(engine):
    engine.write_bytes(engine.read_bytes()[:-1])


def empty(engine):
    engine.write_bytes(b"")


def remove_the_sidecar(engine):
    sidecar_path(engine).unlink()


def edit_the_sidecar(engine):
    rewrite(engine, tolerance="large")


def name_another_sdk(engine):
    rewrite(engine, sdk={"name": "tensorrt", "version": "11.4.0.106"})


def name_another_version(engine):
    rewrite(engine, sdk={"name": "tensorrt_rtx", "version": "1.8.0.1"})


def name_more_cards(engine):
    rewrite(engine, compute_capabilities=[75, 80, 86, 89, 120, 121])


def change_the_version_in_the_header(engine):
    write_over(engine, 24, b"\x01\x08")


def change_the_cards_in_the_header(engine):
    write_over(engine, 32, struct.pack("<I", 0x02))


def change_the_tag(engine):
    write_over(engine, 0, b"none")


def change_the_size_in_the_header(engine):
    write_over(engine, 16, struct.pack("<Q", 64))


TWINS = [
    (flip_a_byte, "damaged, replaced, or the sidecar is another engine's"),
    (cut_short, "damaged, replaced, or the sidecar is another engine's"),
    (empty, "damaged, replaced, or the sidecar is another engine's"),
    (remove_the_sidecar, "its sidecar fashion.fp16.engine.json is missing"),
    (edit_the_sidecar, 'tolerance: expected a number, found "large"'),
    (name_another_sdk, "its header says SDK tensorrt_rtx, its sidecar tensorrt"),
    (name_another_version, "its header says version 1.7.1.116, its sidecar 1.8.0.1"),
    (name_more_cards, "its header says cards sm80, sm86, sm89, sm120, sm121, its sidecar sm75, sm80"),
    (change_the_version_in_the_header, "its header says version 1.8.1.116, its sidecar 1.7.1.116"),
    (change_the_cards_in_the_header, "its header says cards sm80, its sidecar sm80, sm86"),
    (change_the_tag, "not a TensorRT engine (it begins with b'none')"),
    (change_the_size_in_the_header, "the header says 64 bytes"),
]


def test_an_engine_with_its_own_sidecar_is_what_it_says(engine, nothing_is_asked):
    header, manifest = checked_engine(engine)
    assert (header.sdk, header.version_text) == ("tensorrt_rtx", "1.7.1.116")
    assert header.compute_capabilities == (80, 86, 89, 120, 121)
    assert manifest == manifest_from_file(sidecar_path(engine))
    with pytest.raises(Asked):
        load(engine)


@pytest.mark.parametrize(("damage", "said"), TWINS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_file_that_is_not_what_it_should_be_is_refused_before_an_sdk_is_asked_for(
    engine, damage, said, nothing_is_asked
):
    damage(engine)
    with pytest.raises(InputRejected) as caught:
        load(engine)
    message = str(caught.value)
    assert "\n" not in message
    assert said in message
    assert message.startswith(str(engine))
    assert "build" in message.rpartition(";")[2]


def test_the_sidecar_of_another_engine_is_refused(engine, compiled):
    shutil.copy(compiled(Shape(classes=8)).sidecar, sidecar_path(engine))
    with pytest.raises(
        InputRejected, match=r"SHA-256 is \w{12}\.\.\., its sidecar's is \w{12}\.\.\.: .*another engine"
    ):
        checked_engine(engine)


def test_a_missing_engine_is_that_and_nothing_else(tmp_path):
    with pytest.raises(InputRejected, match=r"none\.engine: no such engine; check the path"):
        checked_engine(tmp_path / "none.engine")


def test_the_command_that_rebuilds_names_the_graph_that_was_compiled(engine):
    flip_a_byte(engine)
    for spoil, named in [
        (lambda: None, engine.with_name("fashion.fp16.onnx")),
        (lambda: shutil.copy(engine.with_name("fashion.onnx"), engine.with_name("fashion.fp16.onnx")), None),
        (lambda: engine.with_name("fashion.fp16.onnx").unlink(), None),
    ]:
        spoil()
        with pytest.raises(InputRejected) as caught:
            checked_engine(engine)
        command = shlex.split(str(caught.value).rpartition("; ")[2])
        assert command == ["python", "-m", "engines", "build", str(named or "fashion.fp16.onnx")]


def test_the_command_stays_whole_where_the_path_has_spaces(fashion):
    moved = fashion.rename(fashion.with_name("it's a model"))
    flip_a_byte(moved / "fashion.fp16.engine")
    with pytest.raises(InputRejected) as caught:
        checked_engine(moved / "fashion.fp16.engine")
    command = shlex.split(str(caught.value).rpartition("; ")[2])
    assert command[-1] == str(moved / "fashion.fp16.onnx")


@pytest.mark.parametrize("damage", [flip_a_byte, remove_the_sidecar])
def test_unverified_goes_on_without_believing_the_sidecar(engine, damage):
    damage(engine)
    header, manifest = checked_engine(engine, allow_unverified=True)
    assert header.compute_capabilities == (80, 86, 89, 120, 121)
    assert manifest is None


@pytest.mark.parametrize("damage", [edit_the_sidecar, name_another_version])
def test_unverified_does_not_bear_a_sidecar_that_contradicts_its_own_engine(engine, damage):
    damage(engine)
    with pytest.raises(InputRejected):
        checked_engine(engine, allow_unverified=True)


@pytest.mark.parametrize("damage", [cut_short, empty, change_the_tag])
def test_unverified_still_wants_an_engine(engine, damage):
    damage(engine)
    with pytest.raises(PlanRejected):
        checked_engine(engine, allow_unverified=True)


# --- what the backends ask


@pytest.fixture
def manifest(fashion_export):
    return manifest_from_file(fashion_export / "fashion.fp16.engine.json")


def test_a_missing_sdk_is_named_with_both_ways_out(engine, manifest, monkeypatch):
    monkeypatch.setattr(integrity, "is_installed", lambda sdk: sdk is RTX)
    check_sdk_installed(engine, RTX_HEADER, manifest)
    monkeypatch.setattr(integrity, "is_installed", lambda sdk: sdk is FULL)
    with pytest.raises(SdkMissing) as caught:
        check_sdk_installed(engine, RTX_HEADER, manifest)
    assert str(caught.value) == (
        f"{engine}: needs TensorRT for RTX 1.7.1.116, which is not installed here; pip install 'repvgg-exporter[rtx]', "
        f"or python -m engines build {engine.with_name('fashion.fp16.onnx')} --sdk tensorrt"
    )


@pytest.mark.parametrize("installed", ["1.7.1.115", "1.7.1", "1.8.0.0", "11.4.0.106"])
def test_another_version_of_the_sdk_is_refused(engine, manifest, installed):
    check_sdk_version(engine, RTX_HEADER, manifest, "1.7.1.116")
    check_sdk_version(engine, RTX_HEADER, None, "1.7.1.116")
    with pytest.raises(SdkMissing) as caught:
        check_sdk_version(engine, RTX_HEADER, manifest, installed)
    assert f"made by TensorRT for RTX 1.7.1.116, and {installed} is installed here" in str(caught.value)
    assert str(caught.value).endswith(f"build {engine.with_name('fashion.fp16.onnx')} --sdk tensorrt_rtx")


def test_of_full_tensorrt_the_sidecar_alone_knows_the_version(engine, manifest):
    made_by_full = dataclasses.replace(manifest, sdk={"name": "tensorrt", "version": "10.16.1.11"})
    check_sdk_version(engine, FULL_HEADER, made_by_full, "10.16.1.11")
    check_sdk_version(engine, FULL_HEADER, None, "11.4.0.106")
    with pytest.raises(SdkMissing, match=r"made by TensorRT 10\.16\.1\.11, and 11\.4\.0\.106 is installed"):
        check_sdk_version(engine, FULL_HEADER, made_by_full, "11.4.0.106")


@pytest.mark.parametrize(
    ("header", "cards", "capability"),
    [
        (RTX_HEADER, (80, 86, 89), 86),
        (NEWER_HEADER, (80, 86, 89), 90),
        (NEWER_HEADER, (80, 86, 89), 120),
        (FULL_HEADER, (90,), 90),
        (FULL_HEADER, (), 90),
    ],
)
def test_a_card_that_the_engine_was_built_for_is_let_in(engine, manifest, header, cards, capability):
    check_card(engine, header, dataclasses.replace(manifest, compute_capabilities=cards), capability)


@pytest.mark.parametrize(
    ("header", "cards", "capability", "way_out"),
    [
        (RTX_HEADER, (80, 86, 89), 90, "--sdk tensorrt"),
        (RTX_HEADER, (80, 86, 89), 120, "--sdk tensorrt_rtx --gpu sm120"),
        (RTX_HEADER, (80, 86, 89), 75, "--sdk tensorrt_rtx --gpu sm75"),
        (NEWER_HEADER, (80, 86, 89), 75, "--sdk tensorrt_rtx --gpu sm75"),
        (NEWER_HEADER, (80, 86, 89), 87, "--sdk tensorrt"),
        (FULL_HEADER, (86,), 90, "--sdk tensorrt"),
    ],
)
def test_any_other_card_is_refused_with_the_way_to_an_engine_for_it(
    engine, manifest, header, cards, capability, way_out
):
    with pytest.raises(SdkMissing) as caught:
        check_card(engine, header, dataclasses.replace(manifest, compute_capabilities=cards), capability)
    named = ", ".join(f"sm{card}" for card in cards)
    graph = engine.with_name("fashion.fp16.onnx")
    assert str(caught.value) == (
        f"{engine}: built for {named}, and this GPU is sm{capability}; python -m engines build {graph} {way_out}"
    )


def test_no_gpu_is_refused_with_what_runs_without_one(engine, manifest):
    with pytest.raises(SdkMissing, match=r"no GPU answers here.*; run .*fashion\.fp16\.onnx$"):
        check_card(engine, RTX_HEADER, manifest, None)
