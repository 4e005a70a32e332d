"""Ports for listeners that start seconds after they were chosen."""

import socket
from pathlib import Path

import pytest

from megatron_eso.errors import ClusterError
from megatron_eso.launch import processes


def test_a_port_is_free_and_none_that_the_kernel_gives_away():
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [processes.free_port() for _ in range(50)]
    assert len(set(ports)) > 40
    for port in ports:
        assert 1024 < port < first or port > last
        with socket.create_server(("", port)):
            pass


def test_a_taken_port_is_not_chosen(monkeypatch):
    with socket.create_server(("", processes.free_port())) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(processes, "_OWN_PORTS", (port, port + 1))
        with pytest.raises(ClusterError, match=f"tried between {port} and"):
            processes.free_port()
