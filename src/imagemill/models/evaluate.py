"""Run a model's file on a few images, outside any session."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imagemill.system.openvino_library import new_core


def answers(
    model_file: Path, batches: Sequence[NDArray[np.uint8]]
) -> list[dict[str, NDArray[np.float32]]]:
    """Run a model in fp32 on a few batches of one shape and return its logits and embedding by
    name.

    Raises:
        RuntimeError: OpenVINO's, where it cannot read, compile or run the model.
    """
    core = new_core()
    model = core.read_model(str(model_file))
    model.reshape({"pixels": list(batches[0].shape)})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = []
    for batch in batches:
        result = compiled({"pixels": batch})
        found.append(
            {
                name: np.array(values)
                for port, values in result.items()
                for name in port.get_names() & {"logits", "embedding"}
            }
        )
    return found
