"""Do two people have the same weights? One line says so, whatever the files are called and however they are stored."""

import argparse
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convs.backbones import make_backbone
from convs.weights import ASKED, WeightOptions
from utils.errors import ConfigError

COMMAND = "check-weights"
HELP = "load a weight file into a backbone; what fits, and the fingerprint of what the two compute"
DECIMALS = 4


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="weight file")
    parser.add_argument("--backbone", required=True, metavar="NAME", help="as the key backbone: a name, or JSON")
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels a side")
    parser.add_argument("--entry", metavar="NAME", help="as the key weights_entry: which network of the file")
    parser.add_argument("--resample-patch", action="store_true", help="as the key resample_patch")


def main(options: argparse.Namespace) -> int:
    how = WeightOptions(options.entry, options.resample_patch)
    print(check_file(_spec(options.backbone), options.file, options.image_size, how))
    return 0


def _spec(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def probe_images(size: int) -> Tensor:
    """(4, 3, size, size) float64 in [0, 1], made by whole-number arithmetic, so the same on every machine."""
    y, x, c, n = np.meshgrid(*(np.arange(k) for k in (size, size, 3, 4)), indexing="ij")
    values = (x * (3 + n) + y * (7 + 2 * n) + (x * y) // (5 + c) + 61 * c + 37 * n) % 256
    return torch.from_numpy(values.transpose(3, 2, 0, 1) / 255.0)


@torch.no_grad()
def fingerprint(model: nn.Module, size: int) -> tuple[str, list[float]]:
    """(16 hexadecimal digits, the first four features) of a model of images (B, 3, size, size).

    Computed in float64 and rounded to four decimals: differences between machines and libraries, some 1e-12, are far
    below what rounding keeps.
    """
    features = model.double().eval()(probe_images(size)).numpy()
    rounded = np.round(features * 10**DECIMALS).astype(np.int64)
    digest = hashlib.sha256(np.ascontiguousarray(rounded).tobytes()).hexdigest()
    return digest[:16], [float(value) for value in np.round(features.reshape(-1)[:4], DECIMALS)]


def check_file(
    spec: str | Mapping[str, Any], weights: str, image_size: int | None, options: WeightOptions = ASKED
) -> str:
    """What the command prints. Raises UserError when backbone and file do not fit."""
    if not isinstance(spec, str | Mapping) or not isinstance(image_size, int | None):
        raise ConfigError("check-weights", ['"backbone" must be a name or an object, "image_size" a whole number'])
    backbone = make_backbone(spec, weights, image_size, options)
    info, report = backbone.info, backbone.info.report
    digits, first = fingerprint(backbone, info.image_size)
    lines = [
        f"file         {weights}",
        f"sha256       {report.sha256}",
        f"backbone     {info.name}, {info.feature_dim} features, {info.image_size} px",
        f"matched      {100 * report.matched:.2f} % of the backbone's numbers",
        *(f"{label:<12} {', '.join(keys)}" for label, keys in
          (("missing", report.missing), ("not used", report.unexpected), ("entry", (report.entry,)),
           ("also there", report.others), ("done", report.done)) if any(keys)),
        f"fingerprint  {digits}  (first features {', '.join(f'{value:.4f}' for value in first)})",
    ]  # fmt: skip
    return "\n".join(lines)
