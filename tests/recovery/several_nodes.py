"""Calls of train.py on several nodes, each with torchrun's agent and one process, on loopback."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from forked_calls import Call, children, start
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def agent(main: Callable[[], None], node: int, nodes: int, port: int, name: str) -> None:
    """Call ``main`` in a process of its own, as ``torchrun`` does on a node.

    It is ``torchrun --nnodes NODES --nproc-per-node 1 --node-rank NODE --master-addr 127.0.0.1
    --master-port PORT --rdzv-id NAME``, except that the process is forked.
    """
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=1,
        run_id=name,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": node, "timeout": 120},
        max_restarts=0,
        start_method="fork",
        local_addr="127.0.0.1",
    )
    elastic_launch(config, main)()


def start_nodes(args: list[str], folder: Path, name: str, nodes: int = 2) -> list[Call]:
    """Start a run on some nodes, in ``folder``; the output of node 0 goes to ``node0.txt``.

    Args:
        args: The command line.
        folder: Working directory of all nodes.
        name: What the nodes call the run, as in ``--rdzv-id``.
        nodes: How many.
    """
    port = free_port()
    calls = []
    for node in range(nodes):
        begin = (
            "import functools, train, several_nodes\n"
            f"place = ({node}, {nodes}, {port}, {name!r})\n"
            "train.main = functools.partial(several_nodes.agent, train.main, *place)\n"
        )
        calls.append(start(args, folder, begin, f"node{node}.txt"))
    return calls


def finish_nodes(args: list[str], folder: Path, name: str, nodes: int = 2) -> None:
    """Train on some nodes to the end; see :func:`start_nodes`."""
    calls = start_nodes(args, folder, name, nodes)
    codes = [call.finish() for call in calls]
    assert codes == [0] * nodes, "\n".join(call.log.read_text() for call in calls)


def free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def worker(call: Call) -> int:
    """Return the process id of the training process below an agent."""
    assert call.process.pid is not None
    (pid,) = children(call.process.pid)
    return pid
