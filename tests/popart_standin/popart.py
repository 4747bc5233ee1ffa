"""A stand-in for Graphcore's `popart`, by the interface recorded from the bindings of SDK 3.4; no
part of PopART is in it.

It refuses every call whose name, arguments or place in the order the record does not have, and
really computes the answers: inputs, weights and outputs are rounded to float16 where the model was
converted, ONNX Runtime does the rest in float32 on the CPU. As the real one does, it uses the
anchors' memory again at every step and drops leading axes of size 1. It runs on Python 3.6 and
newer.

POPART_STANDIN_FOLDER    keeps one file per IPU, locked while a process is attached to it, and
`calls.jsonl`: what each process asked for POPART_STANDIN_IPUS      how many IPUs there are; 1 if
unset POPART_STANDIN_MEMORY    bytes of images in a batch from which prepareDevice finds that memory
is out
POPART_STANDIN_DIES      a file: the first process that runs a step while it is there removes it and
kills itself with SIGKILL
"""

import enum
import fcntl
import json
import os
import signal
import tempfile

import numpy
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

__version__ = "stand-in"


class popart_exception(Exception):
    pass


class OutOfMemoryException(popart_exception):
    pass


class AnchorReturnType:
    def __init__(self, kind):
        _of(kind, str)
        if kind not in ("All", "Final", "Sum"):
            raise popart_exception("no anchor return type %r" % kind)
        self.kind = kind


class SyntheticDataMode(enum.Enum):
    Off = 0
    Zeros = 1
    RandomNormal = 2
    RandomUniform = 3


class SessionOptions:
    """Has these attributes, of these types, and no other."""

    __slots__ = ("cachePath", "enableEngineCaching", "syntheticDataMode")

    def __init__(self):
        self.syntheticDataMode = SyntheticDataMode.Off
        self.enableEngineCaching = False
        self.cachePath = "session_cache"

    def __setattr__(self, name, value):
        kinds = {
            "syntheticDataMode": SyntheticDataMode,
            "enableEngineCaching": bool,
            "cachePath": str,
        }
        if name in kinds:
            _of(value, kinds[name])
        object.__setattr__(self, name, value)


