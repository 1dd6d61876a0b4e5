__version__ = "0.1.0"

import sys


class _Mend:
    "A torchvision built for CUDA does not import beside a CPU torch: declare what it misses (`vlkd.core.device`) just before somebody imports it. Costs nothing until then."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls in sys.meta_path:
            sys.meta_path.remove(cls)
            import vlkd.core.device # noqa: F401

sys.meta_path.insert(0, _Mend)
