"""Networks: backbones, their weights, and heads."""
