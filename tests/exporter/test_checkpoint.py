"""Files to named tensors: every container, prefix, format and float type gives the same weights, or a reason."""

from __future__ import annotations

import gc
import pathlib
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from exporter.checkpoint import EXTENSIONS, check_archive, checkpoint_from_path
from exporter.errors import CheckpointRejected
from tests.networks import NaiveRepVGG, Shape, contiguous_float, deployed_state, renamed

SIZE = ("--size", "20")


@pytest.fixture
def state(small):
    return contiguous_float(small.state_dict())


@pytest.fixture
def golden(command, tmp_path):
    """``golden(name)``: exports that checkpoint; the golden inputs and outputs."""

    def export(name, *flags):
        outcome = command(name, *SIZE, "--quiet", "--out", "out", *flags)
        assert (outcome.code, outcome.stderr) == (0, "")
        with np.load(tmp_path / "out" / "golden.npz") as arrays:
            return arrays["input"], arrays["output"]

    return export


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# Formats


@pytest.mark.parametrize("name", [f"model{extension}" for extension in EXTENSIONS])
def test_every_extension_is_read(name, state, tmp_path):
    save_file(state, tmp_path / name) if name.endswith(".safetensors") else torch.save(state, tmp_path / name)
    checkpoint = checkpoint_from_path(tmp_path / name)
    assert_same(checkpoint.tensors, state)
    assert (checkpoint.path, checkpoint.container, checkpoint.others) == (tmp_path / name, "", ())


@pytest.mark.parametrize(
    ("name", "form"), [("model.pt", "safetensors"), ("model.safetensors", "zip"), ("model.safetensors", "legacy")]
)
def test_a_file_is_judged_by_what_it_holds_and_not_by_its_ending(name, form, state, tmp_path):
    if form == "safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=form == "zip")
    assert_same(checkpoint_from_path(tmp_path / name).tensors, state)


def test_a_legacy_file_gives_what_the_zip_gives(state, tmp_path, golden):
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert zipfile.is_zipfile(tmp_path / "zip.pt")
    assert not zipfile.is_zipfile(tmp_path / "legacy.pt")
    assert_same(checkpoint_from_path(tmp_path / "legacy.pt").tensors, state)
    assert np.array_equal(golden("legacy.pt")[1], golden("zip.pt")[1])


def mappings(path):
    """The address ranges at which this process has ``path`` mapped."""
    lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(f" {path}")]
    return [range(int(first, 16), int(last, 16)) for first, last in ranges]


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_the_weights_of_a_zip_are_mapped_and_not_copied(state, saved):
    path = saved(state)
    checkpoint = checkpoint_from_path(path)
    weights = [tensor for tensor in checkpoint.tensors.values() if tensor.numel()]
    assert all(any(t.data_ptr() in addresses for addresses in mappings(path)) for t in weights)
    del checkpoint, weights
    gc.collect()
    assert mappings(path) == []


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_the_weights_of_a_legacy_file_are_not_mapped(state, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    checkpoint = checkpoint_from_path(path)
    assert checkpoint.tensors
    assert mappings(path) == []


# Containers and prefixes


@pytest.mark.parametrize(
    ("wrap", "container", "others"),
    [
        (lambda s: {"state_dict": s}, "state_dict", ()),
        (lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3}, "model", ("optimizer", "epoch")),
        (lambda s: {"params": s, "name": "repvgg"}, "params", ("name",)),
        (lambda s: {"net": s, "acc": 71.2}, "net", ("acc",)),
        (lambda s: {"model": {"state_dict": s, "lr": 0.1}, "epoch": 3}, "model.state_dict", ("epoch", "lr")),
        (lambda s: {"net": {"params": s}}, "net.params", ()),
        (lambda s: {"model": {}, "net": s}, "net", ("model",)),
        (lambda s: {"state_dict": s, "model": {"linear.bias": torch.zeros(2)}}, "state_dict", ("model",)),
        (lambda s: {**s, "epoch": 3, "args": {"lr": 0.1}}, "", ()),
    ],
)
def test_the_weights_are_found_in_their_container(wrap, container, others, state, saved):
    checkpoint = checkpoint_from_path(saved(wrap(state)))
    assert_same(checkpoint.tensors, state)
    assert (checkpoint.container, checkpoint.others) == (container, others)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"teacher": s},
        lambda s: {"model": {"net": {"params": s}}},
        lambda s: {"model": {"teacher": s}},
        lambda s: [s],
    ],
    ids=["unknown name", "too deep", "unknown name inside", "list"],
)
def test_weights_in_no_known_container_are_not_guessed(wrap, state, saved):
    with pytest.raises(CheckpointRejected, match=r"model\.pt: holds "):
        checkpoint_from_path(saved(wrap(state)))


