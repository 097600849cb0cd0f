"""torchgfn's Bayesian-structure environment: seconds of its step and of its mask, in an environment of its own.

    PYTHON torchgfn_dags.py NODES BATCH STEPS SEED

From the empty graph, STEPS uniformly random legal edges in each of BATCH graphs. Only ``env.step`` and
``states.forward_masks`` are timed (the wrapper that its sampler puts around the step is not, nor any network or
reward). Prints one line of JSON: processor seconds, wall seconds and steps of graphs. One thread.
"""

import json
import sys
import time

import torch


def main() -> None:
    nodes, batch, steps, seed = map(int, sys.argv[1:5])
    from gfn.actions import GraphActions, GraphActionType
    from gfn.gym.bayesian_structure import BayesianStructure

    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(seed)
    env = BayesianStructure(nodes, state_evaluator=lambda states: torch.zeros(len(states)))
    states = env.reset(batch)
    mask = states.forward_masks[GraphActions.EDGE_INDEX_KEY]
    zeros = torch.zeros(batch, dtype=torch.long)
    kind = torch.full_like(zeros, int(GraphActionType.ADD_EDGE))
    cpu = wall = 0.0
    for _ in range(steps):
        edge = torch.multinomial(mask.float(), 1, generator=gen).squeeze(1)
        row = {GraphActions.ACTION_TYPE_KEY: kind, GraphActions.EDGE_INDEX_KEY: edge}
        columns = [
            row.get(key, zeros) for key in sorted(GraphActions.ACTION_INDICES, key=GraphActions.ACTION_INDICES.get)
        ]
        actions = env.Actions(torch.stack(columns, -1))
        cpu0, wall0 = time.process_time(), time.perf_counter()
        states = env.step(states, actions)
        mask = states.forward_masks[GraphActions.EDGE_INDEX_KEY]
        cpu, wall = cpu + time.process_time() - cpu0, wall + time.perf_counter() - wall0
    print(json.dumps({"cpu_seconds": cpu, "wall_seconds": wall, "steps": steps * batch, "edges": nodes * nodes}))


if __name__ == "__main__":
    main()
