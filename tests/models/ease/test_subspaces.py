"""EASE's prototypes: what cannot be measured, and the scores, against the reference."""

import pytest
import torch

from models.ease.subspaces import SubspacePrototypes, concatenated_scores, subspace_scores, synthesise, task_rows
from tests.conftest import reference
from tests.convs.vits import close, numbers

CASES = ["plain", "pretrained"]


def blocks_of(arrays, key: str, width: int) -> torch.Tensor:
    return torch.from_numpy(arrays[key]).unflatten(1, (-1, width))


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("which", "key"), [("all", "all"), ("newest", "newest")])
def test_synthesis_of_the_reference(case, which, key):
    """Task by task, each with what the tasks before have written."""
    arrays = reference(f"ease/synthesis_{case}")
    sizes, width = arrays["sizes"].tolist(), int(arrays["width"])
    measured, plain = blocks_of(arrays, "measured", width), case == "pretrained"
    prototypes = SubspacePrototypes(width).double()
    for task in numbers(arrays, rf"{key}/(\d+)"):
        new = task_rows(sizes[: task + 1])[task]
        prototypes.add(measured[new, : task + 1 + plain], sizes[: task + 1], plain, which)
        close(prototypes.matrix, arrays[f"{key}/{task}"], 1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_scores_of_the_reference(case):
    arrays = reference(f"ease/reweight_{case}")
    sizes, width, plain = arrays["sizes"].tolist(), int(arrays["width"]), case == "pretrained"
    weight, features = (blocks_of(arrays, key, width) for key in ("weight", "features"))
    sigma, alpha = arrays["sigma"].item(), arrays["alpha"].item()
    for task in numbers(arrays, r"reweighted/(\d+)"):
        rows, blocks = sum(sizes[: task + 1]), task + 1 + plain
        beta = arrays["beta"].item() if plain else None
        scores = subspace_scores(features[:, :blocks], weight[:rows, :blocks], sizes[: task + 1], alpha, beta)
        close(sigma * scores, arrays[f"reweighted/{task}"], 1e-12)
        plain_scores = concatenated_scores(features[:, :blocks], weight[:rows, :blocks])
        close(sigma * plain_scores, arrays[f"plain/{task}"], 1e-12)


def test_one_product_per_block_is_the_loop_over_pairs():
    torch.manual_seed(0)
    sizes, width = [2, 3, 1], 4
    matrix = torch.randn(6, 3, width, dtype=torch.float64)
    expected, rows = matrix.clone(), task_rows(sizes)
    for i in range(3):
        for j in range(i + 1, 3):
            for a in range(rows[i].start, rows[i].stop):
                later = range(rows[j].start, 6)
                similar = torch.stack([torch.cosine_similarity(matrix[a, i], matrix[b, i], dim=0) for b in later])
                expected[a, j] = sum(s * matrix[b, j] for s, b in zip(similar.softmax(dim=0), later, strict=True))
    synthesise(matrix, sizes, plain=False, which="all")
    torch.testing.assert_close(matrix, expected, atol=1e-12, rtol=0)
    untouched = matrix.clone()
    synthesise(matrix, sizes, plain=False, which="none")
    assert torch.equal(matrix, untouched)
