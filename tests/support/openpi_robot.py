"""A robot client of a policy server, with the real openpi-client; runs where that package is installed.

Reads arrays (an .npz of an observation) and prints the answers as JSON: the metadata's keys, actions of plans, the
error that an invalid observation raises.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from openpi_client import action_chunk_broker, websocket_client_policy


def main(host: str, port: int, file: str, token: str) -> None:
    with np.load(file) as stored:
        observation = {name: stored[name] for name in stored.files}
    observation["prompt"] = str(observation.pop("instruction"))
    policy = websocket_client_policy.WebsocketClientPolicy(host, port, api_key=token or None)
    answers = [policy.infer(observation) for _ in range(3)]
    policy.infer({"reset": 5})
    seeded = [policy.infer(observation)["actions"].tolist() for _ in range(2)]
    try:
        policy.infer({"position": np.zeros(3)})
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    broker = action_chunk_broker.ActionChunkBroker(policy, action_horizon=2)
    of_steps = [broker.infer(observation) for _ in range(2)]
    steps = [{"actions": step["actions"].tolist(), "held_back": step["held_back"]} for step in of_steps]
    said = {
        "metadata": policy.get_server_metadata(),
        "actions": [answer["actions"].tolist() for answer in answers],
        "answer": sorted(answers[0]),
        "seeded": seeded,
        "refused": refused,
        "steps": steps,
    }
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
