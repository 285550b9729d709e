"""The data sets of the literature, a module each: its row of facts, and the reader of its layout where it has its own.

Importing this package registers them all; a new data set is a new module here, and no list to edit.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
