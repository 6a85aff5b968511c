"""A Ray cluster of several nodes on this machine, in a process of its own: `python ray_cluster.py NODES CPUS [PORT]`.

It says the cluster's address, removes its last node when a line comes in, and ends with its input. PORT: where the head
listens for clients (ray://).
"""

import sys

from ray.cluster_utils import Cluster

PATIENCE = 120  # seconds for a node to start on a busy machine


def main(nodes: int, cpus: int, port: int | None = None) -> None:
    head = {"num_cpus": cpus, "include_dashboard": False} | ({"ray_client_server_port": port} if port else {})
    cluster = Cluster(initialize_head=True, head_node_args=head)
    others = [cluster.add_node(wait=False, num_cpus=cpus) for _ in range(nodes - 1)]
    cluster.wait_for_nodes(timeout=PATIENCE)
    print(f"address {cluster.address}", flush=True)
    for _ in sys.stdin:
        cluster.remove_node(others.pop(), allow_graceful=False)
    cluster.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
