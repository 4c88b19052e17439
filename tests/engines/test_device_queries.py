"""Queries on a GPU, over the fakes: the figures are those that the fakes were told, and nothing is left behind.

Nothing here ran on a GPU; time is pretended (``tests.engines.fake_cuda``).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engines.runner
from engines.backends import device_queries
from engines.backends import tensorrt as backend_module
from engines.backends.device_queries import DeviceQueries
from engines.errors import DeviceFailed, UsageError
from tests.engines.fake_cuda import ERROR, Costs
from tests.engines.fake_machine import CLASSES, SIZE, assert_answers, calls_of, failure_of, fake_machine, images
from tests.engines.fake_tensorrt import EngineState
from tests.engines.sdk_bindings import FULL, RTX, VERSIONS

ROW_IN, ROW_OUT = 3 * SIZE * SIZE * 4, (CLASSES + 4) * 4  # bytes
ENGINE = (0.010, 0.001)  # seconds for a batch, and for each image
COSTS = Costs(to_device=1e-6, to_host=4e-6, launches=2e-3, graph_launch=5e-4)
WAYS = [(graph, transfers) for graph in (False, True) for transfers in (False, True)]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """TensorRT for RTX, where things take their time; nothing may be left at the end."""
    made = fake_machine(monkeypatch, tmp_path)
    made.cuda.costs = Costs(**vars(COSTS))
    yield made
    made.assert_nothing_left()


@contextlib.contextmanager
def opened(machine, path=None, **options):
    """The runner, and its backend."""
    with engines.runner.load(path or machine.engine(seconds=ENGINE), **options) as runner:
        yield runner, runner._backend


def asked(machine, backend, rows=4, seed=0, *, graph=False, transfers=True):
    return backend.queries({"input": images(rows, seed)}, graph=graph, transfers=transfers, clock=machine.cuda.clock)


def told(rows, *, graph):
    """The seconds of h2d, compute and d2h that the fake was told."""
    return (
        rows * ROW_IN * COSTS.to_device,
        ENGINE[0] + rows * ENGINE[1] + (COSTS.graph_launch if graph else COSTS.launches),
        rows * ROW_OUT * COSTS.to_host,
    )


# --- the figures


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize(("graph", "transfers"), WAYS)
def test_the_figures_are_those_that_the_gpu_was_told(machine, graph, transfers, rows, count):
    with opened(machine) as (_, backend):
        queries = asked(machine, backend, rows, graph=graph, transfers=transfers)
        assert queries.graphed == graph
        timing = queries.run(count)
        assert_answers(queries.results(), images(rows))
    h2d, compute, d2h = told(rows, graph=graph)
    latency = h2d + compute + d2h if transfers else compute
    expected = {"h2d": h2d, "compute": compute, "d2h": d2h} if transfers else {"compute": compute}
    assert timing.latencies.dtype == np.float64
    np.testing.assert_allclose(timing.latencies, [latency] * count, rtol=1e-6)
    assert list(timing.parts) == list(expected)
    for name, seconds in expected.items():
        np.testing.assert_allclose(timing.parts[name], [seconds] * count, rtol=1e-6)
    assert timing.wall == pytest.approx(count * latency, rel=1e-9)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_graph_and_launches_differ_by_what_the_gpu_was_told(monkeypatch, tmp_path, version):
    machine = fake_machine(monkeypatch, tmp_path, version)
    machine.cuda.costs = Costs(**vars(COSTS))
    with opened(machine) as (_, backend):
        plain, recorded = (asked(machine, backend, graph=graph).run(4) for graph in (False, True))
    machine.assert_nothing_left()
    saved = plain.parts["compute"] - recorded.parts["compute"]
    np.testing.assert_allclose(saved, COSTS.launches - COSTS.graph_launch, rtol=1e-5)
    for name in ("h2d", "d2h"):
        np.testing.assert_allclose(plain.parts[name], recorded.parts[name], rtol=1e-6)


def test_what_the_host_takes_to_launch_counts_in_the_first_query_alone(machine):
    """The device finds the next query waiting."""
    h2d, compute, d2h = told(4, graph=False)
    launch = h2d + 0.004  # later than the copy's end, and shorter than a query
    with opened(machine) as (_, backend):
        queries = asked(machine, backend)
        machine.cuda.costs.calls = {"execute_async_v3": launch}
        timing = queries.run(6)
    np.testing.assert_allclose(timing.latencies, [launch + compute + d2h, *[h2d + compute + d2h] * 5], rtol=1e-6)
    np.testing.assert_allclose(timing.parts["h2d"], h2d, rtol=1e-6)
    assert timing.wall == pytest.approx(launch + compute + d2h + 5 * (h2d + compute + d2h), rel=1e-9)


def test_with_one_query_at_a_time_each_would_wait_for_its_launch(machine, monkeypatch):
    """The negative twin of two in flight."""
    monkeypatch.setattr(device_queries, "IN_FLIGHT", 1)
    h2d, compute, d2h = told(4, graph=False)
    launch = h2d + 0.004
    with opened(machine) as (_, backend):
        queries = asked(machine, backend)
        machine.cuda.costs.calls = {"execute_async_v3": launch}
        timing = queries.run(6)
    np.testing.assert_allclose(timing.latencies, launch + compute + d2h, rtol=1e-6)
    assert timing.wall == pytest.approx(6 * (launch + compute + d2h), rel=1e-9)


def test_a_host_that_is_slower_than_the_device_is_seen_in_the_latencies_and_the_time_of_all(machine):
    h2d, compute, d2h = told(4, graph=False)
    launch = 0.1
    with opened(machine) as (_, backend):
        queries = asked(machine, backend)
        machine.cuda.costs.calls = {"execute_async_v3": launch}
        timing = queries.run(5)
    assert timing.wall == pytest.approx(5 * launch + compute + d2h, rel=1e-9)
    assert timing.wall > 5 * (h2d + compute + d2h)
    np.testing.assert_allclose(timing.parts["compute"][1:], launch - h2d + compute, rtol=0.2)


def test_what_was_enqueued_by_others_is_no_part_of_the_time(machine):
    stream = machine.cuda.new_stream()
    feeds = images(4, 5)
    outputs = np.zeros((4, CLASSES), np.float32), np.zeros((4, 4), np.float32)
    places = [machine.cuda.device_array(array) for array in (feeds, *outputs)]
    arrays = dict(zip(("input", "output", "features"), map(Interface, places, (feeds, *outputs)), strict=True))
    with opened(machine) as (runner, backend):
        queries = asked(machine, backend, transfers=False)
        runner.enqueue({"input": arrays.pop("input")}, arrays, stream)
        timing = queries.run(3)
        assert timing.wall == pytest.approx(3 * told(4, graph=False)[1], rel=1e-9)
        assert machine.cuda.streams[stream].queue == []
        found = machine.cuda.host_array(places[1], np.float32, (4, CLASSES))
        assert_answers({"output": found, "features": machine.cuda.host_array(places[2], np.float32, (4, 4))}, feeds)
        runner.enqueue({"input": Interface(places[0], feeds)}, arrays, stream)
        another = asked(machine, backend, 2, transfers=False)
        assert_answers({"output": found, "features": machine.cuda.host_array(places[2], np.float32, (4, 4))}, feeds)
        another.run(1)
    for place in places:
        machine.cuda._cudaFree(place)
    machine.cuda._cudaStreamDestroy(stream)


class Interface:
    def __init__(self, address, array):
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": array.shape, "typestr": "<f4", "version": 3, "strides": None,
            "stream": None,
        }  # fmt: skip


def test_two_streams_at_the_same_activations_would_be_seen(machine, monkeypatch):
    """The negative twin: with the waiting left out, the fake notes it."""
    stream = machine.cuda.new_stream()
    feeds = images(4)
    outputs = np.zeros((4, CLASSES), np.float32), np.zeros((4, 4), np.float32)
    places = [machine.cuda.device_array(array) for array in (feeds, *outputs)]
    arrays = dict(zip(("input", "output", "features"), map(Interface, places, (feeds, *outputs)), strict=True))
    with opened(machine) as (runner, backend):
        queries = asked(machine, backend)
        monkeypatch.setattr(backend._done, "hold_back", lambda stream: None)
        runner.enqueue({"input": arrays.pop("input")}, arrays, stream)
        queries.run(1)
        machine.cuda._cudaStreamSynchronize(stream)
    assert any("two streams use the memory" in violation for violation in machine.journal.violations)
    machine.journal.violations.clear()
    for place in places:
        machine.cuda._cudaFree(place)
    machine.cuda._cudaStreamDestroy(stream)


def test_leaving_out_the_wait_for_a_query_would_be_seen(machine, monkeypatch):
    """The negative twin of waiting: the real runtime has no time to tell then, nor has the fake."""
    with opened(machine) as (_, backend):
        queries = asked(machine, backend)
        monkeypatch.setattr(device_queries.TimingEvent, "synchronize", lambda event: None)
        with pytest.raises(DeviceFailed, match="cudaEventElapsedTime failed: cudaErrorNotReady"):
            queries.run(3)
        monkeypatch.undo()
        assert len(queries.run(3).latencies) == 3


def test_queries_never_overlap_and_their_parts_are_their_latency(machine):
    seconds = st.integers(0, 50_000).map(lambda microseconds: microseconds * 1e-6)
    of_a_byte = st.integers(0, 10_000).map(lambda nanoseconds: nanoseconds * 1e-9)
    calls = st.dictionaries(
        st.sampled_from(["cudaEventRecord", "cudaMemcpyAsync", "execute_async_v3", "cudaEventSynchronize"]), seconds
    )
    close = {"rtol": 1e-6, "atol": 1e-8}

    with opened(machine) as (_, backend):
        queries = asked(machine, backend)

        @settings(max_examples=40, deadline=None)
        @given(of_a_byte, of_a_byte, seconds, calls, st.integers(1, 9))
        def holds(to_device, to_host, launches, calls, count):
            machine.cuda.costs = Costs(to_device, to_host, launches, 0.0, calls)
            timing = queries.run(count)
            engine = ENGINE[0] + 4 * ENGINE[1] + launches
            least = {"h2d": 4 * ROW_IN * to_device, "compute": engine, "d2h": 4 * ROW_OUT * to_host}
            for name, found in timing.parts.items():
                assert found.shape == (count,)
                np.testing.assert_allclose(np.minimum(found, least[name]), least[name], **close)
            np.testing.assert_allclose(sum(timing.parts.values()), timing.latencies, **close)
            gaps = timing.wall - timing.latencies.sum()
            assert gaps >= -1e-6
            if not any(calls.values()):
                assert gaps == pytest.approx(0.0, abs=1e-6)

        holds()


# --- what is enqueued


@pytest.mark.parametrize(("graph", "transfers"), WAYS)
def test_a_query_is_events_copies_and_one_launch(machine, graph, transfers):
    with opened(machine) as (_, backend):
        queries = asked(machine, backend, graph=graph, transfers=transfers)
        before = len(machine.names)
        queries.run(1)
        names = machine.names[before:]
    launch = ["cudaGraphLaunch"] if graph else ["execute_async_v3"]
    mark, copy = ["cudaEventRecord"], ["cudaMemcpyAsync"]
    work = mark + copy + mark + launch + mark + copy * 2 + mark if transfers else mark + launch + mark
    settling, ending = ["cudaStreamSynchronize"], ["cudaStreamSynchronize"]
    elapsed = ["cudaEventElapsedTime"] * (4 if transfers else 2)
    assert names == ["cudaGetDevice", "cudaSetDevice", *settling, *work, *ending, *elapsed]


@pytest.mark.parametrize(("graph", "name"), [(False, "execute_async_v3"), (True, "cudaGraphLaunch")])
def test_the_first_launch_is_made_before_anything_is_timed(machine, graph, name):
    """It does more than the later ones: kernels are chosen, a graph is brought to the device."""
    with opened(machine, graph=False) as (_, backend):
        queries = asked(machine, backend, graph=graph)
        assert machine.names.count(name) == (1 if graph else 2)
        before = len(machine.names)
        queries.run(3)
        assert machine.names[before:].count(name) == 3
        assert set(machine.names[before:]) <= {
            "cudaGetDevice", "cudaSetDevice", "cudaStreamSynchronize", "cudaEventRecord", "cudaEventSynchronize",
            "cudaEventElapsedTime", "cudaMemcpyAsync", name,
        }  # fmt: skip


@pytest.mark.parametrize(("graph", "transfers"), WAYS)
def test_the_first_run_is_timed_apart_with_its_context_and_no_other_run(machine, graph, transfers):
    with opened(machine) as (_, backend):
        machine.cuda.costs.calls = {"create_execution_context": 0.3, "cudaGraphInstantiate": 5.0}
        queries = asked(machine, backend, graph=graph, transfers=transfers)
        assert queries.first_seconds == pytest.approx(0.3 + sum(told(4, graph=False)), rel=1e-9)
        assert queries.run(2).wall < 0.3


@pytest.mark.parametrize("transfers", [False, True])
def test_the_graph_is_the_engine_alone(machine, transfers):
    with opened(machine, graph=False) as (_, backend):
        asked(machine, backend, graph=True, transfers=transfers)
        (recorded,) = machine.cuda.executables.values()
        assert [work.name for work in recorded] == ["execute_async_v3"]


def test_without_transfers_the_images_are_copied_once_before(machine):
    def copies():
        return machine.names.count("cudaMemcpyAsync")

    with opened(machine) as (_, backend):
        queries = asked(machine, backend, transfers=False)
        before = copies()
        queries.run(5)
        assert copies() == before
        assert_answers(queries.results(), images(4))
        with_transfers = asked(machine, backend, transfers=True)
        before = copies()
        with_transfers.run(5)
        assert copies() == before + 5 * 3


def test_the_images_are_the_queries_own_from_the_beginning(machine):
    feeds = images(4)
    with opened(machine) as (_, backend):
        queries = backend.queries({"input": feeds}, graph=False, transfers=True, clock=machine.cuda.clock)
        feeds[...] = np.nan
        queries.run(2)
        assert_answers(queries.results(), images(4))


def test_events_serve_again_and_runs_take_no_memory(machine):
    with opened(machine) as (_, backend):
        queries = asked(machine, backend, graph=True)
        events, live = machine.names.count("cudaEventCreateWithFlags"), machine.cuda.live()
        assert events == 2 + 3 * 4  # two of the backend; one query is read while two are under way
        for count in (50, 1, 2):
            timing = queries.run(count)
            np.testing.assert_allclose(timing.latencies, sum(told(4, graph=True)), rtol=1e-6)
        assert machine.names.count("cudaEventCreateWithFlags") == events
        assert machine.cuda.live() == live


# --- what is computed


@pytest.mark.parametrize(("graph", "transfers"), WAYS)
def test_before_the_first_query_there_is_no_answer_and_none_without_the_engine(machine, monkeypatch, graph, transfers):
    """What ``results`` gives was computed by queries; the negative twin leaves the engine out."""
    with opened(machine) as (_, backend):
        queries = asked(machine, backend, graph=graph, transfers=transfers)
        assert all(np.isnan(array).all() for array in queries.results().values())
        place = 1 if transfers else 0
        steps = list(queries._steps)
        steps[place] = lambda: None
        monkeypatch.setattr(queries, "_steps", tuple(steps))
        queries.run(2)
        assert all(np.isnan(array).all() for array in queries.results().values())
        monkeypatch.undo()
        queries.run(1)
        assert_answers(queries.results(), images(4))


def test_several_queries_and_runs_take_turns_and_all_are_right(machine):
    with opened(machine) as (runner, backend):
        for rows in (4, 2, 6):
            every = [
                (asked(machine, backend, rows, seed, graph=graph, transfers=transfers), seed, graph, transfers)
                for seed, (graph, transfers) in enumerate(WAYS)
            ]
            for _ in range(3):
                for queries, seed, graph, transfers in every:
                    h2d, compute, d2h = told(rows, graph=graph)
                    latency = h2d + compute + d2h if transfers else compute
                    np.testing.assert_allclose(queries.run(3).latencies, latency, rtol=1e-6)
                    assert_answers(queries.results(), images(rows, seed))
                    feeds = images(5, 7)
                    assert_answers(runner.run({"input": feeds}), feeds)
            for queries, *_ in every:
                queries.close()
        for seed, rows in enumerate((4, 13, 1, 4)):
            feeds = images(rows, seed)
            assert_answers(runner.run({"input": feeds}), feeds)


def test_threads_take_turns(machine):
    wrong = []

    def run():
        for seed in range(5):
            feeds = images(4, seed)
            assert_answers(runner.run({"input": feeds}), feeds)

    def query(graph):
        for _ in range(5):
            queries = asked(machine, backend, 3, 9, graph=graph)
            queries.run(3)
            assert_answers(queries.results(), images(3, 9))
            queries.close()

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except BaseException as error:
            wrong.append(error)

    with opened(machine) as (runner, backend):
        works = [(run,), (query, False), (query, True)]
        threads = [threading.Thread(target=guarded, args=work) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_another_gpu_is_used_and_the_callers_is_put_back(machine):
    with opened(machine, device=1) as (_, backend):
        queries = asked(machine, backend, graph=True)
        assert machine.cuda.current == 0
        queries.run(3)
        assert_answers(queries.results(), images(4))
        assert {block.device for block in machine.cuda.blocks.values()} == {1}
        queries.close()
        assert machine.cuda.current == 0


@pytest.mark.parametrize("size", [(4, 6), (12, 16)])
def test_images_of_any_size_that_the_engine_takes(machine, size):
    with opened(machine, machine.engine(free=True, seconds=ENGINE)) as (_, backend):
        feeds = {"input": images(3, 0, size)}
        queries = backend.queries(feeds, graph=True, transfers=True, clock=machine.cuda.clock)
        timing = queries.run(2)
        assert queries.results()["features"].shape == (3, 4, size[0] // 2, size[1] // 2)
    np.testing.assert_allclose(timing.parts["h2d"], feeds["input"].nbytes * COSTS.to_device, rtol=1e-6)


# --- graphs that cannot be recorded


RECORDING_FAILS = ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "is_stream_capturable"]


@pytest.mark.parametrize("name", RECORDING_FAILS)
def test_where_recording_fails_the_engine_is_launched_and_that_is_said(machine, name):
    with opened(machine, graph=False) as (_, backend):
        machine.journal.fail_names = {name}
        queries = asked(machine, backend, graph=True)
        assert machine.names.count(name) == 1
        machine.journal.fail_names = set()
        assert not queries.graphed
        assert machine.cuda.error == ERROR.cudaSuccess
        timing = queries.run(3)
        np.testing.assert_allclose(timing.parts["compute"], told(4, graph=False)[1], rtol=1e-6)
        assert_answers(queries.results(), images(4))
        assert asked(machine, backend, graph=True).graphed


def test_an_engine_that_says_it_cannot_be_recorded_is_not(machine, monkeypatch):
    monkeypatch.setattr(EngineState, "overrides", {"capturable": False})
    with opened(machine, graph=False) as (_, backend):
        queries = asked(machine, backend, graph=True)
        assert not queries.graphed
        queries.run(2)
        assert_answers(queries.results(), images(4))
    assert "cudaStreamBeginCapture" not in machine.names


def test_without_a_graph_nothing_is_recorded(machine):
    with opened(machine, graph=False) as (_, backend):
        assert not asked(machine, backend, graph=False).graphed
    assert "cudaStreamBeginCapture" not in machine.names


# --- closing


def test_what_queries_took_is_freed_by_their_close_and_the_engine_goes_on(machine):
    with opened(machine, graph=False) as (runner, backend):
        live, contexts = machine.cuda.live(), machine.trt._destroyed.count("IExecutionContext")
        queries = asked(machine, backend, graph=True)
        assert {kind: count - live.get(kind, 0) for kind, count in machine.cuda.live().items()} == {
            "device memory": 3, "pinned memory": 3, "streams": 1, "events": 12, "graphs": 1
        }  # fmt: skip
        queries.run(2)
        queries.close()
        assert machine.cuda.live() == live
        assert machine.trt._destroyed.count("IExecutionContext") == contexts + 1
        calls = len(machine.names)
        queries.close()
        assert len(machine.names) == calls
        for work in (lambda: queries.run(1), queries.results):
            with pytest.raises(UsageError, match=r"^these queries were closed; ask the engine for new ones$"):
                work()
        feeds = images(4)
        assert_answers(runner.run({"input": feeds}), feeds)


def test_what_is_freed_is_freed_in_its_turn(machine, monkeypatch):
    """No thread runs the engine while another frees what queries took."""
    taken = []
    original = backend_module.close_on_device

    def noted(*arguments):
        taken.append(backend._lock.locked())
        original(*arguments)

    monkeypatch.setattr(backend_module, "close_on_device", noted)
    with opened(machine) as (_, backend):
        asked(machine, backend).close()
        assert taken == [True]
    assert taken == [True, True]


def test_the_engines_close_frees_its_queries_and_says_so(machine):
    with opened(machine) as (_, backend):
        queries = [asked(machine, backend, graph=graph, transfers=transfers) for graph, transfers in WAYS]
        for each in queries:
            each.run(2)
    machine.assert_nothing_left()
    calls = len(machine.names)
    for each in queries:
        with pytest.raises(UsageError, match="closed"):
            each.run(1)
        with pytest.raises(UsageError, match="closed"):
            each.results()
        each.close()
    with pytest.raises(UsageError, match="closed"):
        asked(machine, backend)
    assert len(machine.names) == calls


def test_when_only_freeing_fails_that_is_told_and_the_rest_is_freed(machine):
    with opened(machine) as (_, backend):
        queries = asked(machine, backend, graph=True)
        live = {"events": 2, "streams": 1, "device memory": 4, "pinned memory": 3}
        machine.journal.fail_names = {"cudaFreeHost"}
        with pytest.raises(DeviceFailed, match=r"^cudaFreeHost failed: cudaErrorUnknown "):
            queries.close()
        machine.journal.fail_names = set()
        assert machine.cuda.live() == live


def test_after_a_failed_query_its_error_is_the_one_that_is_told(machine):
    def work():
        with opened(machine) as (_, backend), contextlib.closing(asked(machine, backend)) as queries:
            machine.journal.fail_names = {"cudaEventRecord", "cudaFree", "cudaEventDestroy"}
            queries.run(3)

    with pytest.raises(DeviceFailed, match="cudaEventRecord failed"):
        work()


def test_after_a_failed_query_the_next_ones_are_right(machine):
    with opened(machine) as (runner, backend):
        queries = asked(machine, backend)
        machine.journal.fail_names = {"execute_async_v3"}
        with pytest.raises(DeviceFailed, match="execute_async_v3 failed: IFake::execute_async_v3: planted"):
            queries.run(4)
        machine.journal.fail_names = set()
        np.testing.assert_allclose(queries.run(3).latencies, sum(told(4, graph=False)), rtol=1e-6)
        assert_answers(queries.results(), images(4))
        feeds = images(6, 1)
        assert_answers(runner.run({"input": feeds}), feeds)


def test_a_batch_that_the_engine_does_not_take_leaves_nothing_behind(machine):
    with opened(machine) as (_, backend):
        live = machine.cuda.live()
        with pytest.raises(DeviceFailed, match="set_input_shape failed"):
            asked(machine, backend, 7)
        assert machine.cuda.live() == live
        asked(machine, backend, 6).run(1)


def test_memory_that_is_not_there_is_said_and_the_rest_given_back(machine):
    with opened(machine) as (_, backend):
        live = machine.cuda.live()
        machine.journal.fail_names = {"cudaMallocHost"}
        with pytest.raises(DeviceFailed, match=r"^cudaMallocHost failed"):
            asked(machine, backend)
        assert machine.cuda.live() == live
        machine.journal.fail_names = set()
        asked(machine, backend).run(1)


@pytest.mark.parametrize("moment", ["preparing", "running"])
def test_an_interruption_leaves_nothing_behind(machine, monkeypatch, moment):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with opened(machine) as (_, backend):
        if moment == "preparing":
            monkeypatch.setattr(DeviceQueries, "_events", interrupt)
            live = machine.cuda.live()
            with pytest.raises(KeyboardInterrupt):
                asked(machine, backend)
            assert machine.cuda.live() == live
        else:
            queries = asked(machine, backend)
            monkeypatch.setattr(queries._staging.stream, "copy_to_host", interrupt)
            with pytest.raises(KeyboardInterrupt):
                queries.run(3)
            assert all(stream.queue == [] for stream in machine.cuda.streams.values())


# --- failures


def life(machine, path):
    """Queries with a graph and copies, closed; launches without copies, left to the engine; a run."""
    with opened(machine, path, graph=False) as (runner, backend):
        queries = asked(machine, backend, 4, graph=True, transfers=True)
        queries.run(3)
        assert_answers(queries.results(), images(4))
        queries.close()
        others = asked(machine, backend, 3, graph=False, transfers=False)
        others.run(1)
        assert_answers(others.results(), images(3))
        assert_answers(runner.run({"input": images(2)}), images(2))


MAY_FAIL_UNSEEN = {"cudaGraphDestroy", "create_runtime_cache", "deserialize", "set_runtime_cache", "serialize"}


def during_recording(names, position):
    """After the preparing run's synchronisation, up to the end of the recording."""
    begin, end = names.index("cudaStreamBeginCapture"), names.index("cudaGraphDestroy")
    return begin - ("is_stream_capturable" in names) <= position <= end


