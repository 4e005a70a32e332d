"""A node's health check, and the metadata server that announces a machine's end."""

import http.server
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_eso.launch import health, metadata
from megatron_eso.launch.health import problems
from megatron_eso.launch.pairs import rounds, slow_nodes
from megatron_eso.launch.records import Records
from megatron_eso.parallel import pair_bandwidth


def check(folder, **changes):
    settings = {"num_devices": 0, "device_folder": folder, "command": "", "max_skew": 3600.0}
    return problems(folder, "n0", **{**settings, **changes})


def test_a_healthy_node_has_no_problems_and_leaves_nothing(tmp_path):
    for i in range(8):
        (tmp_path / f"nvidia{i}").touch()
    (tmp_path / "nvidiactl").touch()
    assert check(tmp_path, num_devices=8, command="true") == []
    assert not (tmp_path / "n0.probe").exists()


def test_every_problem_is_named(tmp_path):
    (tmp_path / "nvidia0").touch()
    found = check(tmp_path, num_devices=8, command="echo link down >&2; exit 3", max_skew=-1.0)
    assert found[0].startswith("1 of 8 GPUs") and "clock" in found[1]
    assert found[2] == "health.command exited 3: link down"


def test_a_command_that_fails_without_a_word_is_a_problem(tmp_path):
    assert check(tmp_path, command="exit 3") == ["health.command exited 3"]


def test_a_node_without_the_networks_plugin_is_sick(tmp_path):
    plugin = tmp_path / "profile.sh"
    lacks = {"file": str(plugin), "file_lacks": "the prolog did not run"}
    assert check(tmp_path, **lacks) == [f"no {plugin}: the prolog did not run"]
    plugin.touch()
    assert check(tmp_path, **lacks) == []


def test_a_folder_that_cannot_be_written_is_a_problem():
    assert "cannot write" in check(Path("/proc"))[0]


def test_a_node_reports_its_problems_to_the_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n5")
    arguments = [
        "health",
        "--run",
        str(tmp_path / "run"),
        "--attempt",
        "1.0",
        "--command",
        "exit 3",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    health.main()
    records = Records(tmp_path / "run")
    assert records.problems("1.0", "n5") == ["health.command exited 3"]
    assert records.problems("1.1", "n5") is None


def test_a_process_that_ends_in_a_measurement_leaves_with_whom(tmp_path, monkeypatch):
    def ends(host, port, rank):
        raise SystemExit(1)

    monkeypatch.setenv("SLURMD_NODENAME", "a")
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "1")
    monkeypatch.setattr(pair_bandwidth, "measure", ends)
    arguments = f"pairs --run {tmp_path} --attempt 1.0 --nodes a,b --port 1"
    monkeypatch.setattr(sys, "argv", arguments.split())
    with pytest.raises(SystemExit):
        pair_bandwidth.main()
    assert Records(tmp_path).pair_speeds("1.0", "a") == {"b": {"error": "not finished"}}


@pytest.mark.parametrize("number", [2, 3, 4, 5, 8])
def test_every_pair_of_neighbours_meets_once_and_no_node_is_in_two_pairs_at_a_time(number):
    found = rounds(number)
    pairs = [pair for one in found for pair in one]
    expected = {frozenset((i, (i + 1) % number)) for i in range(number)}
    assert {frozenset(pair) for pair in pairs} == expected and len(pairs) == len(expected)
    assert all(len({n for pair in one for n in pair}) == 2 * len(one) for one in found)
    assert len(found) <= 3


def speeds(nodes, slow=(), silent=()):
    """Return the reports of a ring in which some nodes are slow and some write nothing."""
    reports = {node: {} for node in nodes}
    for one, other in [p for pairs in rounds(len(nodes)) for p in pairs]:
        a, b = nodes[one], nodes[other]
        entry = {"gb_per_second": 0.1 if {a, b} & set(slow) else 10.0}
        if {a, b} & set(silent):
            entry = {"error": "timed out"}
        reports[a][b] = reports[b][a] = entry
    return {node: {} if node in silent else entry for node, entry in reports.items()}


def test_the_node_that_is_slow_with_both_neighbours_is_the_slow_one():
    nodes = ["a", "b", "c", "d"]
    assert slow_nodes(speeds(nodes), nodes, 1.0) == {}
    found = slow_nodes(speeds(nodes, slow=["b"]), nodes, 1.0)
    assert found.keys() == {"b"}
    assert "below 1 GB/s" in found["b"] and "0.1 GB/s with a" in found["b"]
    assert slow_nodes(speeds(nodes, silent=["d"]), nodes, 1.0).keys() == {"d"}


