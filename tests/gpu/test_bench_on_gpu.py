"""For owners of a GPU: what the benchmark says of it hangs together, and a receipt of it can be replayed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engines.bench import Options, bench
from engines.bench.contenders import ON_DEVICE
from engines.cli import main

SHORT = Options(batches=(2, 16), duration=1.0)


def test_every_way_is_measured_and_computes_the_network(engine):
    record = bench([engine.path], SHORT)
    assert record.failures == []
    assert record.files[0].parity.passed is True
    found = [(row.batch, row.way) for row in record.rows]
    assert found == [(batch, way.title) for batch in SHORT.batches for way in ON_DEVICE]
    for row in record.rows:
        assert 0 < sum(row.parts_ms.values()) <= row.latency_ms[50].value * 1.5
        assert row.latency_ms[50].value <= row.latency_ms[90].value
        assert row.first_seconds * 1e3 > row.parts_ms["compute"]


def test_wrong_answers_are_noticed_while_they_are_timed(engine, tmp_path):
    golden = dict(np.load(engine.path.with_name("golden.npz")))
    golden["output"] = golden["output"][::-1]
    for path in engine.path.parent.glob(f"{engine.path.stem}*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    np.savez(tmp_path / "golden.npz", **golden)
    record = bench([tmp_path / engine.path.name], SHORT)
    assert record.files[0].parity.passed is False
    assert record.verdict.startswith("FAIL")


def test_the_card_tells_of_itself(engine):
    pytest.importorskip("pynvml")
    record = bench([engine.path], SHORT)
    assert record.machine["gpu"]
    for row in record.rows:
        assert row.telemetry["sm_clock_mhz"] > 0
        assert row.telemetry["joules_per_image"] is None or row.telemetry["joules_per_image"] > 0
        assert row.bound is None or row.bound.percent > 0


def test_a_receipt_of_this_machine_can_be_replayed(engine, tmp_path, capsys):
    out = tmp_path / "receipt.json"
    assert main(["receipt", str(engine.path.parent), "--batch", "2", "--duration", "1", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["ran_on_gpu"] is True
    assert main(["replay", str(out), "--against", str(engine.path.parent)]) == 0
    assert "the receipt is consistent; it says: PASS" in capsys.readouterr().out
