"""Stored stages of the prompt family, fed to our learners through the real loop, in float64."""

import re

import numpy as np
import torch

from models.parts.evaluation import scored
from models.parts.loop import Observer, learn
from tests.conftest import build_tiny, write_stream
from tests.stages import ExactRuntime, Given, in_stored_order, stored_task

ATOL = 1e-10
PARTS = {"P": "prompts", "K": "keys", "A": "attention"}  # of CODA-Prompt's components
OURS = {
    "prompt.prompt": "prompts",
    "prompt.prompt_key": "keys",
    "e_prompt.prompt": "e_prompts",
    "e_prompt.prompt_key": "keys",
    "fc.weight": "head.weight",
    "fc.bias": "head.bias",
}


def ours(name: str) -> str:
    """A parameter of the reference under our network's name."""
    if match := re.fullmatch(r"prompt\.e_([pka])_(\d+)", name):
        return f"components.{match[2]}.{PARTS[match[1].upper()]}"
    return OURS.get(name, name)


def below(arrays, prefix: str) -> dict[str, torch.Tensor]:
    return {key[len(prefix) :]: torch.from_numpy(v).double() for key, v in arrays.items() if key.startswith(prefix)}


def load(network, arrays, vit: str, trained: str) -> None:
    """Stored ViT and trained parameters into our network; each one finds its place."""
    state = {f"backbone.model.{name}": value for name, value in below(arrays, vit).items()}
    state |= {ours(name): value for name, value in below(arrays, trained).items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and not missing, (missing, unexpected)


def architecture(arrays) -> dict:
    size, patch, width, depth, heads = arrays["arch"].tolist()
    return {
        "name": "vit",
        "img_size": size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
    }


def build(name: str, tmp_path, backbone: dict, sizes: list[int], **keys):
    """The learner in float64, for tasks of these sizes."""
    size = backbone["img_size"]
    dataset = write_stream(tmp_path / "stream.npz", classes=sum(sizes), size=size)
    values = {"pool_size": None, "top_k": None, "prompt_length": None, "blocks": None, "drop_last": None} | keys
    values = {key: value for key, value in values.items() if value is not None or key not in keys}
    _, learner = build_tiny(
        tmp_path, name, dataset=dataset, increment=None, task_sizes=sizes, shuffle=False, backbone=backbone,
        image_size=size, normalize="none", **{key: value for key, value in values.items() if value is not None},
    )  # fmt: skip
    learner = learner.double()
    learner.runtime = ExactRuntime("cpu", "fp32", num_workers=0)
    return learner


class Steps(Observer):
    """Losses of every step, and the parameters behind some of them."""

    def __init__(self, learner):
        self.learner, self.losses, self.after, self.entries = learner, [], [], []
        self.rates: list[float] = []
        loss = learner.loss

        def noted(net, inputs, targets):
            value = loss(net, inputs, targets)
            self.losses.append(float(value.detach()))
            return value

        learner.loss = noted

    def step_done(self, fit):
        self.rates.append(fit.optimizer.param_groups[-1]["lr"])
        state = self.learner.network.state_dict()
        self.after.append({name: value.clone() for name, value in state.items() if not name.startswith("backbone.")})


def run_steps(learner, arrays, monkeypatch) -> None:
    """Every stored task: losses, parameters behind the steps that are stored, scores of one test batch."""
    bounds = arrays["bounds"].tolist()
    sizes = np.diff(bounds).tolist()
    in_stored_order(monkeypatch)
    loss = learner.loss
    for index in range(len(sizes)):
        task = stored_task(index, sizes, Given(arrays[f"task{index}/x"], arrays[f"task{index}/y"]))
        learner.loss = loss
        steps = Steps(learner)
        learn(learner, task, steps)
        np.testing.assert_allclose(steps.losses, arrays[f"task{index}/losses"].reshape(-1), atol=ATOL, rtol=0)
        stored = {int(m[1]) for key in arrays if (m := re.match(rf"task{index}/after(\d+)/", key))}
        assert stored
        for step in stored:
            for name, value in below(arrays, f"task{index}/after{step}/").items():
                found = steps.after[step][ours(name)]
                np.testing.assert_allclose(found, value, atol=ATOL, rtol=0, err_msg=f"{index} {step} {name}")
        test = Given(arrays["x_test"], np.zeros(len(arrays["x_test"])))
        learner.eval()
        ((scores, _, _),) = list(scored(learner, test, None, len(test)))
        np.testing.assert_allclose(scores["logits"], arrays[f"task{index}/test_logits"], atol=ATOL, rtol=0)
        assert scores["logits"].argmax(dim=1).tolist() == arrays[f"task{index}/predictions"].tolist()


VARIANTS = {
    "qk_norm": {"qk_norm": True},
    "registers": {},
    "registers_no_embed": {"no_embed_class": True},
    "average": {"global_pool": "avg"},
}


def variant_backbone(arrays, variant: str) -> dict:
    """The constructor of a stored timm variant, every size read from its arrays."""
    vit = below(arrays, f"{variant}/vit/")
    tokens = vit["reg_token"].shape[1] if "reg_token" in vit else 0
    depth = 1 + max(int(name.split(".")[1]) for name in vit if name.startswith("blocks."))
    return {
        "name": "vit", "img_size": arrays["x"].shape[-1], "patch_size": int(arrays["patch"]),
        "embed_dim": vit["patch_embed.proj.weight"].shape[0], "depth": depth, "num_heads": int(arrays["heads"]),
        **({"reg_tokens": tokens} if tokens else {}), **VARIANTS[variant],
    }  # fmt: skip


def noisy(backbone: dict) -> dict:
    """The same with every dropout that timm has."""
    rates = ("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
    return backbone | dict.fromkeys(rates, 0.3)
