"""Each server of ours has ports of its own on a machine, and two of them never answer for each other."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from serve_app import port_block
from serve_app.port_block import NoPortsLeft, PortBlock
from tests.ports import free_run
from tests.running_server import running_server


@pytest.fixture
def few_ports(monkeypatch: pytest.MonkeyPatch) -> range:
    """Two blocks of four ports; nothing else on this machine is asked for them."""
    ports = free_run(8)
    monkeypatch.setattr(port_block, "FIRST_PORT", ports.start)
    monkeypatch.setattr(port_block, "END_PORT", ports.stop)
    monkeypatch.setattr(port_block, "BLOCK_PORTS", 4)
    return ports


@pytest.fixture
def blocks() -> Iterator[list[PortBlock]]:
    made = [PortBlock() for _ in range(3)]
    yield made
    for each in made:
        each.release()


def test_blocks_do_not_overlap_and_come_back(few_ports: range, blocks: list[PortBlock]) -> None:
    first, second = blocks[0].claim(), blocks[1].claim()
    assert (first, second) == (few_ports[1:4], few_ports[5:8])
    with pytest.raises(NoPortsLeft, match="set haproxy to false"):
        blocks[2].claim()
    blocks[0].release()
    assert blocks[2].claim() == first
    assert blocks[2].claim() == first  # one block at a time


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
@pytest.mark.parametrize("taken", [0, 2])
def test_a_block_with_a_port_in_use_is_passed_over(
    few_ports: range, blocks: list[PortBlock], taken: int, address: str
) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray opens them
        other.bind((address, few_ports[taken]))
        other.listen()
        assert blocks[0].claim() == few_ports[5:8]


def test_a_claim_ends_with_its_process(few_ports: range, blocks: list[PortBlock]) -> None:
    holding = (
        "import sys, time; from serve_app import port_block as p; "
        f"p.FIRST_PORT, p.END_PORT, p.BLOCK_PORTS = {few_ports.start}, {few_ports.stop}, 4; "
        "block = p.PortBlock(); print(block.claim()[0], flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert int(other.stdout.readline()) == few_ports[1]
        assert blocks[0].claim() == few_ports[5:8]
        other.kill()
        other.wait()
    assert blocks[0].claim() == few_ports[1:4]


@pytest.mark.server
def test_two_servers_on_one_machine_answer_for_themselves(server: str) -> None:
    with running_server("--no-ui") as other:
        seen = {address: replicas_of(address) for address in (server, other.base_url)}
        (ours,), (theirs,) = seen.values()
        assert ours != theirs


def replicas_of(address: str) -> set[str]:
    """Who answered at this address, over many connections of their own."""
    texts = [httpx.get(f"{address}/metrics", timeout=30).text for _ in range(24)]
    return {name for text in texts for name in re.findall(r'zimage_pictures_total{replica="(\w+)"}', text)}
