"""Peak memory of PPO with four models and on one trunk, each in a process of its own.

A Llama of 91M parameters and few short answers, so that weights, gradients and Adam's moments are most of it. Two
iterations of one update: in the second the optimiser has all its state. What is read is the largest resident set
(``ru_maxrss``); beside it stands what the process had when Python and its libraries were loaded and no model was built.
"""

import json
import resource
import subprocess
import sys

LARGE = {"width": 768, "depth": 12, "heads": 12, "answers": 8, "new_tokens": 16, "epochs": 1, "micro_batch": 4}


def resident() -> float:
    """The largest so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measure(mode: str, reward: str) -> dict[str, float]:
    """MB of this process: ``loaded`` before there is a model, and ``peak``; and millions of the policy's parameters."""
    import torch

    from align.scorers import FunctionScorer, ModelScorer
    from benchmarks import ppo
    from fledge.models import language
    from fledge.models.adapters import LoRAConfig

    torch.set_num_threads(1)
    torch.manual_seed(0)
    setting = ppo.Setting(**LARGE)
    if mode == "one trunk":
        import peft  # noqa: F401  (part of what is loaded)
    loaded = resident()
    policy = ppo.causal(setting)
    size = language.size(policy) / 1e6
    if reward == "model":
        scorer = ModelScorer(ppo.reward_of(setting), "fp32", setting.micro_batch)
    else:
        scorer = FunctionScorer(lambda records, texts: [float(len(text)) for text in texts], "length")
    iteration = ppo.ours(setting, policy, scorer, LoRAConfig() if mode == "one trunk" else None)
    for i in range(2):
        iteration(i)
    return {"loaded": loaded, "peak": resident(), "parameters": size}


def main() -> None:
    for reward in ("function", "model"):
        found = {mode: _apart(mode, reward) for mode in ("four models", "one trunk")}
        for mode, mb in found.items():
            print(
                f"{mode}, reward a {reward}, {mb['parameters']:.0f}M parameters: peak {mb['peak']:.0f} MB, "
                f"of which {mb['loaded']:.0f} MB libraries"
            )
        few, many = found["one trunk"], found["four models"]
        net = (few["peak"] - few["loaded"]) / (many["peak"] - many["loaded"])
        print(f"  one trunk / four models: {few['peak'] / many['peak']:.3f}; without libraries {net:.3f}", flush=True)


def _apart(mode: str, reward: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", mode, reward]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