def asks_for_the_callers_device(names, position):
    """Closing asks for it to put it back."""
    return names[position] == "cudaGetDevice" and names[position + 2] == "cudaEventDestroy"


@pytest.mark.parametrize(("version", "raises"), [(RTX, False), (RTX, True), (FULL[1], False)])
def test_every_call_may_fail_and_everything_is_freed(monkeypatch, tmp_path, version, raises):
    names = calls_of(life, version)
    assert len(names) > 100
    runtime_too = version == RTX and not raises
    reported = []
    for position, name in enumerate(names):
        if name.startswith("cuda") and not runtime_too:
            continue
        machine = fake_machine(monkeypatch, tmp_path, version)
        for cache in tmp_path.glob("*.cache"):
            cache.unlink()
        path = machine.engine()
        machine.trt._raises = raises
        machine.journal.fail_at = position
        where = f"call {position}, {name}"
        error = failure_of(life, machine, path)
        if error is None:
            unseen = name in MAY_FAIL_UNSEEN or during_recording(names, position)
            assert unseen or asks_for_the_callers_device(names, position), f"{where}: failed and nobody said so"
        else:
            reported.append(name)
            assert (type(error), error.exit_code) == (DeviceFailed, 4), where
            assert name in str(error), f"{where}: {error}"
            assert "\n" not in str(error)
        del error
        assert len(machine.names) > position
        machine.assert_nothing_left()
    assert {"create_execution_context", "execute_async_v3", "set_input_shape", "set_tensor_address"} <= set(reported)
    assert not runtime_too or {
        "cudaEventCreateWithFlags", "cudaEventRecord", "cudaEventSynchronize", "cudaEventElapsedTime",
        "cudaEventDestroy", "cudaGraphLaunch", "cudaGraphExecDestroy", "cudaStreamDestroy", "cudaMallocHost",
        "cudaFreeHost", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaSetDevice",
    } <= set(reported)  # fmt: skip


def test_reading_pinned_memory_before_the_copy_is_done_gives_nan(machine, monkeypatch):
    """The fake's part of ``results``: the negative twin leaves the wait out."""
    with opened(machine) as (_, backend):
        queries = asked(machine, backend, transfers=False)
        queries.run(1)
        for tensor in queries._staging.outputs:
            ctypes.memset(tensor.pinned.address, 0xFF, tensor.pinned.size)
        monkeypatch.setattr(queries._staging.stream, "synchronize", lambda: None)
        assert np.isnan(queries.results()["output"]).all()
        monkeypatch.undo()
        assert_answers(queries.results(), images(4))