def test_what_stands_beside_the_weights_is_told(command, state, saved):
    saved({"state_dict": state, "optimizer": {"state": {}}, "epoch": 3})
    outcome = command("model.pt", *SIZE)
    assert outcome.code == 0
    assert "official naming under state_dict, training form; beside it, unused: optimizer, epoch" in outcome.stdout


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod."]
)
def test_prefixes_of_wrappers_are_removed(prefix, state, saved):
    path = saved({"state_dict": {prefix + name: tensor for name, tensor in state.items()}})
    assert_same(checkpoint_from_path(path).tensors, state)


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "Module.", "module", "modules.", "module_list.0."])
def test_other_prefixes_are_left_alone(prefix, state, saved):
    prefixed = {prefix + name: tensor for name, tensor in state.items()}
    assert_same(checkpoint_from_path(saved(prefixed)).tensors, prefixed)


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "module._orig_mod"])
def test_prefixes_of_wrappers_are_removed_inside_a_name_too(wrapper, state, saved):
    inside = {f"backbone.{wrapper}.{name}": tensor for name, tensor in state.items()}
    assert_same(
        checkpoint_from_path(saved(inside)).tensors, {f"backbone.{name}": tensor for name, tensor in state.items()}
    )


def test_a_tensor_that_is_itself_called_module_keeps_its_name(saved):
    state = {"stage0.module": torch.ones(3), "module.stage1.module": torch.ones(4)}
    assert checkpoint_from_path(saved(state)).tensors.keys() == {"stage0.module", "stage1.module"}


@pytest.mark.parametrize("second", ["_orig_mod.module.linear.bias", "linear.module.bias"])
def test_two_tensors_of_one_name_are_refused(second, state, saved):
    with pytest.raises(CheckpointRejected, match=r"two tensors are called linear\.bias"):
        checkpoint_from_path(saved({**state, second: torch.zeros(7)}))


# Values


def test_counters_are_let_through(small, saved):
    state = contiguous_float(small.state_dict())
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    assert len(counters) > 7
    state = {name: torch.tensor(12345) if name in counters else tensor for name, tensor in state.items()}
    assert_same(checkpoint_from_path(saved(state)).tensors, state)


def test_integers_of_more_than_one_element_are_not_counters(state, saved):
    with pytest.raises(CheckpointRejected, match="num_batches_tracked: int64 where floating-point"):
        checkpoint_from_path(saved({**state, "stage0.rbr_dense.bn.num_batches_tracked": torch.ones(2).long()}))


def test_counters_do_not_matter(golden, state, saved):
    without = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert len(without) < len(state)
    saved(state, "with.pt")
    saved(without, "without.pt")
    assert np.array_equal(golden("with.pt")[1], golden("without.pt")[1])


@pytest.mark.parametrize("extension", [".pt", ".safetensors"])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_files_are_computed_in_full_precision(dtype, precision, extension, state, golden, tmp_path):
    halves = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    name = f"half{extension}"
    save_file(halves, tmp_path / name) if extension == ".safetensors" else torch.save(halves, tmp_path / name)
    torch.save(state, tmp_path / "full.pt")
    rounded = NaiveRepVGG(Shape())
    rounded.load_state_dict(halves)
    images, outputs = golden(name)
    assert relative(outputs, rounded.answer(torch.from_numpy(images)).numpy()) < 1e-12
    error = relative(outputs, golden("full.pt")[1])
    assert precision / 50 < error < 20 * precision


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_floating_type_is_read(dtype, state, golden, saved):
    narrow = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    saved(narrow)
    exact = NaiveRepVGG(Shape()).double()
    exact.load_state_dict({name: t.double() if t.is_floating_point() else t for name, t in narrow.items()})
    images, outputs = golden("model.pt")
    assert relative(outputs, exact.answer(torch.from_numpy(images)).numpy()) < 1e-12


def test_parameters_are_weights_like_any_other(small, golden, saved):
    kept = small.state_dict(keep_vars=True)
    assert kept["linear.weight"].requires_grad
    saved(kept)
    images, outputs = golden("model.pt")
    assert relative(outputs, small.answer(torch.from_numpy(images)).numpy()) < 1e-12


