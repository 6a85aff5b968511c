"""A Ray cluster on this machine, in a process of its own: `python ray_cluster.py CPUS PORT`, of each node and for
clients of the head (ray://).

It says the cluster's address, and answers each line of its input: "add" a second node, with the process id of its
raylet; "remove" it, as if it were cut off. It ends with its input.
"""

import sys

from ray.cluster_utils import Cluster

PATIENCE = 120  # seconds for a node to start on a busy machine


def main(cpus: int, port: int) -> None:
    head = {"num_cpus": cpus, "include_dashboard": False, "ray_client_server_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(f"address {cluster.address}", flush=True)
    for line in map(str.strip, sys.stdin):
        if line == "add":
            node = cluster.add_node(wait=False, num_cpus=cpus)
            cluster.wait_for_nodes(timeout=PATIENCE)
            print(f"added {node.all_processes['raylet'][0].process.pid}", flush=True)
        else:
            cluster.remove_node(node, allow_graceful=False)
            print("removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
