"""Worlds of gloo processes for the tests, forked from one process that has already imported torch."""

import os
import socket
import sys
import traceback

WAIT = 60  # seconds after which a world that hangs is ended


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_world(size: int, work, *arguments) -> list[int]:
    """Calls `work(rank, *arguments)` in `size` processes that find each other as torchrun's do.

    Returns:
        Exit status of each, by rank: 0, what SystemExit said, 1 for any other exception; minus the signal for one that
        was ended, 14 for a hang.
    """
    port, children = free_port(), []
    sys.stdout.flush()
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _be(rank, size, port, work, arguments)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _be(rank: int, size: int, port: int, work, arguments) -> None:
    """The life of one process; never returns."""
    import signal

    from minigated.distributed import _leave

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WAIT)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    status = 0
    try:
        work(rank, *arguments)
    except SystemExit as left:
        status = left.code
    except BaseException:
        traceback.print_exc()
        status = 1
    _leave()  # os._exit skips what is registered for the end
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