@pytest.mark.parametrize(("elements", "accepted"), [(1 << 24, True), ((1 << 24) + 1, False), (10**15, False)])
def test_a_number_that_pretends_to_be_millions_is_refused(elements, accepted, saved):
    path = saved({"stage0.weight": torch.ones(1).expand(elements)})
    if accepted:
        assert checkpoint_from_path(path).tensors["stage0.weight"].shape == (elements,)
        return
    with pytest.raises(CheckpointRejected, match=r"stage0\.weight: more numbers than the file holds.*contiguous"):
        checkpoint_from_path(path)


def test_views_of_one_storage_are_read(small, golden, state, saved):
    pool = torch.cat([state["stage0.rbr_dense.bn.weight"], state["stage0.rbr_dense.bn.bias"]])
    transposed = state["linear.weight"].t().contiguous().t()
    assert not transposed.is_contiguous()
    views = {"stage0.rbr_dense.bn.weight": pool[:8], "stage0.rbr_dense.bn.bias": pool[8:], "linear.weight": transposed}
    saved({**state, **views})
    images, outputs = golden("model.pt")
    assert relative(outputs, small.answer(torch.from_numpy(images)).numpy()) < 1e-12


# The archive's checksums


def flip(path, record, position=0.5):
    """Flips the lowest bit of one byte inside a record of a zip."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(record)
    content = bytearray(path.read_bytes())
    start = info.header_offset + 30
    start += sum(int.from_bytes(content[info.header_offset + at :][:2], "little") for at in (26, 28))
    content[start + int(position * info.file_size)] ^= 1
    path.write_bytes(content)


def weight_records(path):
    with zipfile.ZipFile(path) as archive:
        return [info.filename for info in archive.infolist() if "/data/" in info.filename and info.file_size > 8]


@pytest.mark.parametrize("which", [0, 17, -1])
def test_a_flipped_bit_in_a_weight_is_noticed_and_its_record_named(which, command, checkpoint, tmp_path):
    record = weight_records(checkpoint)[which]
    flip(checkpoint, record)
    assert checkpoint_from_path(checkpoint).tensors  # reading alone does not notice
    outcome = command(checkpoint.name, *SIZE)
    assert outcome.code == 3
    assert f"record {record} differs from its checksum; copy the file again" in outcome.error
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize("record", ["model/data.pkl", "model/version", "model/.data/serialization_id"])
def test_a_flipped_bit_anywhere_else_in_the_archive_is_noticed(record, command, checkpoint):
    flip(checkpoint, record)
    assert command(checkpoint.name, *SIZE).code == 3


def test_a_whole_archive_passes(checkpoint):
    check_archive(checkpoint)
    flip(checkpoint, weight_records(checkpoint)[0])
    with pytest.raises(CheckpointRejected, match="differs from its checksum"):
        check_archive(checkpoint)
    flip(checkpoint, weight_records(checkpoint)[0])
    check_archive(checkpoint)


def test_formats_without_checksums_pass(state, tmp_path):
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "model.safetensors")
    check_archive(tmp_path / "legacy.pt")
    check_archive(tmp_path / "model.safetensors")


def rewritten(path, compression, twice=()):
    """The same records under the same names, compressed or not, and ``twice`` those that end so."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # that a name occurs twice
        for name, content in records:
            for _ in range(2 if name.endswith(twice) else 1):
                archive.writestr(name, content)


def test_an_archive_that_was_written_again_is_read(state, checkpoint):
    rewritten(checkpoint, zipfile.ZIP_STORED)
    assert_same(checkpoint_from_path(checkpoint).tensors, state)


@pytest.mark.parametrize(
    ("compression", "twice", "words"),
    [
        (zipfile.ZIP_DEFLATED, (), "compressed archive.*save it again"),
        (zipfile.ZIP_BZIP2, (), "compressed archive"),
        (zipfile.ZIP_STORED, ("data.pkl",), "two records of one name"),
        (zipfile.ZIP_STORED, ("data/3",), "two records of one name"),
    ],
)
def test_an_archive_whose_bytes_are_not_the_weights_is_refused(compression, twice, words, checkpoint):
    """Mapped into memory, compressed bytes would be taken for weights: no checksum tells."""
    rewritten(checkpoint, compression, twice)
    with pytest.raises(CheckpointRejected, match=words):
        checkpoint_from_path(checkpoint)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_record_that_is_marked_as_a_folder_is_refused(name, state, tmp_path):
    """In its place torch reads memory that nobody has written; no checksum tells."""
    torch.save(state, tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    record = weight_records(tmp_path / name)[-1]
    entry = content.rindex(record.encode()) - 46  # in the archive's directory
    assert content[entry:][:4] == b"PK\1\2"
    content[entry + 38] |= 0x10
    (tmp_path / name).write_bytes(content)
    check_archive(tmp_path / name)
    with pytest.raises(CheckpointRejected, match=f"damaged archive \\({record} is marked as a folder"):
        checkpoint_from_path(tmp_path / name)


DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16,
)  # fmt: skip


