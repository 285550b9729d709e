"""Weights of timm's tags on the hub: the file in its cache, or fetched into it."""

from pathlib import Path

import timm

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


def hub_files(name: str) -> tuple[str, list[str]] | None:
    """(repository, names of the file, the usual one first) of a full tag; None where it lies elsewhere."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if cfg is None or not cfg.hf_hub_id:
        return None
    own = cfg.hf_hub_filename
    return cfg.hf_hub_id, [own] if own else [SAFE, PICKLED]


def cached(name: str) -> Path | None:
    """The file of a tag that was fetched before: a run that finds it asks no network."""
    from huggingface_hub import try_to_load_from_cache

    if (found := hub_files(name)) is None:
        return None
    repository, names = found
    places = (try_to_load_from_cache(repository, file) for file in names)
    return next((Path(place) for place in places if isinstance(place, str)), None)


def fetch(name: str) -> Path:
    """Into the cache, where it is not there yet. Raises what the hub raises; ValueError where the tag is not on it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if (there := cached(name)) is not None:
        return there
    if (found := hub_files(name)) is None:
        raise ValueError(f"timm names no file on the hub for '{name}'")
    repository, names = found
    for file in names[:-1]:
        try:
            return Path(hf_hub_download(repository, file))
        except LocalEntryNotFoundError:  # the hub was not reached, which says nothing of the file
            raise
        except EntryNotFoundError:  # older tags have the pickle alone
            continue
    return Path(hf_hub_download(repository, names[-1]))
