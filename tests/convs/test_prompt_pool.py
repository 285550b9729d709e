"""Choice of entries, prefixes and components of the prompt family against the references, part by part."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from convs.heads import LinearHead
from convs.prompt_pool import Components, DualPrefixes, TokenPool, choose, cosines, new_rows
from convs.prompts import PrefixAttention, insert
from tests.conftest import bare_backbone, reference
from tests.models.prompt_runs import PARTS

pytestmark = pytest.mark.parity
ATOL = 1e-10


def tensors(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in reference(name).items() if value.dtype.kind in "fiu"}


def close(found, expected, name: str = "") -> None:
    np.testing.assert_allclose(found.detach().numpy(), np.asarray(expected), atol=ATOL, rtol=0, err_msg=name)


@pytest.mark.parametrize("mode", ["instance", "vote"])
def test_pool_of_l2p(mode):
    arrays = tensors("l2p/pool")
    for case in range(int(arrays["cases"])):
        keys, prompts = (arrays[f"{case}/{n}"].double().requires_grad_() for n in ("keys", "prompts"))
        queries, x, top_k = arrays[f"{case}/queries"], arrays[f"{case}/x"], int(arrays["top_k"])
        similarity = cosines(queries, keys)
        close(similarity, arrays[f"{case}/{mode}/similarity"])
        stored = arrays[f"{case}/{mode}/idx"].long()
        chosen = choose(similarity, top_k, mode == "vote")
        assert [set(row) for row in chosen.tolist()] == [set(row) for row in stored.tolist()]
        pull = similarity.gather(1, chosen).sum(dim=1).mean()
        close(pull, arrays[f"{case}/{mode}/reduce_sim"])
        tokens = torch.cat([prompts[stored].flatten(1, 2), x], dim=1)
        close(tokens, arrays[f"{case}/{mode}/tokens"])
        loss = (tokens * arrays[f"{case}/{mode}/w"]).sum() - float(arrays["coefficient"]) * pull
        loss.backward()
        close(prompts.grad, arrays[f"{case}/{mode}/grad_prompts"])
        close(keys.grad, arrays[f"{case}/{mode}/grad_keys"])


def test_ties_of_the_vote_go_to_the_lower_entry():
    arrays = tensors("l2p/vote_ties")
    for case in range(int(arrays["cases"])):
        similarity = cosines(arrays[f"{case}/queries"].double(), arrays[f"{case}/keys"].double())
        count = int(arrays[f"{case}/top_k"])
        assert choose(similarity, count, False).sort(dim=1).values.tolist() == arrays[f"{case}/instance"].tolist()
        for row in choose(similarity, count, True):
            assert sorted(row.tolist()) == arrays[f"{case}/vote"].tolist()


def test_prompt_tokens_get_the_class_token_s_position():
    """Upstream enlarges the table; we add its first row to each token."""
    arrays = tensors("l2p/pos_embed")
    for case in range(int(arrays["cases"])):
        position, count = arrays[f"{case}/pos_embed"], int(arrays[f"{case}/prompt_tokens"])
        side, width = int((position.shape[1] - 1) ** 0.5), position.shape[2]
        vit = VisionTransformer(img_size=4 * side, patch_size=4, embed_dim=width, depth=1, num_heads=1, num_classes=0)
        vit.pos_embed.data = position.float()
        x = vit.pos_embed.data  # what an image of zeros with a class token of zeros enters as
        found = insert(vit, x, torch.zeros(1, count, width))
        torch.testing.assert_close(found, arrays[f"{case}/enlarged"].float())


STARTS = {"l2p/prompts": "prompts", "l2p/keys": "keys", "dual/g_prompt": "g_prompt", "dual/e_prompts": "e_prompts",
          "dual/keys": "keys"}  # fmt: skip


def check_uniform(values, bound: float, slack: float, spread: float) -> None:
    assert values.abs().max() <= bound and values.min() + bound < slack and bound - values.max() < slack
    assert values.std().item() == pytest.approx(0.577 * bound, rel=spread)


def test_starts():
    arrays = reference("l2p/start")
    torch.manual_seed(0)
    entries, length, width = arrays["l2p/prompts/shape"].tolist()
    heads = arrays["dual/e_prompts/shape"].tolist()[-2]
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=width, depth=5, num_heads=heads, num_classes=0)
    pool = TokenPool(
        bare_backbone(vit, width), lambda w: LinearHead(w, init="trunc_normal"), "none", entries, length, 1
    )
    assert list(pool.keys.shape) == arrays["l2p/keys/shape"].tolist()
    sets, _, pool_size, e_length, *_ = arrays["dual/e_prompts/shape"].tolist()
    g_sets, _, g_length, *_ = arrays["dual/g_prompt/shape"].tolist()
    dual = DualPrefixes(
        bare_backbone(vit, width), LinearHead, "none", g_blocks=range(g_sets), g_length=g_length,
        e_blocks=range(g_sets, g_sets + sets), e_length=e_length, entries=pool_size, count=1, reshaped=False,
    )  # fmt: skip
    for name, attribute in STARTS.items():
        values = getattr(pool if name.startswith("l2p") else dual, attribute)
        assert list(values.shape) == arrays[f"{name}/shape"].tolist(), name
        check_uniform(values.detach(), 1.0, 0.05, 0.1)
    classes, width = arrays["head/weight/shape"].tolist()
    head = LinearHead(width, init="trunc_normal")
    head.grow(classes)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.05) and head.weight.abs().max() > 0.05
    assert not head.bias.any()
    head = LinearHead(width, init="torch")
    head.grow(classes)
    bound = width**-0.5
    for values in (head.weight.detach(), head.bias.detach()):
        check_uniform(values, bound, 0.1 * bound, 0.15)


def test_prefixes_of_dualprompt():
    arrays = tensors("dualprompt/e_prompt")
    count, prompts = int(arrays["top_k"]), arrays["prompts"].double()
    network = nn.Module.__new__(DualPrefixes)
    nn.Module.__init__(network)
    network.e_prompts, network.shape, network.count = prompts, tuple(prompts.shape[-2:]), count
    for batch in arrays["batches"].tolist():
        for mode in ("instance", "vote", "mask"):
            keys = arrays["keys"].double().clone().requires_grad_()
            similarity = cosines(arrays[f"{batch}/queries"].double(), keys)
            chosen = network.chosen(similarity, mode == "vote", range(count) if mode == "mask" else None)
            stored = arrays[f"{batch}/{mode}/idx"].long()
            assert [set(row) for row in chosen.tolist()] == [set(row) for row in stored.tolist()]
            for layout in ("upstream", "correct"):
                network.reshaped = layout == "upstream"
                close(network.laid_out(stored), arrays[f"{batch}/{mode}/{layout}"], f"{batch} {mode}")
            pull = similarity.gather(1, chosen).sum(dim=1).mean()
            close(pull, arrays[f"{batch}/{mode}/reduce_sim"])
            pull.backward()
            close(keys.grad, arrays[f"{batch}/{mode}/grad_keys"], f"{batch} {mode}")


def test_attention_with_prefixes():
    arrays = tensors("dualprompt/prefix_attention")
    state = {key[5:]: value for key, value in arrays.items() if key.startswith("attn/")}
    width = state["proj.weight"].shape[0]
    plain = Attention(width, num_heads=int(arrays["heads"]), qkv_bias="qkv.bias" in state).double().eval()
    plain.load_state_dict(state)
    attention = PrefixAttention(plain)
    x, prefix = arrays["x"].double().requires_grad_(), arrays["prefix"].double().requires_grad_()
    close(attention(x), arrays["y_without"])
    attention.prefix = (prefix[:, 0].transpose(1, 2), prefix[:, 1].transpose(1, 2))
    y = attention(x)
    close(y, arrays["y"])
    (y * arrays["w"]).sum().backward()
    close(x.grad, arrays["grad_x"])
    close(prefix.grad, arrays["grad_prefix"])


def test_gram_schmidt_of_coda_prompt():
    arrays = tensors("coda_prompt/gram_schmidt")
    for task in range(int(arrays["tasks"])):
        for kind in ("matrix", "prompts"):
            before, draws, after = (arrays[f"{task}/{kind}/{name}"].double() for name in ("before", "draws", "after"))
            first, last = task * len(draws), (task + 1) * len(draws)
            flat = before.flatten(1)
            expected = after.flatten(1)
            assert torch.equal(expected[:first], flat[:first]) and not expected[last:].any()
            close(new_rows(flat[:first], draws), expected[first:last], f"{task} {kind}")


def test_components_of_coda_prompt():
    arrays = tensors("coda_prompt/components")
    tasks = int(arrays["tasks"])
    for case in sorted({key.rpartition("/")[0] for key in arrays if "/P" in key}):
        mu, task = float(case.split("/")[0].removeprefix("mu")), int(case.split("/")[1].removeprefix("task"))
        entries, length, width = arrays[f"{case}/P"].shape
        parts = Components(entries, length, width).double()
        for name, attribute in PARTS.items():
            getattr(parts, attribute).data.copy_(arrays[f"{case}/{name}"])
        each = entries // tasks
        rows = task * each, (task + 1) * each
        prefix = parts(arrays[f"{case}/queries"].double(), *rows)
        key, value = prefix[:, : length // 2], prefix[:, length // 2 :]
        close(key, arrays[f"{case}/key_prefix"])
        close(value, arrays[f"{case}/value_prefix"])
        penalty = mu * parts.penalty(*rows)
        close(penalty, arrays[f"{case}/penalty"])
        ((key * arrays[f"{case}/w_key"]).sum() + (value * arrays[f"{case}/w_value"]).sum() + penalty).backward()
        for name, attribute in PARTS.items():
            close(getattr(parts, attribute).grad, arrays[f"{case}/grad_{name}"], f"{case} {name}")
