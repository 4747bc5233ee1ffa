"""Makes the peers' int8 models from a bundle's model.onnx, calibrated on the first images of a
folder.

python make_int8.py nncf --model-dir M --images DIR --output plain.xml    NNCF's documented
one-liner: nncf.quantize(core.read_model(…), …) python make_int8.py ort --model-dir M --images DIR
--output qdq.onnx      onnxruntime.quantization, static, QDQ, per channel
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import arguments, images, load


def plain(model: str, output: str, paths: list[str]) -> None:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import nncf
    import openvino as ov

    read = ov.Core().read_model(model)
    quantised = nncf.quantize(
        read, nncf.Dataset(paths, lambda path: load(path)[None]), subset_size=len(paths)
    )
    ov.save_model(quantised, output)


def qdq(model: str, output: str, paths: list[str]) -> None:
    import onnx
    from onnx import version_converter
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    read = onnx.load(model)
    name = read.graph.input[0].name
    newer, cleaned = output + ".newer.onnx", output + ".cleaned.onnx"
    onnx.save(version_converter.convert_version(read, 17), newer)  # per-channel QDQ needs opset 13
    quant_pre_process(newer, cleaned)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(paths)

        def get_next(self):  # type: ignore[no-untyped-def]
            path = next(self._left, None)
            return None if path is None else {name: load(path)[None]}

    quantize_static(
        cleaned,
        output,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    for file in (newer, cleaned):
        Path(file).unlink()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("tool", choices=["nncf", "ort"])
    parser.add_argument("--output", required=True)
    parser.add_argument(
        "--calibration",
        type=int,
        help="images (default: 300 for nncf, its own default; 64 for ort)",
    )
    asked = parser.parse_args()
    make, count = {"nncf": (plain, 300), "ort": (qdq, 64)}[asked.tool]
    make(
        str(Path(asked.model_dir) / "model.onnx"),
        asked.output,
        images(asked.images, asked.calibration or count),
    )


if __name__ == "__main__":
    main()
