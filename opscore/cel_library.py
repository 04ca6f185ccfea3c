"""`cel` without its command line, which it would load with itself: 7 MiB in every process."""

import sys
from types import ModuleType

_CLI = "cel.cli"

if "cel" in sys.modules:
    import cel
else:
    sys.modules[_CLI] = ModuleType(_CLI)
    try:
        import cel
    finally:
        del sys.modules[_CLI]

__all__ = ["cel"]
