"""Network namespaces on one machine, joined by a switch that can lose, delay and cut: real addresses, real TCP.

Each namespace has one interface, `eth0`, a TAP device whose other end is a process of ours (`Switch`), which carries
every frame. So partitions, loss and delay need no kernel module (netem is often missing) and no firewall, and nothing
leaves this machine. The switch removes the namespaces when its owner goes, however it goes.
"""

import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
MTU = 1500
LARGEST_FRAME = 65536
READS_PER_TURN = 64  # frames taken from one port before the others get their turn


class NamespaceError(Exception):
    """Namespaces cannot be had here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """One namespace and its address."""

    name: str
    address: str
    port: int  # of the switch

    @property
    def prefix(self) -> list[str]:
        """Put before a command, this runs it inside."""
        return ["ip", "netns", "exec", self.name]


@dataclass(frozen=True, slots=True)
class Link:
    """What happens to frames between two ports, in both directions."""

    loss: float = 0.0  # share of frames lost, 0 to 1; 1 is a partition
    delay_s: float = 0.0  # one way


class Network:
    """`count` namespaces and this machine's own end (`host`, port 0). Leave the context to remove all of it."""

    def __init__(self, count: int, tag: str = "") -> None:
        check_possible()
        tag = tag or f"cv{os.getpid() % 100_000}"
        subnet = f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 200}"
        self.host = f"{subnet}.1"
        self.spaces = [Namespace(f"{tag}-{i}", f"{subnet}.{10 + i}", i) for i in range(1, count + 1)]
        self._taps: list[int] = []
        try:
            self._taps.append(open_tap(f"{tag}h"))
            _ip("link", "set", f"{tag}h", "address", mac(0), "mtu", str(MTU), "up")
            _ip("addr", "add", f"{self.host}/24", "dev", f"{tag}h")
            for space in self.spaces:
                self._taps.append(self._join(space, f"{tag}t{space.port}"))
        except BaseException:
            remove_namespaces([space.name for space in self.spaces])
            raise
        self._switch = start_switch(self._taps, [space.name for space in self.spaces])

    @staticmethod
    def _join(space: Namespace, device: str) -> int:
        _ip("netns", "add", space.name)
        tap = open_tap(device)
        _ip("link", "set", device, "netns", space.name)
        inside = ("-n", space.name)
        _ip(*inside, "link", "set", device, "name", "eth0")
        _ip(*inside, "link", "set", "eth0", "address", mac(space.port), "mtu", str(MTU), "up")
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "addr", "add", f"{space.address}/24", "dev", "eth0")
        return tap

    def set_link(self, a: int, b: int, link: Link) -> None:
        """Between the ports `a` and `b`; `Link()` is a healthy one."""
        assert self._switch.stdin is not None
        order = {"ports": [a, b], "loss": link.loss, "delay_s": link.delay_s}
        self._switch.stdin.write(json.dumps(order).encode() + b"\n")
        self._switch.stdin.flush()

    def cut(self, a: int, b: int) -> None:
        """No frame passes any more: a partition, as when a cable is out, without a reset to anyone."""
        self.set_link(a, b, Link(loss=1.0))

    def heal(self, a: int, b: int) -> None:
        self.set_link(a, b, Link())

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._switch.stdin is not None
        self._switch.stdin.close()  # the end of its orders: it removes everything and leaves
        self._switch.wait(30)
        for tap in self._taps:
            os.close(tap)


def check_possible() -> None:
    """Raises `NamespaceError` where namespaces cannot be made."""
    if os.geteuid() != 0:
        raise NamespaceError("network namespaces need root: run as root, or choose the hosts that need none")
    if shutil.which("ip") is None:
        raise NamespaceError("network namespaces need the command ip: install iproute2")
    if not os.path.exists("/dev/net/tun"):
        raise NamespaceError("network namespaces need /dev/net/tun: load the kernel's module tun")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NamespaceError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def open_tap(device: str) -> int:
    """A new TAP device; it lives as long as the file descriptor."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TAP | IFF_NO_PI))
    return tap


def mac(port: int) -> str:
    """The address of a port's interface: the switch knows from its last byte where a frame goes."""
    return f"02:00:00:00:00:{port:02x}"


def remove_namespaces(names: Sequence[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


# -- the switch, in its own process: an interpreter busy with other things would be a slow network --------------------


def start_switch(taps: Sequence[int], names: Sequence[str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "ops.chaos.namespaces", json.dumps(list(taps)), json.dumps(list(names))]
    # A session of its own: Ctrl-C is for its owner, whose end it sees by itself.
    return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=list(taps), start_new_session=True)


class Switch:
    """Carries frames between ports until its orders end."""

    def __init__(self, taps: Sequence[int], orders: int) -> None:
        self._taps = list(taps)
        self._orders = orders
        self._links: dict[tuple[int, int], Link] = {}
        self._late: list[tuple[float, int, int, bytes]] = []  # due, serial number, port, frame
        self._serial = 0
        self._text = b""

    def run(self) -> None:
        poller = select.epoll()
        for descriptor in (*self._taps, self._orders):
            poller.register(descriptor, select.EPOLLIN)
        ports = {tap: port for port, tap in enumerate(self._taps)}
        while True:
            patience = max(0.0, self._late[0][0] - time.monotonic()) if self._late else -1
            for descriptor, _ in poller.poll(patience):
                if descriptor != self._orders:
                    self._take(ports[descriptor])
                elif not self._obey():
                    return
            self._send_late()

    def _obey(self) -> bool:
        """Take orders; False at their end."""
        part = os.read(self._orders, LARGEST_FRAME)
        *lines, self._text = (self._text + part).split(b"\n")
        for line in lines:
            order = json.loads(line)
            a, b = order["ports"]
            self._links[a, b] = self._links[b, a] = Link(order["loss"], order["delay_s"])
        return bool(part)

    def _take(self, port: int) -> None:
        for _ in range(READS_PER_TURN):
            try:
                frame = os.read(self._taps[port], LARGEST_FRAME)
            except BlockingIOError:
                return
            if frame[0] & 1:  # to a group or to all
                for other in range(len(self._taps)):
                    if other != port:
                        self._pass(port, other, frame)
            elif frame[5] < len(self._taps):
                self._pass(port, frame[5], frame)

    def _pass(self, source: int, target: int, frame: bytes) -> None:
        link = self._links.get((source, target))
        if link is None or (not link.loss and not link.delay_s):
            self._write(target, frame)
        elif random.random() >= link.loss:
            self._serial += 1
            heapq.heappush(self._late, (time.monotonic() + link.delay_s, self._serial, target, frame))

    def _send_late(self) -> None:
        now = time.monotonic()
        while self._late and self._late[0][0] <= now:
            _, _, port, frame = heapq.heappop(self._late)
            self._write(port, frame)

    def _write(self, port: int, frame: bytes) -> None:
        with contextlib.suppress(OSError):  # a full queue or an interface that is down loses frames, as hardware does
            os.write(self._taps[port], frame)


def main() -> None:
    taps, names = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    try:
        os.nice(-10)  # what stands for the network must not wait for those who use it
        Switch(taps, sys.stdin.fileno()).run()
    finally:
        remove_namespaces(names)


if __name__ == "__main__":
    main()
