"""The published schemas against what is written: what they let through and stop, and that no field is missing."""

from __future__ import annotations

import copy
import dataclasses
import importlib.resources
import json

import jsonschema
import pytest
from hypothesis import given, settings

import exporter
from engines.audit import Audit
from engines.errors import InputRejected
from engines.manifest import Manifest, manifest_from_json
from engines.parity import GATES, Comparison, Flip
from engines.sdk import SDKS
from exporter.architecture import IN_CHANNELS
from exporter.errors import VerificationFailed
from exporter.lineages.lineage import BRANCH_TENSORS
from exporter.plain import Certificate
from exporter.proposals import Proposal
from exporter.quantization.calibration_file import Binding, CalibrationFile, FormCalibration, calibration_from_json
from exporter.quantization.form import FORMS
from exporter.quantization.ranges import METHODS
from exporter.report import (
    AccuracyRow,
    Check,
    EngineRecord,
    FileRecord,
    Headroom,
    HeadroomRow,
    LayerRow,
    LedgerRow,
    QuantizationRecord,
    QuantizedLayerRow,
    Report,
)
from exporter.request import PRECISION_NAMES, WEIGHTS
from exporter.witness import CLEAR, SUSPICIOUS, UNAVAILABLE, WRONG, BlockAgreement, LayerWitness, Witness
from tests.conftest import EXAMPLES, ROOT
from tests.reports import AUDIT, CALIBRATED, DIGEST, PASSING, REPORT, reports

