"""Let torchvision be imported beside a PyTorch that it was not built for.

timm imports torchvision for its transforms, which are Pillow's. Its compiled operators do not load
beside such a PyTorch, and the import ends with "operator torchvision::nms does not exist". This
module declares the operators by name, which suffices, since none is called:

    PYTHONPATH=tests/golden/torchvision_names python …

Do not use it where torchvision fits PyTorch: `python -c 'import torchvision'` tells.
"""

import importlib.util
import re
import sys
from pathlib import Path


class Declarations:
    """Declares torchvision's operators when torchvision is first imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            spec = importlib.util.find_spec(name)
            if spec is not None:
                text = Path(spec.origin).with_name("_meta_registrations.py").read_text()
                self.library = torch.library.Library(name, "FRAGMENT")  # undone with its last name
                sys.torchvision_names = self
                for operator in set(re.findall(r'"torchvision::(\w+)"', text)):
                    self.library.define(f"{operator}(Tensor any) -> Tensor")


sys.meta_path.insert(0, Declarations())
