"""What a watchdog's child may do. Without torch, so that a child starts at once."""

import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any


def candidate(alg_id: int) -> dict[str, Any]:
    return {"alg_id": alg_id, "split_k": 1, "split_k_mode": None, "split_k_buffers": 0}


def decision(request: dict[str, Any], alg_id: int) -> dict[str, Any]:
    """Return a sparse decision as JSON types."""
    return {
        **request["product"],
        "use": "sparse",
        "candidate": candidate(alg_id),
        "reason": f"found by process {os.getpid()}",
        **dict.fromkeys(("pack_us", "matmul_us"), 1.0),
        "sparse_us": 2.0,
        "dense_us": 4.0,
        "rejected": request["excluded"],
        "packer": "ours",
        "elsewhere": candidate(alg_id),
        "elsewhere_us": 2.0,
        "bounded": False,
        "conditions": {},
    }


def misbehaves(connection: Connection, kinds: list[str]) -> None:
    """Try the algorithms that are not excluded, each of which is as ``kinds`` says."""
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        out = {entry["alg_id"] for entry in request["excluded"]}
        for alg_id, kind in enumerate(kinds):
            if alg_id in out:
                continue
            connection.send(("trying", candidate(alg_id)))
            connection.send(("step", alg_id, len(kinds), f"alg {alg_id}"))
            act(kind, connection)
        connection.send(("trying", None))
        connection.send(("decision", decision(request, len(kinds) - 1), False))


def act(kind: str, connection: Connection) -> None:
    if kind == "hangs":
        time.sleep(60)
    if kind == "ignores signals and hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if kind == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "exits":
        os._exit(7)
    if kind == "loses its context":
        connection.send(("died", "AcceleratorError: CUDA error: an illegal instruction"))
        os._exit(0)
    if kind == "bug":
        os._exit(1)


def hangs_at_once(connection: Connection, make_executor: object) -> None:
    time.sleep(60)


def dies_at_once(connection: Connection, make_executor: object) -> None:
    os._exit(9)