SCHEMA = json.loads((ROOT / "exporter" / "report" / "report.schema.json").read_text(encoding="utf-8"))
SIDECAR = json.loads((ROOT / "engines" / "sidecar.schema.json").read_text(encoding="utf-8"))
CALIBRATION = json.loads((ROOT / "exporter" / "quantization" / "calibration.schema.json").read_text(encoding="utf-8"))
SCHEMAS = {"report": SCHEMA, "sidecar": SIDECAR, "calibration": CALIBRATION}
ASSUMPTIONS = REPORT.assumptions
MANIFEST = Manifest(
    name="model.fp16.engine",
    precision="fp16",
    sha256={"checkpoint": DIGEST, "onnx": DIGEST, "engine": DIGEST},
    sdk={"name": "tensorrt_rtx", "version": "1.7.1.116"},
    compute_capabilities=(86,),
    inputs=({"name": "input", "dtype": "float32", "shape": ["N", 3, 224, 224]},),
    outputs=({"name": "output", "dtype": "float32", "shape": ["N", 1000]},),
    profile={"input": ((1, 3, 224, 224), (8, 3, 224, 224), (32, 3, 224, 224))},
    preprocessing={"mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0), "size": (224, 224), "channels": 3},
    assumptions=ASSUMPTIONS,
    tolerance=5e-3,
    audit=AUDIT,
    golden="golden.npz",
)
DOCUMENTS = {
    "report": json.loads(REPORT.to_json()),
    "sidecar": json.loads(MANIFEST.to_json()),
    "calibration": json.loads(CALIBRATED.to_json()),
}
OPEN = {("gates",), ("versions",), ("layers", "errors"), ("engines", "kept_in_float32"), ("profile",)}
OPEN |= {(*where, "audit", name) for where in (("engines",), ()) for name in ("by_dtype", "int8_outputs")}
OPEN |= {("quantization", "kept")}
OPEN |= {("binding", name) for name in ("preprocessing", "network", "method")}
OPEN |= {("forms", name) for name in ("factors", "ranges", "methods", "weight_scales")}
"""Objects whose keys are names of the user's files and packages."""
OPTIONAL = {"Assumptions": {"features", "weights", "resize"}, "Preprocessing": {"resize"}}
"""Fields that are there only where they were given, by the title of the object that they are in."""


def problems(document, schema=SCHEMA):
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def places(value, path=()):
    """The path of every value inside a document; of a list, its first item stands for all."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def named(path):
    return tuple(key for key in path if isinstance(key, str))


def parent_of(document, path):
    for key in path[:-1]:
        document = document[key]
    return document


PLACES = [(name, path) for name, document in DOCUMENTS.items() for path in places(document)]
FIELDS = [(name, path) for name, path in PLACES if isinstance(path[-1], str) and named(path)[:-1] not in OPEN]


def ids(value):
    return value if isinstance(value, str) else ".".join(map(str, value))


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_the_schema_is_one(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    with pytest.raises(jsonschema.SchemaError):
        jsonschema.Draft202012Validator.check_schema({**schema, "required": "everything"})


def objects(node):
    """Every subschema that has properties."""
    if isinstance(node, dict):
        if "properties" in node and isinstance(node["properties"], dict) and "required" in node:
            yield node
        for inner in node.values():
            yield from objects(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from objects(inner)


@pytest.mark.parametrize(("name", "least"), [("report", 20), ("sidecar", 7), ("calibration", 3)])
def test_every_field_is_described_and_required_and_no_other_is_let_in(name, least):
    schema = SCHEMAS[name]
    found = list(objects(schema))
    assert len(found) >= least
    for node in found:
        assert node["additionalProperties"] is False, node["title"]
        optional = OPTIONAL.get(node["title"], set())
        assert set(node["required"]) == set(node["properties"]) - optional, node["title"]
        for key, field in node["properties"].items():
            target = {**schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {}), **field}
            assert target["title"], key
            assert target["description"].endswith("."), key


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_with_one_of_everything_is_valid(name):
    assert problems(DOCUMENTS[name], SCHEMAS[name]) == []


def test_what_the_reader_of_sidecars_takes_is_what_the_schema_does():
    text = MANIFEST.to_json()
    assert manifest_from_json(text, "a sidecar").name == MANIFEST.name
    for path, value in WRONG_SIDECARS.values():
        changed = json.loads(text)
        parent_of(changed, path)[path[-1]] = value
        with pytest.raises(InputRejected, match="damaged or was edited"):
            manifest_from_json(json.dumps(changed), "a sidecar")


def test_what_the_reader_of_calibrations_takes_is_what_the_schema_does():
    assert calibration_from_json(CALIBRATED.to_json(), "a calibration") == CALIBRATED
    for path, value in WRONG_CALIBRATIONS.values():
        changed = json.loads(CALIBRATED.to_json())
        parent_of(changed, path)[path[-1]] = value
        with pytest.raises(InputRejected, match="damaged or was edited"):
            calibration_from_json(json.dumps(changed), "a calibration")


def test_the_report_of_a_run_is_valid_and_so_is_its_sidecar(tmp_path):
    report = exporter.export(EXAMPLES / "fashion.pt", tmp_path, size=28, trt=["fp16"])
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] is True
    assert len(written["files"]) == len(report.files)
    assert problems(written) == []
    sidecar = json.loads((tmp_path / "fashion.fp16.engine.json").read_text())
    assert sidecar["precision"] == "fp16"
    assert problems(sidecar, SIDECAR) == []


def test_the_report_of_a_run_with_images_labels_and_layers_is_valid(tmp_path):
    images = EXAMPLES / "fashion_calibration.npz"
    report = exporter.export(EXAMPLES / "fashion.pt", tmp_path, size=28, calibration=images, labels=images, layers=True)
    written = json.loads((tmp_path / "report.json").read_text())
    assert (report.witness is None, len(report.accuracy), len(report.layers)) == (False, 1, 12)
    assert problems(written) == []


def test_the_report_and_sidecar_of_feature_maps_of_any_size_are_valid(tmp_path):
    exporter.export(EXAMPLES / "fashion.pt", tmp_path, size="24:28:40", features=(1, 2), trt=["fp16"])
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["architecture"]["classes"], written["architecture"]["features"]) == (None, [1, 2])
    assert written["assumptions"]["size"] == "24x24:28x28:40x40"
    assert problems(written) == []
    assert problems(json.loads((tmp_path / "fashion.fp16.engine.json").read_text()), SIDECAR) == []


def test_the_report_of_a_rejected_run_is_valid(tmp_path, monkeypatch):
    from exporter import pipeline

    monkeypatch.setattr(pipeline, "plain_from_repvgg", _zeroed(pipeline.plain_from_repvgg))
    with pytest.raises(VerificationFailed):
        exporter.export(EXAMPLES / "fashion.pt", tmp_path, size=28)
    written = json.loads((tmp_path / "report.json.rejected").read_text())
    assert written["passed"] is False
    assert problems(written) == []


def _zeroed(right):
    def wrong(*arguments, **options):
        plain = right(*arguments, **options)
        tensors = {name: tensor * 0 for name, tensor in plain.tensors.items()}
        return dataclasses.replace(plain, tensors=tensors)

    return wrong


@settings(max_examples=60, deadline=None)
@given(reports)
def test_any_report_is_valid(report):
    document = json.loads(report.to_json(), parse_constant=_no_constant)
    assert problems(document) == []
    assert document["passed"] is report.passed


def _no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_nan_and_infinity_become_null():
    comparison = dataclasses.replace(REPORT.ledger[0].comparison, relative_error=float("nan"), sqnr_db=float("inf"))
    row = dataclasses.replace(REPORT.ledger[0], comparison=comparison, added=float("-inf"))
    document = json.loads(dataclasses.replace(REPORT, ledger=(row,)).to_json(), parse_constant=_no_constant)
    assert document["ledger"][0]["comparison"]["relative_error"] is None
    assert document["ledger"][0]["comparison"]["sqnr_db"] is None
    assert document["ledger"][0]["added"] is None
    assert problems(document) == []


def test_there_are_many_fields():
    assert len(FIELDS) >= 130


@pytest.mark.parametrize(("name", "path"), FIELDS, ids=ids)
def test_a_field_that_is_removed_or_renamed_is_seen(name, path):
    removed = copy.deepcopy(DOCUMENTS[name])
    value = parent_of(removed, path).pop(path[-1])
    assert problems(removed, SCHEMAS[name])
    renamed = copy.deepcopy(removed)
    parent_of(renamed, path)[f"{path[-1]}s"] = value
    assert problems(renamed, SCHEMAS[name])
    added = copy.deepcopy(DOCUMENTS[name])
    parent_of(added, path)[f"{path[-1]}s"] = value
    assert problems(added, SCHEMAS[name])


@pytest.mark.parametrize(("name", "path"), PLACES, ids=ids)
def test_a_value_of_another_type_is_seen(name, path):
    for other in ([["?"]], {"?": {"?": ["?"]}}, True if not _is_bool(DOCUMENTS[name], path) else "true"):
        changed = copy.deepcopy(DOCUMENTS[name])
        parent_of(changed, path)[path[-1]] = other
        assert problems(changed, SCHEMAS[name]), other


def _is_bool(document, path):
    value = parent_of(document, path)[path[-1]]
    return isinstance(value, bool) or path[-1] == "passed"


WRONG_VALUES = {
    "another schema": (("schema",), 2),
    "a verdict of another form": (("verdict",), "fine"),
    "passed as a number": (("checks", 0, "passed"), 1),
    "a hash in capitals": (("checkpoint", "sha256"), DIGEST.upper()),
    "a short hash": (("files", 0, "sha256"), DIGEST[:-1]),
    "an unknown form": (("checkpoint", "form"), "fused"),
    "an unknown precision": (("engines", 0, "precision"), "int4"),
    "a gate of an unknown precision": (("gates", "fp8"), 1e-3),
    "an unknown SDK": (("engines", 0, "sdk"), "trt"),
    "accuracy of an unknown form": (("accuracy", 0, "precision"), "int8.trt"),
    "an unknown form of INT8": (("quantization", 0, "form"), "fp16"),
    "an unknown effort": (("quantization", 0, "effort"), "low"),
    "weights of 1 bit": (("quantization", 0, "weight_bits"), 1),
    "activations of 16 bits": (("quantization", 0, "activation_bits"), 16),
    "no calibration images": (("quantization", 0, "images"), 0),
    "decibels in words": (("quantization", 0, "sqnr_db"), "inf"),
    "an agreement of 2": (("quantization", 0, "agreement"), 2.0),
    "negative seconds": (("quantization", 0, "seconds"), -1.0),
    "a range chosen by chance": (("quantization", 0, "layers", 0, "method"), "random"),
    "more clipped than there is": (("quantization", 0, "layers", 0, "clipped"), 1.5),
    "an agreement above 1": (("accuracy", 0, "agreement"), 99.0),
    "a negative count": (("ledger", 0, "comparison", "non_finite"), -1),
    "half a row": (("ledger", 0, "comparison", "rows"), 1.5),
    "no rows": (("ledger", 0, "comparison", "rows"), 0),
    "an unknown verdict of the witness": (("witness", "verdict"), "fine"),
    "a witness of nothing": (("witness",), {}),
    "stride 3": (("architecture", "stage_strides", 0), 3),
}


WRONG_SIDECARS = {
    "a tolerance that lets zeros pass": (("tolerance",), 1.0),
    "no tolerance": (("tolerance",), 0.0),
    "an audit with a problem": (("audit", "problems"), ["conv0: its weights do not stand in the engine bit for bit"]),
    "a shape of no size": (("inputs", 0, "shape", 3), 0),
    "another name for the batch": (("inputs", 0, "shape", 0), "batch size"),
    "two shapes of a profile": (("profile", "input"), [[1, 3, 8, 8], [8, 3, 8, 8]]),
    "no outputs": (("outputs",), []),
    "a standard deviation of 0": (("preprocessing", "std"), [1.0, 0.0, 1.0]),
    "two channels": (("preprocessing", "channels"), 2),
    "an unknown SDK": (("sdk", "name"), "openvino"),
    "no name of the golden vectors": (("golden",), ""),
}
WRONG_CALIBRATIONS = {
    "another schema of calibration": (("schema",), 2),
    "no form": (("forms",), []),
    "an unknown form of calibration": (("forms", 0, "form"), "fp16"),
    "a hash of other digits": (("binding", "checkpoint"), "g" * 64),
    "a short hash of images": (("binding", "data"), DIGEST[1:]),
    "no images": (("binding", "images"), 0),
    "an empty text": (("binding", "network", "eps"), ""),
    "a name without letters": (("binding", "method", ""), "x"),
    "factors without equalization": (("forms", 0, "equalized"), False),
    "a factor of 0": (("forms", 0, "factors", "stage0.0/Conv", 0), 0.0),
    "a negative range": (("forms", 0, "ranges", "head/Gemm"), -1.0),
    "an unknown method": (("forms", 0, "methods", "head/Gemm"), "entropy"),
    "a weight without scales": (("forms", 0, "weight_scales", "head/Gemm"), []),
    "a scale in words": (("forms", 0, "weight_scales", "head/Gemm", 0), "1"),
}
IMPOSSIBLE = [("report", *wrong) for wrong in WRONG_VALUES.values()]
IMPOSSIBLE += [("sidecar", *wrong) for wrong in WRONG_SIDECARS.values()]
IMPOSSIBLE += [("calibration", *wrong) for wrong in WRONG_CALIBRATIONS.values()]


@pytest.mark.parametrize(
    ("name", "path", "value"), IMPOSSIBLE, ids=[*WRONG_VALUES, *WRONG_SIDECARS, *WRONG_CALIBRATIONS]
)
def test_a_value_that_cannot_be_is_seen(name, path, value):
    changed = copy.deepcopy(DOCUMENTS[name])
    parent_of(changed, path)[path[-1]] = value
    assert len(problems(changed, SCHEMAS[name])) == 1


COMPUTED = {"schema", "passed", "verdict"}
DATACLASSES = [
    (Check, SCHEMA["$defs"]["check"], set()),
    (LedgerRow, SCHEMA["$defs"]["ledgerRow"], set()),
    (Comparison, SCHEMA["$defs"]["comparison"], set()),
    (Flip, SCHEMA["$defs"]["flip"], set()),
    (LayerRow, SCHEMA["$defs"]["layerRow"], set()),
    (AccuracyRow, SCHEMA["$defs"]["accuracyRow"], set()),
    (Headroom, SCHEMA["$defs"]["headroom"], set()),
    (HeadroomRow, SCHEMA["$defs"]["headroomRow"], set()),
    (QuantizationRecord, SCHEMA["$defs"]["quantization"], set()),
    (QuantizedLayerRow, SCHEMA["$defs"]["quantizedLayer"], set()),
    (EngineRecord, SCHEMA["$defs"]["engine"], set()),
    (FileRecord, SCHEMA["$defs"]["file"], set()),
    (Certificate, SCHEMA["$defs"]["certificate"], set()),
    (Audit, SCHEMA["$defs"]["audit"], {"line"}),
    (Audit, SIDECAR["properties"]["audit"], {"line"}),
    (Witness, SCHEMA["$defs"]["witness"], {"proposal"}),
    (Proposal, SCHEMA["$defs"]["proposal"], set()),
    (LayerWitness, SCHEMA["$defs"]["layerWitness"], {"excess_drift", "excess_spread"}),
    (BlockAgreement, SCHEMA["$defs"]["blockAgreement"], set()),
    (Report, SCHEMA, COMPUTED),
    (Manifest, SIDECAR, {"schema"}),
    (CalibrationFile, CALIBRATION, set()),
    (Binding, CALIBRATION["$defs"]["binding"], set()),
    (FormCalibration, CALIBRATION["$defs"]["form"], set()),
]


@pytest.mark.parametrize(("record", "node", "more"), DATACLASSES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_fields_are_those_of_the_dataclass(record, node, more):
    assert set(node["properties"]) == {field.name for field in dataclasses.fields(record)} | more


def test_a_field_that_the_schema_does_not_know_would_be_seen():
    wider = dataclasses.make_dataclass("Wider", ["later"], bases=(Flip,), frozen=True)
    flip = wider(0, 1.0, "now")
    comparison = dataclasses.replace(REPORT.ledger[0].comparison, flips=(flip,))
    row = dataclasses.replace(REPORT.ledger[0], comparison=comparison)
    found = problems(json.loads(dataclasses.replace(REPORT, ledger=(row,)).to_json()))
    assert found == ["Additional properties are not allowed ('later' was unexpected)"]


def test_the_closed_choices_are_those_of_the_code():
    definitions = SCHEMA["$defs"]
    assert definitions["precision"]["enum"] == list(PRECISION_NAMES) == list(GATES)
    assert SIDECAR["properties"]["precision"]["enum"] == list(PRECISION_NAMES)
    forms = [form.name for form in FORMS]
    assert definitions["form"]["enum"] == CALIBRATION["$defs"]["form"]["properties"]["form"]["enum"] == forms
    assert definitions["accuracyRow"]["properties"]["precision"]["enum"] == list(
        dict.fromkeys([*PRECISION_NAMES, *forms])
    )
    assert definitions["quantizedLayer"]["properties"]["method"]["enum"] == list(METHODS)
    assert CALIBRATION["$defs"]["form"]["properties"]["methods"]["additionalProperties"]["enum"] == list(METHODS)
    assert definitions["engine"]["properties"]["sdk"]["enum"] == [sdk.module for sdk in SDKS]
    assert SIDECAR["properties"]["sdk"]["properties"]["name"]["enum"] == [sdk.module for sdk in SDKS]
    assert definitions["witness"]["properties"]["verdict"]["enum"] == [CLEAR, SUSPICIOUS, WRONG, UNAVAILABLE]
    assert definitions["architecture"]["properties"]["in_channels"]["enum"] == list(IN_CHANNELS)
    assert definitions["certificate"]["properties"]["branches"]["items"]["enum"] == [*BRANCH_TENSORS, "fused"]
    assert definitions["checkpoint"]["properties"]["weights"]["enum"] == [*WEIGHTS, None]
    assert definitions["assumptions"]["properties"]["weights"]["enum"] == list(WEIGHTS)


@pytest.mark.parametrize(
    ("package", "name"),
    [("exporter.report", "report"), ("engines", "sidecar"), ("exporter.quantization", "calibration")],
)
def test_the_schema_is_in_the_package(package, name):
    import tomllib

    text = (importlib.resources.files(package) / f"{name}.schema.json").read_text(encoding="utf-8")
    assert json.loads(text)["$id"] == f"urn:repvgg-exporter:{name}:1"
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    top = package.partition(".")[0]
    assert any(f"{name}.schema.json" in pattern for pattern in listed[top])


def test_a_passing_report_says_so():
    assert json.loads(PASSING.to_json())["verdict"] == "PASS: 1 of 1 checks hold"
    assert DOCUMENTS["report"]["verdict"] == "FAIL: 1 of 2 checks hold, 1 not run"