def _of(value, *kinds):
    """The bindings convert nothing: an argument of another type fits no overload."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(
            "incompatible function arguments: %r where %s is wanted"
            % (value, " or ".join(kind.__name__ for kind in kinds))
        )


def _note(**what):
    with open(os.path.join(_folder(), "calls.jsonl"), "a") as file:
        file.write(json.dumps(what) + "\n")


def _folder():
    return os.environ.get("POPART_STANDIN_FOLDER") or tempfile.gettempdir()


class Builder:
    def __init__(self, modelProtoOrFilename, *, opsets):
        _of(modelProtoOrFilename, str, bytes)
        _of(opsets, dict)
        if isinstance(modelProtoOrFilename, bytes):
            self._model = onnx.load_from_string(modelProtoOrFilename)
        else:
            self._model = onnx.load(modelProtoOrFilename)
        versions = {entry.domain or "ai.onnx": entry.version for entry in self._model.opset_import}
        if self._model.ir_version > 6 or not 6 <= versions["ai.onnx"] <= 11:
            raise popart_exception(
                "cannot read opset %d, IR version %d"
                % (versions["ai.onnx"], self._model.ir_version)
            )
        if (
            set(opsets) - {"ai.onnx", "ai.onnx.ml", "ai.graphcore"}
            or opsets.get("ai.onnx") != versions["ai.onnx"]
        ):
            raise popart_exception("opsets %s for a model of %s" % (opsets, versions))

    def getInputTensorIds(self):
        weights = {tensor.name for tensor in self._model.graph.initializer}
        return [value.name for value in self._model.graph.input if value.name not in weights]

    def getOutputTensorIds(self):
        return [value.name for value in self._model.graph.output]

    def setAvailableMemoryProportion(self, nodeOutputName, availableMemoryProportion):
        _of(nodeOutputName, str)
        _of(availableMemoryProportion, float)
        nodes = [node for node in self._model.graph.node if nodeOutputName in node.output]
        if not nodes or nodes[0].op_type not in ("Conv", "MatMul", "Gemm"):
            raise popart_exception(
                "%r is no output of a convolution or matrix product" % nodeOutputName
            )
        if not 0 < availableMemoryProportion <= 1:
            raise popart_exception("availableMemoryProportion must be in (0, 1]")
        _note(memory_proportion=availableMemoryProportion, node=nodeOutputName)

    def getModelProto(self):
        return self._model.SerializeToString()


class GraphTransformer:
    def __init__(self, modelProtoOrFilename):
        _of(modelProtoOrFilename, str, bytes)
        self._model = onnx.load_from_string(modelProtoOrFilename)

    def convertFloatsToHalfs(self):
        graph = self._model.graph
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                tensor.CopyFrom(
                    numpy_helper.from_array(
                        numpy_helper.to_array(tensor).astype(numpy.float16), tensor.name
                    )
                )
        for value in list(graph.input) + list(graph.output) + list(graph.value_info):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        casts = [
            node.output[0]
            for node in graph.node
            if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT
        ]
        if casts:  # whether the real one converts these is not on record
            raise popart_exception("a cast to float32 is left: %s" % casts)

    def getModelProto(self):
        return self._model.SerializeToString()


class DataFlow:
    def __init__(self, batchesPerStep, anchorTensors):
        _of(batchesPerStep, int)
        _of(anchorTensors, dict)
        for name, kind in anchorTensors.items():
            _of(name, str)
            _of(kind, AnchorReturnType)
        if batchesPerStep < 1:
            raise popart_exception("batchesPerStep must be at least 1")
        self.steps, self.anchors = batchesPerStep, dict(anchorTensors)


class DeviceInfo:
    """Made by a device manager; leaving it as a context detaches."""

    def __init__(self, lock=None):
        self._lock = lock
        self.is_attached = True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.detach()

    def detach(self):
        self.is_attached = False
        if self._lock is not None:
            os.close(self._lock)
            _note(detached=os.getpid())


class DeviceManager:
    def __init__(self):
        pass

    def acquireAvailableDevice(self, numIpus=1):
        _of(numIpus, int)
        if numIpus != 1:
            raise popart_exception("the stand-in has single IPUs")
        for number in range(int(os.environ.get("POPART_STANDIN_IPUS", "1"))):
            device = self.acquireDeviceById(number)
            if device is not None:
                return device
        return None

    def acquireDeviceById(self, id):
        _of(id, int)
        lock = os.open(
            os.path.join(_folder(), "popart-standin-ipu-%d" % id), os.O_CREAT | os.O_RDWR
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            _note(refused=os.getpid(), ipu=id)
            return None
        _note(attached=os.getpid(), ipu=id)
        return DeviceInfo(lock)


class PyStepIO:
    def __init__(self, inputs, outputs):
        for arrays in (inputs, outputs):
            _of(arrays, dict)
            for name, array in arrays.items():
                _of(name, str)
                _of(array, numpy.ndarray)
        self.inputs, self.outputs = inputs, outputs


class InferenceSession:
    def __init__(self, *, fnModel, dataFlow, deviceInfo, userOptions):
        _of(fnModel, str, bytes)
        _of(dataFlow, DataFlow)
        _of(deviceInfo, DeviceInfo)
        _of(userOptions, SessionOptions)
        model = onnx.load_from_string(fnModel)
        (value,) = model.graph.input
        self._input, self._half = (
            value.name,
            value.type.tensor_type.elem_type == TensorProto.FLOAT16,
        )
        self._shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        if (
            value.type.tensor_type.elem_type not in (TensorProto.FLOAT, TensorProto.FLOAT16)
            or 0 in self._shape
        ):
            raise popart_exception(
                "input %s has no fixed shape, or is of another type than float" % value.name
            )
        unknown = set(dataFlow.anchors) - {output.name for output in model.graph.output}
        if unknown or {kind.kind for kind in dataFlow.anchors.values()} != {"All"}:
            raise popart_exception("anchors %s" % sorted(dataFlow.anchors))
        self._model, self._flow, self._device, self._options = (
            model,
            dataFlow,
            deviceInfo,
            userOptions,
        )
        self._anchors, self._done = {}, ["made"]

    def _after(self, name, *before):
        missing = [step for step in before if step not in self._done]
        if missing or not self._device.is_attached:
            raise popart_exception(
                "%s before %s" % (name, ", ".join(missing) or "the device was attached")
            )
        self._done.append(name)

    def prepareDevice(self):
        self._after("prepareDevice", "made")
        size = int(numpy.prod(self._shape)) * (2 if self._half else 4)
        if size >= float(os.environ.get("POPART_STANDIN_MEMORY", "inf")):
            raise OutOfMemoryException("Out of memory on tile 17: %d bytes used" % size)
        graph = self._model.graph
        for tensor in graph.initializer:  # computed in float32, of what float16 has left of it
            if tensor.data_type == TensorProto.FLOAT16:
                tensor.CopyFrom(
                    numpy_helper.from_array(
                        numpy_helper.to_array(tensor).astype(numpy.float32), tensor.name
                    )
                )
        for value in list(graph.input) + list(graph.output):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._engine = onnxruntime.InferenceSession(
            self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        mode, cache = (
            self._options.syntheticDataMode.name,
            self._options.enableEngineCaching and self._options.cachePath,
        )
        _note(
            prepared=self._shape,
            steps=self._flow.steps,
            half=self._half,
            synthetic=mode,
            cache=cache,
        )

    def initAnchorArrays(self):
        self._after("initAnchorArrays", "prepareDevice")
        steps = [self._flow.steps] if self._flow.steps > 1 else []
        kind = numpy.float16 if self._half else numpy.float32
        shapes = {
            output.name: [d.dim_value for d in output.type.tensor_type.shape.dim]
            for output in self._model.graph.output
        }
        self._anchors = {
            name: numpy.full(steps + shapes[name], numpy.nan, kind) for name in self._flow.anchors
        }
        return self._anchors

    def weightsFromHost(self):
        self._after("weightsFromHost", "prepareDevice")

    def run(self, stepio):
        self._after("run", "prepareDevice", "initAnchorArrays", "weightsFromHost")
        _of(stepio, PyStepIO)
        if any(stepio.outputs.get(name) is not array for name, array in self._anchors.items()):
            raise popart_exception("anchors are not those of initAnchorArrays")
        if set(stepio.inputs) != {self._input}:
            raise popart_exception("inputs %s for %s" % (sorted(stepio.inputs), self._input))
        x = stepio.inputs[self._input]
        shape = tuple(([self._flow.steps] if self._flow.steps > 1 else []) + self._shape)
        kind = numpy.dtype(numpy.float16 if self._half else numpy.float32)
        if x.shape != shape or x.dtype != kind or not x.flags.c_contiguous:
            raise popart_exception(
                "input is %s %s, C-contiguous: %s; wanted: %s %s"
                % (x.dtype, x.shape, x.flags.c_contiguous, kind, shape)
            )
        dies = os.environ.get("POPART_STANDIN_DIES")
        if dies and os.path.exists(dies):
            os.remove(dies)
            os.kill(os.getpid(), signal.SIGKILL)
        if self._options.syntheticDataMode is not SyntheticDataMode.Off:
            return  # nothing is brought to the host
        for step in range(self._flow.steps):
            batch = x[step] if self._flow.steps > 1 else x
            names = list(self._anchors)
            for name, values in zip(
                names, self._engine.run(names, {self._input: batch.astype(numpy.float32)})
            ):
                goal = self._anchors[name]
                (goal[step] if self._flow.steps > 1 else goal)[...] = values
