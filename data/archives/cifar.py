"""CIFAR-10 and CIFAR-100, as torchvision unpacks them."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from data.checks import Findings
from data.layouts import (
    LAYOUTS,
    Layout,
    Options,
)
from data.records import ImageData, Split
from data.rows import Row, Variant, add_row


class _ArraysOnly(pickle.Unpickler):
    """CIFAR is published as pickles; numbers, texts and arrays are all that they hold, and all that is loaded."""

    ALLOWED = {("_reconstruct",), ("ndarray",), ("dtype",), ("encode",)}

    def find_class(self, module: str, name: str) -> Any:
        if (name,) not in self.ALLOWED or module.partition(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def cifar(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """The batches as torchvision unpacks them: pickled dicts with data uint8 (N, 3072), channel by channel."""
    from torchvision.datasets import CIFAR10, CIFAR100

    official: Any = CIFAR10 if row.classes == 10 else CIFAR100
    label_key = "labels" if row.classes == 10 else "fine_labels"
    if options.split != "folder":
        findings.error("D03", f'its halves are fixed: split must be "folder", is "{options.split}"')
        return None
    meta = _read_batch(place, official.meta["filename"], official.meta["md5"], findings)
    splits = {}
    for half, files in (("train", official.train_list), ("test", official.test_list)):
        batches = [_read_batch(place, name, md5, findings) for name, md5 in files]
        images = [np.asarray(b.get("data", ())) for b in batches]
        labels = [np.asarray(b.get(label_key, ()), dtype=np.int64) for b in batches]
        for (name, _), x, y in zip(files, images, labels, strict=True):
            if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072 or len(x) != len(y):
                findings.error("D11", f"'{place / name}' is incomplete or damaged; delete '{place}' and run again")
        if not findings.of("error"):
            pixels = np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            splits[half] = Split(np.ascontiguousarray(pixels), np.concatenate(labels))
    if findings.of("error"):
        return None
    return ImageData(row.key, splits["train"], splits["test"], tuple(meta[official.meta["key"]]), variant="folder")


def _read_batch(place: Path, name: str, md5: str, findings: Findings) -> dict[str, Any]:
    path = place / name
    if not path.is_file():
        findings.error("D11", f"'{path}' is missing; delete '{place}' and run again, or unpack the archive again")
        return {}
    content = path.read_bytes()
    try:
        values = _load_arrays(content)
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises many types
        findings.error("D11", f"'{path}' is damaged ({error}); delete '{place}' and run again, or unpack it again")
        return {}
    if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        findings.doubt("D11", f"'{path}' differs from the official file (md5 {found}, not {md5}); unpack it again")
    return values


def _load_arrays(content: bytes) -> dict[str, Any]:
    import io

    values = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}, expected a dict")
    return values


def fetch_cifar(row: Row, root: Path) -> str | None:
    """Download and unpack CIFAR below data_root, or unpack the archive that lies there; a sentence when neither works
    (D11)."""
    from torchvision.datasets import CIFAR10, CIFAR100

    official: Any = CIFAR10 if row.classes == 10 else CIFAR100
    archive = root / official.filename
    had_archive = archive.is_file()
    if had_archive:
        md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        if md5 != official.tgz_md5:
            return f"'{archive}' is damaged (md5 {md5}, not {official.tgz_md5}); delete it and run again"
    try:
        official(str(root), download=True)
    except Exception as error:  # noqa: BLE001 - url, tar, pickle and checksum faults come as many types
        what = f"'{archive}' cannot be unpacked" if had_archive else "not found, and the download failed"
        return (
            f"{what} ({error}). Without a network, place the unpacked folder {official.base_folder} under '{root}', "
            "or point data_root (key, --data-root DIR, or PALIMPSEST_DATA) at the folder that holds it"
        )
    return None


def _fits_cifar(row: Row, place: Path) -> bool:
    return (place / ("batches.meta" if row.classes == 10 else "meta")).is_file()


LAYOUTS["cifar"] = Layout(cifar, _fits_cifar)
CIFAR100: dict[str, Any] = {
    "classes": 100,
    "layout": "cifar",
    "folders": ("cifar-100-python", "cifar100/cifar-100-python", "cifar/cifar-100-python"),
    "expects": "cifar-100-python/ with train, test and meta, as torchvision unpacks it",
    "source": "University of Toronto, through torchvision",
    "variants": (Variant("official", 50_000, 10_000),),
}
add_row(
    Row(
        key="cifar10",
        title="CIFAR-10",
        classes=10,
        layout="cifar",
        folders=("cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar/cifar-10-batches-py"),
        expects="cifar-10-batches-py/ with data_batch_1..5, test_batch and batches.meta, as torchvision unpacks it",
        source="University of Toronto, through torchvision",
        variants=(Variant("official", 50_000, 10_000),),
    )
)
add_row(Row(key="cifar100", title="CIFAR-100, 32 px", **CIFAR100))
add_row(Row(key="cifar224", title="CIFAR-100, enlarged by the transforms", **CIFAR100))
