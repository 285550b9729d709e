"""DomainNet: six domains, class-incremental (pooled) or a task per domain."""

import os
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from data.checks import Findings, found_in
from data.domains import fits_domains, folder_split, stream_of
from data.images import images_below
from data.layouts import LAYOUTS, Layout, Options, entry
from data.records import ImageData, Split
from data.rows import Row, Variant, add_row
from data.splits import read_list, report_lines


def domainnet(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """<domain>/<class>/<file> chosen by <domain>_{train,test}.txt, lines "<domain>/<class>/<file> <label>".

    What stands before the domain in a line ("data/domainnet/...") is ignored. A row called `.._dil` is a stream of
    domains; otherwise all domains are pooled.
    """
    if not folder_split(options, findings):
        return None
    halves: dict[str, list[tuple[str, str, int]]] = {"train": [], "test": []}  # ("class/file" path, class, domain)
    for number, domain in enumerate(row.domains):
        _read_domain(place, domain, number, halves, findings)
    if findings.of("error"):
        return None
    classes = sorted({name for entries in halves.values() for _, name, _ in entries})
    if len(classes) != row.classes:
        findings.error("D05", f"expected {row.classes} classes in the lists, found {len(classes)}. Fetch them again")
        return None
    index = {name: label for label, name in enumerate(classes)}
    rows = {half: [(Path(p), index[name], d) for p, name, d in entries] for half, entries in halves.items()}
    data = replace(stream_of(row, rows, classes, findings), variant="official lists")
    if row.key.endswith("_dil"):
        return data
    train, test = (Split(split.images, split.labels) for split in (data.train, data.test))
    return ImageData(row.key, train, test, data.class_names, variant=data.variant)


def _read_domain(
    place: Path, domain: str, number: int, halves: dict[str, list[tuple[str, str, int]]], findings: Findings
) -> None:
    """Add the listed images of one domain to `halves`."""
    folder = entry(place, domain)
    if folder is None:
        findings.error(
            "D02", f"'{domain}/' missing under '{place}'; found: {found_in(place)}. Unpack {domain}.zip there"
        )
        return
    present = {str(path.relative_to(folder)) for path in images_below(folder)[0]}
    for half, entries in halves.items():
        name = f"{domain}_{half}.txt"
        path = entry(place, name, f"splits/{name}", f"{domain}/{name}")
        if path is None:
            findings.error("D02", f"'{name}' missing under '{place}': put the official list beside the domain folders")
            continue
        faults = []
        for where, text in read_list(path, findings) or ():
            parts = PureWindowsPath(text).parts
            lowered = [part.lower() for part in parts]
            below = parts[lowered.index(domain) + 1 :] if domain in lowered else parts[-2:]
            inside = os.path.join(*below) if below else ""
            if inside in present and len(below) > 1:
                entries.append((str(folder / inside), below[0], number))
            else:
                faults.append(f"{where}: no such image '{text}'")
        report_lines(faults, f"list '{path}'", findings)


LAYOUTS["domainnet"] = Layout(domainnet, fits_domains)
DOMAINNET: dict[str, Any] = {
    "classes": 345,
    "layout": "domainnet",
    "folders": ("domainnet", "DomainNet"),
    "expects": "<domain>/<class>/*.jpg with <domain>_train.txt and <domain>_test.txt",
    "source": 'Boston University, "cleaned" version',
    "variants": (Variant("official lists", 409_832, 176_743, ("?", "?")),),
    "domains": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
    "note": 'the "cleaned" and the original lists differ',
}
add_row(
    Row(
        key="domainnet",
        title="DomainNet, six domains pooled, class-incremental",
        **(DOMAINNET),  # type: ignore[arg-type]
    )
)
add_row(Row(key="domainnet_dil", title="DomainNet, a task per domain", **DOMAINNET))