@pytest.mark.parametrize("longer", [-1, 0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_storage_that_is_not_as_long_as_its_record_is_refused(dtype, longer, tmp_path):
    """Mapped into memory, it would go on into the weights that come next; no checksum tells."""
    path = tmp_path / "model.pt"
    torch.save({"stage0.counter": torch.ones(1).to(dtype), "stage0.weight": torch.ones(2, 3)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    first = records["model/data/0"]
    assert len(first) == dtype.itemsize
    records["model/data/0"] = first + first if longer > 0 else first[: len(first) + longer]
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    check_archive(path)
    if longer == 0:
        assert checkpoint_from_path(path).tensors["stage0.counter"].dtype == dtype
        return
    length = len(records["model/data/0"])
    with pytest.raises(CheckpointRejected, match=rf"damaged \(data/0 has {length} bytes, not {dtype.itemsize}\)"):
        checkpoint_from_path(path)


def test_a_storage_whose_record_is_called_otherwise_is_refused(tmp_path):
    """Behind a zero byte torch does not read a name on, and takes another record."""
    path = tmp_path / "model.pt"
    torch.save({"stage0.weight": torch.ones(2, 3), "stage1.weight": torch.zeros(2, 3)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    second = b"X\x01\x00\x00\x001"
    assert records["model/data.pkl"].count(second) == 1
    records["model/data.pkl"] = records["model/data.pkl"].replace(second, b"X\x02\x00\x00\x000\x00")
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    assert not torch.load(path, weights_only=True, mmap=True)["stage1.weight"].eq(0).any()
    with pytest.raises(CheckpointRejected, match=r"damaged .*has no bytes, not 24"):
        checkpoint_from_path(path)


def test_a_storage_of_nothing_is_as_long_as_its_record(tmp_path):
    torch.save({"stage0.weight": torch.ones(2, 3), "stage0.mask": torch.zeros(0)}, tmp_path / "model.pt")
    assert checkpoint_from_path(tmp_path / "model.pt").tensors["stage0.mask"].shape == (0,)


@pytest.mark.parametrize("offset", [0, 3, 8])
def test_a_record_whose_name_is_no_text_is_refused(offset, checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[7] |= 0x08  # the name is UTF-8
    at = content.index(b"model/data.pkl") + offset
    content[at] = 0xFF
    checkpoint.write_bytes(content)
    with pytest.raises(CheckpointRejected, match=r"model\.pt: .* copy"):
        checkpoint_from_path(checkpoint)


def test_a_checkpoint_inside_a_zip_is_refused_with_what_to_do(checkpoint, tmp_path):
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(checkpoint, checkpoint.name)
    with pytest.raises(CheckpointRejected, match=r"compressed archive \(model\.pt\).*unpack"):
        checkpoint_from_path(tmp_path / "packed.pt")


# Branches win


@pytest.mark.parametrize("naming", ["official", "timm", "mmpretrain"])
def test_branches_win_over_a_fused_kernel_beside_them(naming, small, golden, state, saved):
    fused = {name: torch.randn_like(t) for name, t in deployed_state(small).items() if "rbr_reparam" in name}
    saved(renamed({**state, **fused}, naming), "both.pt")
    images, outputs = golden("both.pt")
    assert relative(outputs, small.answer(torch.from_numpy(images)).numpy()) < 1e-12


def test_without_branches_the_fused_kernel_is_what_counts(small, golden, saved):
    state = deployed_state(small)
    saved({name: torch.randn_like(t) if "rbr_reparam" in name else t for name, t in state.items()}, "random.pt")
    saved(state, "deployed.pt")
    images, outputs = golden("random.pt")
    answer = small.answer(torch.from_numpy(images)).numpy()
    assert relative(outputs, answer) > 1e-2
    assert relative(golden("deployed.pt")[1], answer) < 1e-6
