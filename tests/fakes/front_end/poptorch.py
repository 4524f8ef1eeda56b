"""`import poptorch` imports PopTorch's real front end, with this folder on PYTHONPATH.

Needs POPTORCH_SRC (docs/ipu.md, section 12).
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
del sys.modules[__name__]  # the import that is under way takes what replaces it

from fakes import loading  # noqa: E402

loading._install()
