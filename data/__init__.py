"""Data sets: one table of sources, transforms, and the bundled digits, glyphs and small ViT."""