def test_of_two_nodes_both_are_under_suspicion():
    assert slow_nodes(speeds(["a", "b"], slow=["b"]), ["a", "b"], 1.0).keys() == {"a", "b"}


def test_a_node_whose_neighbour_is_known_to_be_sick_is_not_blamed():
    reports = speeds(["a", "b", "c"], silent=["b"])
    assert slow_nodes(reports, ["a", "c"], 1.0) == {}
    assert slow_nodes(reports, ["a"], 1.0) == {}


@pytest.mark.parametrize("other", [{}, {"a": {"gb_per_second": 0.1}}], ids=["silent", "slow"])
def test_a_pair_is_as_fast_as_the_slower_of_its_two_reports(other):
    reports = {"a": {"b": {"gb_per_second": 10.0}}, "b": other}
    assert slow_nodes(reports, ["a", "b"], 1.0).keys() == {"a", "b"}


values_asked = []


def wait_for_questions(number):
    """Wait until the server was asked so often."""
    end = time.monotonic() + 20
    while len(values_asked) < number:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def server():
    values, asked = {}, values_asked
    asked.clear()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[1]
            asked.append(name)
            known = name in values and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(values.get(name, "").encode() if known else b"")

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", values
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, ""),
        ({"preempted": "FALSE", "maintenance-event": "NONE"}, ""),
        ({"preempted": "TRUE\n"}, "preempted=TRUE"),
        (
            {"preempted": "FALSE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"},
            "maintenance-event=TERMINATE_ON_HOST_MAINTENANCE",
        ),
    ],
)
def test_the_server_announces_the_end_of_a_machine(server, values, expected):
    address, served = server
    served.update(values)
    assert metadata.warning(address) == expected


def test_a_rank_that_ignores_signals_while_it_starts_is_told_again(server, capsys):
    address, served = server
    served["preempted"] = "TRUE"
    start = "trap '' TERM; echo; sleep 1; trap 'exit 75' TERM; while :; do sleep 0.1; done"
    rank = subprocess.Popen(["bash", "-c", start], stdout=subprocess.PIPE)
    assert rank.stdout is not None
    rank.stdout.readline()  # before that a signal would end it
    watcher = threading.Thread(target=metadata.watch, args=(rank.pid, address, 0.01), daemon=True)
    watcher.start()
    try:
        assert rank.wait(20) == 75
        watcher.join(20)  # ends with its rank
        assert not watcher.is_alive()
    finally:
        rank.kill()
        rank.wait()
        rank.stdout.close()
    assert capsys.readouterr().out.count("asking the ranks to save and stop") == 1


def stops_on_term():
    """Start a process that ends with 75 on TERM, and wait until it would."""
    start = "trap 'exit 75' TERM; echo; while :; do sleep 0.05; done"
    rank = subprocess.Popen(["bash", "-c", start], stdout=subprocess.PIPE)
    assert rank.stdout is not None
    rank.stdout.readline()
    rank.stdout.close()
    return rank


def test_maintenance_stops_the_ranks_once_and_is_noted(server, tmp_path, monkeypatch):
    address, served = server
    monkeypatch.setenv("SLURMD_NODENAME", "n5")
    records = Records(tmp_path)
    served["maintenance-event"] = "NONE"
    rank = stops_on_term()
    watcher = threading.Thread(
        target=metadata.watch, args=(rank.pid, address, 0.01, records), daemon=True
    )
    watcher.start()
    wait_for_questions(5)
    served["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert rank.wait(20) == 75
    watcher.join(20)
    ((node, why),) = records.take_announced()
    assert node == "n5" and "TERMINATE_ON_HOST_MAINTENANCE" in why

    # The requeued job got the same node: the notice is known, and only a spot machine's end stops it.
    rank = stops_on_term()
    watcher = threading.Thread(
        target=metadata.watch, args=(rank.pid, address, 0.01, records), daemon=True
    )
    watcher.start()
    wait_for_questions(len(values_asked) + 5)
    assert rank.poll() is None and records.take_announced() == []
    served["preempted"] = "TRUE"
    assert rank.wait(20) == 75
    watcher.join(20)
    assert records.take_announced() == []


def test_the_watcher_ends_with_its_rank_and_survives_a_silent_server(capsys):
    rank = subprocess.Popen(["true"])
    rank.wait()
    metadata.watch(rank.pid, "http://127.0.0.1:9", 0.01)
    with pytest.raises(OSError):
        metadata.warning("http://127.0.0.1:9", 0.5)
