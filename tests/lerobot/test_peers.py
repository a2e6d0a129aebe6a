"""LeRobot's own policies behind keygrip's protocol (benchmarks/peers)."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keygrip.data.robot.discovery import find_demos
from keygrip.runtime.client import RemotePolicy

pytestmark = pytest.mark.lerobot
PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def peers() -> Any:
    return script("serve")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"peers_{name}", PEERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = {
    "act": {"chunk_size": 4, "n_action_steps": 2, "dim_model": 32, "n_heads": 2, "dim_feedforward": 32},
    "diffusion": {"down_dims": (32, 64), "num_inference_steps": 2, "n_action_steps": 2},
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_served_peer_acts_as_lerobot_does(made: Any, peers: Any, tmp_path: Path, kind: str) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.policies.factory import make_policy, make_policy_config, make_pre_post_processors

    dataset = LeRobotDataset("local/demos", root=made.dataset, video_backend="pyav")
    torch.manual_seed(0)
    config = make_policy_config(kind, device="cpu", push_to_hub=False, pretrained_backbone_weights=None, **SMALL[kind])
    policy = make_policy(config, ds_meta=dataset.meta).eval()
    before, after = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    policy.save_pretrained(tmp_path)
    before.save_pretrained(tmp_path)
    after.save_pretrained(tmp_path)
    peer = peers.PeerPolicy(tmp_path, 10.0, ("right",))
    assert peer.needs.cameras == ("over", "front")
    other = peer.session()
    peer.reset(3)
    other.reset(4)
    arm = find_demos(made.dataset)[0].read().arms["right"]
    torch.manual_seed(3)
    policy.reset()
    for frame in range(4):
        item = dataset[frame]
        observation = {
            "position": arm.position[frame][None],
            "quaternion": -arm.quaternion[frame][None],  # the same rotation
            "gripper": arm.gripper[frame][None],
            "cameras": {
                name: {"image": (item[f"observation.images.{name}"] * 255).round().byte().permute(1, 2, 0).numpy()}
                for name in ("over", "front")
            },
        }
        plan = peer.plan(observation)
        other.plan(observation)  # another session changes nothing
        inputs = {key: item[key] for key in item if key.startswith("observation.")}
        with torch.no_grad():
            action = after(policy.select_action(before(inputs)))[0].numpy().astype(np.float64)
        assert (plan.position.shape, plan.step_seconds) == ((1, 1, 3), 0.1)
        np.testing.assert_allclose(plan.position[0, 0], action[:3], atol=1e-4)
        np.testing.assert_allclose(plan.quaternion[0, 0], action[3:7] / np.linalg.norm(action[3:7]), atol=1e-4)
        np.testing.assert_allclose(plan.gripper[0, 0], np.clip(action[7], 0, 1), atol=1e-4)


def test_the_published_size_has_the_published_number_of_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer, SmolVLMForConditionalGeneration

    monkeypatch.syspath_prepend(str(PEERS))
    made = importlib.import_module("smolvla")
    made.write_vlm(tmp_path / "vlm", made.SIZES["500m"], ["open the drawer", "push the puck"])
    with torch.device("meta"):
        vlm = SmolVLMForConditionalGeneration(AutoConfig.from_pretrained(tmp_path / "vlm"))
    assert sum(value.numel() for value in vlm.parameters()) == 507_482_304
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "vlm")
    assert tokenizer.decode(tokenizer("push the drawer\n")["input_ids"]) == "push the drawer\n"
    assert len(tokenizer("push the puck")["input_ids"]) == 3  # trained on these words
    processor = AutoProcessor.from_pretrained(tmp_path / "vlm")
    assert processor.image_seq_len == 64
    assert processor.tokenizer.fake_image_token_id != processor.tokenizer.global_image_token_id


@pytest.mark.parametrize(
    ("length", "asked", "trained_min"),
    [(["--minutes=1"], [10, 60, 120], 0.8), (["--steps=90"], [90], 1.5), (["--steps", "90"], [90], 1.5)],
)
def test_a_run_that_leaves_its_time_unused_is_trained_anew_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    length: list[str],
    asked: list[int],
    trained_min: float,
) -> None:
    monkeypatch.syspath_prepend(str(PEERS))
    train = importlib.import_module("train")
    counts: list[int] = []
    step_s = [1.0, 0.5, 0.4]  # the probe ran in parallel with other work

    def lerobot_train(dataset: Path, policy: str, output: Path, steps: int, *rest: Any) -> str:
        output.mkdir(parents=True)  # LeRobot refuses a folder that exists
        counts.append(steps)
        return f"loss:2.0 updt_s:{step_s[len(counts) - 1]:.3f} data_s:0.000\n" * 2

    monkeypatch.setattr(train, "lerobot_train", lerobot_train)
    arguments = ["--dataset", "SET", "--policy", "act", "--output", str(tmp_path / "run"), *length]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert counts == asked
    assert ("trained anew" in said.err) == (len(asked) == 3)
    assert (report["steps"], report["trained_min"]) == (asked[-1], trained_min)


@pytest.fixture(scope="module")
def smolvla(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps of the small SmolVLA, by train.py, with a checkpoint after each."""
    run = tmp_path_factory.mktemp("smolvla") / "run"
    finished = subprocess.run(
        [
            sys.executable, str(PEERS / "train.py"), "--dataset", str(made.dataset), "--policy", "smolvla", "--steps",
            "3", "--output", str(run), "--batch-size", "2", "--policy.chunk_size=4", "--policy.n_action_steps=1",
            "--save_freq=1",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    report = json.loads(finished.stdout.splitlines()[-1])
    assert (report["policy"], report["vlm_size"]) == ("smolvla", "small")
    return run


def test_smolvla_starts_random_and_trains_all_of_its_parts(smolvla: Path) -> None:
    from safetensors.torch import load_file

    first, last = (
        load_file(smolvla / "checkpoints" / name / "pretrained_model" / "model.safetensors")
        for name in ("000001", "last")
    )
    config = json.loads((smolvla / "checkpoints" / "last" / "pretrained_model" / "config.json").read_text())
    assert (config["load_vlm_weights"], config["attention_mode"], config["expert_width_multiplier"]) == (
        False, "cross_attn", 0.75,
    )  # fmt: skip
    inside = "model.vlm_with_expert."
    layers = [f"{inside}vlm.model.text_model.layers.{number}." for number in range(4)]
    assert not any(name.startswith(f"{inside}vlm.model.text_model.layers.4.") for name in first)  # 4 of 8 layers kept
    trained = {
        "vision encoder": f"{inside}vlm.model.vision_model.",
        "connector": f"{inside}vlm.model.connector.",
        **{f"language model, layer {number}": layer for number, layer in enumerate(layers[:3])},
        "language model, last layer's keys": f"{layers[3]}self_attn.k_proj.",  # nothing reads its output
        "expert": f"{inside}lm_expert.",
        "state": "model.state_proj.",
    }
    for part, prefix in trained.items():
        weights = [name for name, value in first.items() if name.startswith(prefix) and value.ndim > 1]
        assert weights, part
        same = [name for name in weights if torch.equal(first[name], last[name])]
        assert not same, (part, same)


def test_the_instruction_reaches_smolvla_behind_the_server(made: Any, smolvla: Path) -> None:
    demos = [reference.read() for reference in find_demos(made.dataset)]
    instructions = [demo.instruction for demo in demos]
    assert len(set(instructions)) == 2
    arm = demos[0].arms["right"]
    observation = {
        "position": arm.position[0][None],
        "quaternion": arm.quaternion[0][None],
        "gripper": arm.gripper[0][None],
        "cameras": {name: {"image": track.frames.read(0)} for name, track in demos[0].cameras.items()},
    }
    checkpoint = smolvla / "checkpoints" / "last" / "pretrained_model"
    command = [sys.executable, str(PEERS / "serve.py"), "--checkpoint", str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            lines = iter(server.stdout.readline, "")
            url = next(json.loads(line)["url"] for line in lines if line.startswith("{"))
            with RemotePolicy(url) as policy:
                assert policy.needs.instruction
                assert policy.needs.cameras == ("over", "front")

                def planned(instruction: str) -> np.ndarray:
                    policy.reset(3)
                    return policy.plan(observation | {"instruction": instruction}).position

                one, again, other = map(planned, (instructions[0], instructions[0], instructions[1]))
        finally:
            server.terminate()
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps=0"], "--steps 0: at least 1"),
        (["--steps=5", "--log_freq=1000"], "--log_freq follows from the number of steps here"),
        (["--minutes=1", "--log_freq", "1000"], "--log_freq follows from the number of steps here"),
    ],
)
def test_settings_after_which_no_time_of_a_step_is_known_are_refused_before_the_training(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(PEERS)
    train = script("train")
    monkeypatch.setattr(train, "lerobot_train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset=set", "--policy=act", "--output=run", *given])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert said in capsys.readouterr().err
