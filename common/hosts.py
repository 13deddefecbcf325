"""Several machines: who is gone is named within half a minute, also where a cable is cut and no connection breaks.

Every process sends each other one a datagram every two seconds. Who was heard once and then is silent for `SILENCE`
seconds is named, and all end. A process that ends for a reason of its own says goodbye.
"""

import contextlib
import os
import socket
import sys
import threading
import time

BEAT, SILENCE = 2, 18  # seconds
HERE, BYE = b".", b"x"
_watch = None


class _Watch(threading.Thread):
    def __init__(self, rank, all_gather):
        super().__init__(daemon=True)
        self.family = socket.getaddrinfo(os.environ["MASTER_ADDR"], None)[0][0]
        self.socket = socket.socket(self.family, socket.SOCK_DGRAM)
        self.socket.bind(("", 0))
        with socket.socket(self.family, socket.SOCK_DGRAM) as probe:  # which address the others reach
            probe.connect((os.environ["MASTER_ADDR"], 1))
            mine = probe.getsockname()[0], self.socket.getsockname()[1]
        about = all_gather((f"process {rank} on {socket.gethostname()}", mine, os.urandom(8)))
        self.rank, self.names, self.run_id = rank, [name for name, *_ in about], about[0][2]
        self.others = {r: place for r, (_, place, _) in enumerate(about) if r != rank}
        self.over, self.left = threading.Event(), None  # left: who has said goodbye first
        self.on_loss = lambda reason: None

    def run(self):
        heard = {}  # rank -> when
        while not self.over.is_set():
            self.say(HERE)
            end = time.monotonic() + BEAT
            while (wait := end - time.monotonic()) > 0 and not self.over.is_set():
                self.socket.settimeout(wait)
                with contextlib.suppress(OSError):  # a time-out too
                    words, place = self.socket.recvfrom(64)
                    if words.startswith(self.run_id):
                        rank = int.from_bytes(words[9:], "big")
                        heard[rank], self.others[rank] = time.monotonic(), place  # it may not know its own address
                        if words[8:9] == BYE:
                            self.left = self.left or self.names[rank]
                            heard.pop(rank)
            for rank, when in heard.items():
                if time.monotonic() > when + SILENCE and not self.over.is_set():
                    self.lost(rank)

    def say(self, what):
        for place in list(self.others.values()):
            with contextlib.suppress(OSError):
                self.socket.sendto(self.run_id + what + self.rank.to_bytes(4, "big"), place)

    def lost(self, rank):
        """Ends this process. The main thread may wait in C++ code for what never comes: no exception would reach it."""
        reason = f"{self.names[rank]} no longer answers: the same command with --resume goes on"
        try:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a machine, before a launcher ends them all
                print(f"failed: {reason}", file=sys.__stderr__, flush=True)
            else:
                time.sleep(2 * BEAT)
            self.on_loss(reason)
        finally:
            os._exit(1)


def watch(rank, all_gather):
    """Begins to watch the other processes. Args: all_gather: of `common.parallel`; every process calls it."""
    global _watch
    _watch = _Watch(rank, all_gather)
    _watch.start()


def who_left():
    """In words, for who waits for another process in vain. Where that one has not said goodbye, this one ends here."""
    end = time.monotonic() + 2 * SILENCE
    while _watch and not _watch.left and time.monotonic() < end:
        time.sleep(BEAT / 4)
    return (_watch and _watch.left) or "another process"


def on_loss(function):
    """function(reason) is called before the process ends for another one's loss."""
    if _watch is not None:
        _watch.on_loss = function


def speaks():
    """Whether this process says why it ends though the main one does: the first of another machine."""
    return _watch is not None and os.environ.get("LOCAL_RANK", "0") == "0"


def say_goodbye():
    """This process ends, and says itself why; or all have come to the end."""
    if _watch is not None:
        _watch.over.set()
        for _ in range(3):  # a datagram may get lost
            _watch.say(BYE)
