"""What the number of labels costs a model whose classes are words.

    python benchmarks/zero_shot.py [--labels 10 1000] [--images DIR] [--rounds 5] [--json]

Makes a folder as the Hub has them, with an image tower of ViT-B/32's size and random weights, and a
model for each number of labels with `imagemill classes`. Then the models take turns: `imagemill
bench --synthetic` measures the inference, or, with --images, `imagemill bench DIR` the whole way.
Prints images/s of each (median of the rounds), and the median of the rounds' ratios.

Needs the fixtures of the tests, for a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "zero_shot" / "clip"
WIDTH, LAYERS, HEADS, PATCH, SIDE, FEATURES = 768, 12, 12, 32, 224, 512
"""ViT-B/32."""


class Graph:
    """Nodes and random weights of an ONNX graph, in the order they are added."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, *shape: int) -> str:
        values = self.rng.normal(0, 1 / np.sqrt(shape[0]), shape)
        return self.constant(values.astype(np.float32))

    def constant(self, values: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def linear(self, x: str, rows: int, columns: int) -> str:
        return self.add(
            "Add",
            self.add("MatMul", x, self.weight(rows, columns)),
            self.constant(np.zeros(columns, np.float32)),
        )

    def norm(self, x: str) -> str:
        scale = self.constant(np.ones(WIDTH, np.float32))
        return self.add("LayerNormalization", x, scale, self.constant(np.zeros(WIDTH, np.float32)))

    def heads(self, x: str, order: list[int]) -> str:
        split = self.constant(np.array([0, 0, HEADS, WIDTH // HEADS]))
        return self.add("Transpose", self.add("Reshape", x, split), perm=order)

    def attention(self, x: str) -> str:
        query = self.heads(self.linear(x, WIDTH, WIDTH), [0, 2, 1, 3])
        key = self.heads(self.linear(x, WIDTH, WIDTH), [0, 2, 3, 1])
        value = self.heads(self.linear(x, WIDTH, WIDTH), [0, 2, 1, 3])
        factor = self.constant(np.float32((WIDTH // HEADS) ** -0.5))
        scores = self.add("Mul", self.add("MatMul", query, key), factor)
        mixed = self.add("MatMul", self.add("Softmax", scores, axis=-1), value)
        joined = self.add(
            "Reshape",
            self.add("Transpose", mixed, perm=[0, 2, 1, 3]),
            self.constant(np.array([0, 0, WIDTH])),
        )
        return self.linear(joined, WIDTH, WIDTH)

    def mlp(self, x: str) -> str:
        wide = self.linear(x, WIDTH, 4 * WIDTH)
        gate = self.add("Sigmoid", self.add("Mul", wide, self.constant(np.float32(1.702))))
        return self.linear(self.add("Mul", wide, gate), 4 * WIDTH, WIDTH)

    def model(
        self, value: tuple[str, int, list[str | int]], outputs: dict[str, list[str | int]]
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "tower",
            [helper.make_tensor_value_info(*value)],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                for name, shape in outputs.items()
            ],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def image_tower() -> onnx.ModelProto:
    """Return CLIP's image tower of the size of ViT-B/32."""
    graph = Graph(0)
    kernel = graph.rng.normal(0, 0.02, (WIDTH, 3, PATCH, PATCH)).astype(np.float32)
    patches = graph.add("Conv", "pixel_values", graph.constant(kernel), strides=[PATCH, PATCH])
    flat = graph.add("Reshape", patches, graph.constant(np.array([0, WIDTH, -1])))
    tokens = graph.add("Transpose", flat, perm=[0, 2, 1])
    count = graph.add(
        "Slice", graph.add("Shape", tokens), *(graph.constant(np.array([n])) for n in (0, 1))
    )
    shape = graph.add("Concat", count, graph.constant(np.array([1, WIDTH])), axis=0)
    token = graph.add("Expand", graph.weight(1, 1, WIDTH), shape)
    x = graph.add("Concat", token, tokens, axis=1)
    places = (SIDE // PATCH) ** 2 + 1
    x = graph.norm(graph.add("Add", x, graph.weight(1, places, WIDTH)))
    for _ in range(LAYERS):
        x = graph.add("Add", x, graph.attention(graph.norm(x)))
        x = graph.add("Add", x, graph.mlp(graph.norm(x)))
    first = graph.add("Gather", x, graph.constant(np.array(0)), axis=1)
    graph.add("MatMul", graph.norm(first), graph.weight(WIDTH, FEATURES), output="image_embeds")
    return graph.model(
        ("pixel_values", TensorProto.FLOAT, ["n", 3, SIDE, SIDE]), {"image_embeds": ["n", FEATURES]}
    )


def text_tower() -> onnx.ModelProto:
    """Return a tower that adds up random vectors of the tokens."""
    graph = Graph(1)
    vectors = graph.add("Gather", graph.weight(600, FEATURES), "input_ids")
    graph.add("ReduceSum", vectors, graph.constant(np.array([1])), output="text_embeds", keepdims=0)
    return graph.model(
        ("input_ids", TensorProto.INT64, ["n", "length"]), {"text_embeds": ["n", FEATURES]}
    )


def make_folder(folder: Path) -> Path:
    """Make a folder with both towers."""
    shutil.copytree(FIXTURE, folder, ignore=shutil.ignore_patterns("*.onnx"))
    file = folder / "preprocessor_config.json"
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    for name, tower in (("vision", image_tower()), ("text", text_tower())):
        (folder / "onnx" / f"{name}_model.onnx").write_bytes(tower.SerializeToString())
    return folder


def imagemill(*arguments: object) -> str:
    command = [sys.executable, "-m", "imagemill", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--images", metavar="DIR")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    rates: dict[int, list[float]] = {count: [] for count in chosen.labels}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        folder = make_folder(work / "clip")
        for count in rates:
            labels = work / f"{count}.txt"
            labels.write_text("".join(f"thing {number}\n" for number in range(count)))
            imagemill("classes", folder, "--labels", labels, "--output", work / f"model{count}")
        for turn in range(chosen.rounds):
            for count in chosen.labels[:: -1 if turn % 2 else 1]:
                source = [chosen.images] if chosen.images else ["--synthetic"]
                report = json.loads(
                    imagemill(
                        *("bench", *source, "--model", work / f"model{count}", "--json"),
                        *("--precision", chosen.precision, "--iterations", 1, "--batch-size", 16),
                    )
                )
                rates[count].append(
                    report["end_to_end" if chosen.images else "compute_only"]["median"]
                )
    first, *others = rates
    found = {
        "images_per_second": {count: median(values) for count, values in rates.items()},
        "ratio": {
            count: median(b / a for a, b in zip(rates[first], rates[count], strict=True))
            for count in others
        },
    }
    if chosen.json:
        print(json.dumps(found))
        return
    for count, rate in found["images_per_second"].items():
        ratio = f", {found['ratio'][count]:.4f} of {first:,} labels" if count in others else ""
        print(f"{count:,} labels: {rate:,.1f} images/s{ratio}")


if __name__ == "__main__":
    main()
