"""What `python -m ops.drain` waits for."""

import socket
import subprocess
import sys
import time

import pytest

from ops.sockets import ESTABLISHED, LISTENING, sockets

FAKE_NODE = "import sys, time\nsys.argv\ntime.sleep(60)"


@pytest.mark.parametrize("leaves", [True, False])
def test_clients_first_then_the_node(leaves: bool) -> None:
    node = subprocess.Popen([sys.executable, "-c", FAKE_NODE, "start", "--block"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        assert len(list(sockets(port, LISTENING))) == 1
        assert len(list(sockets(port, ESTABLISHED))) == 1
        command = [sys.executable, "-m", "ops.drain", "--port", str(port), "--pid", str(node.pid), "--timeout", "6"]
        began = time.monotonic()
        drain = subprocess.Popen(command)
        time.sleep(3)
        assert node.poll() is None, "it was ended under its client"
        if leaves:
            client.close()
            accepted.close()
        assert drain.wait(30) == 0
        assert node.wait(5) != 0
        if not leaves:
            assert time.monotonic() - began > 6
        client.close()
        accepted.close()
