"""timm's inference.py, by the calls that it makes: create_model, create_dataset, create_loader,
softmax, top-k.

timm's package does not carry the script itself; this follows its loop, options and defaults (batch
256, two loading processes, top-1, everything kept until the end). fp32, or bf16 and fp16 as its
`--amp --amp-dtype`. Weights are random: speed does not depend on them.

timm imports torchvision; where PyTorch was built apart from it, its compiled operators do
not load. timm uses none of them on this path (the transforms are Pillow's), so their names alone
are declared before the import.
"""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext

import numpy as np
from common import Meter, architecture, arguments


def import_timm() -> None:
    import torch

    declared = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[module]
            declared.define(f"{missing[1]}(Tensor any) -> Tensor")
        else:
            _KEPT.append(declared)
            return


_KEPT: list[object] = []
"""What is declared is undone with the object that declared it."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--device", default="cpu", help="as PyTorch spells it")
    parser.add_argument("--network", help="as timm spells it (default: the bundle's architecture)")
    parser.add_argument(
        "--channels-last", action="store_true", help="as inference.py's option of that name"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    meter = Meter()
    import_timm()
    import torch
    from timm import create_model
    from timm.data import create_dataset, create_loader, resolve_data_config

    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    if device.type == "cuda":  # as the script does
        torch.backends.cudnn.benchmark = True
    network = asked.network or architecture(asked.model_dir)
    model = create_model(network, pretrained=False).to(device).eval()
    if asked.channels_last:
        model = model.to(memory_format=torch.channels_last)
    config = resolve_data_config({}, model=model)
    dataset = create_dataset(root=asked.images, name="")
    if asked.limit:
        dataset.reader.samples = dataset.reader.samples[: asked.limit]
    loader = create_loader(
        dataset,
        batch_size=asked.batch_size,
        use_prefetcher=True,
        num_workers=asked.workers,
        device=device,
        img_dtype=torch.float32,
        **config,
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(asked.precision)
    mixed = nullcontext() if dtype is None else torch.autocast(device.type, dtype)
    indices, outputs = [], []
    with torch.inference_mode():
        for batch, _ in loader:
            if asked.channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)  # noqa: PLW2901
            with mixed:
                output = model(batch)
            output, index = output.softmax(-1).topk(1)
            indices.append(index.cpu().numpy())
            outputs.append(output.float().cpu().numpy())
            meter.done(len(index))
    assert len(np.concatenate(indices)) == len(np.concatenate(outputs)) == len(dataset)
    meter.report(
        f"timm {asked.precision}" + (" channels-last" if asked.channels_last else ""),
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
