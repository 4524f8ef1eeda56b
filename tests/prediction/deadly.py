"""Settings with which a process ends at some files; in a module, so that a process imports them."""

from __future__ import annotations

import os
from typing import Union

import numpy as np

from cxr_vit.data.cache import CacheSettings


class Deadly(CacheSettings):
    """Ends the process at a file with `deadly` in its name, as a decoder does that crashes."""

    def decode(self, path: str) -> Union[np.ndarray, str]:
        if "deadly" in path:
            os._exit(9)
        return super().decode(path)
