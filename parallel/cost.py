"""What a transfer between GPUs costs: one model, by which context parallelism chooses its methods.

A transfer takes a latency plus its bytes over a rate. NCCL reaches different rates in send-receives and in all-gathers,
so a link has a line for each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """Seconds as a straight line of bytes.

    Attributes:
        latency_s: to start a transfer.
        bytes_per_s: into one GPU, while as much goes out of it.
    """

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """0 where nothing is sent: then no transfer is started."""
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes else 0.0


@dataclass(frozen=True)
class LinkRates:
    """A kind of link between GPUs, by the two ways of using it."""

    send_receive: Line
    all_gather: Line

    def send_receive_s(self, num_bytes: float) -> float:
        """A batch of sends and receives that brings ``num_bytes`` into the busiest GPU."""
        return self.send_receive.seconds(num_bytes)

    def all_gather_s(self, bytes_per_rank: float, num_ranks: int) -> float:
        """Each rank receives what all others hold; a reduce-scatter of as much takes as long."""
        return self.all_gather.seconds((num_ranks - 1) * bytes_per_rank)


# Measured over NCCL between two H200: send-receives of 64 MB in 0.26 ms and of 1 GB in 2.98 ms; all-gathers of 16 MB
# per rank in 102 us and of 256 MB in 1060 us, one after another, launching included (4 MB: 58 us, alone 39).
NVLINK = LinkRates(send_receive=Line(74e-6, 344e9), all_gather=Line(40e-6, 263e9))
# Not measured: a 400 Gb/s network card per GPU, and the latency of an all-gather over NVLink.
NETWORK = LinkRates(send_receive=Line(40e-6, 50e9), all_gather=Line(40e-6, 50e9))


@dataclass(frozen=True)
class Machine:
    """A cluster, by the rates that decide how to run on it.

    Attributes:
        node, network: the links within a node and between nodes.
        gpus_per_node: as many ranks of one group at most are taken to share a node.
        attention_flops_per_s: measured, one H200: FlashAttention-4, bf16, head dim 128, causal, 8K to 131K tokens.
        copy_bytes_per_s: bytes read plus bytes written; measured, one H200.
    """

    node: LinkRates = NVLINK
    network: LinkRates = NETWORK
    gpus_per_node: int = 8
    attention_flops_per_s: float = 650e12
    copy_bytes_per_s: float = 4.25e12

    def link(self, num_ranks: int) -> LinkRates:
        """The link a group of ranks is bound by."""
        return self.node if num_ranks <= self.gpus_per_node else self.network


H200 = Machine()
