"""What runs on an IPU: the program that the PopART session starts with the Poplar SDK's own
interpreter.

That is Python 3.6 to 3.8, so nothing newer is used here than 3.6 can read, and nothing but the
standard library, NumPy and popart.

    python program.py                   looks whether popart can be had, says so and ends
    python program.py        FD PARENT  FD: a file that both sides map; PARENT: the process to die
                                        with, 0: none

Each message is one line of JSON, on standard input and what was standard output; all that popart
prints goes to standard error.

    session                   program
                            ◄ {"here": {"popart": version, …}}  as soon as popart is imported
    {"model_bytes": …, …}   ►                once, see `_prepare`; the file holds the ONNX model
                            ◄ {"ready": [classes, features]}  compiled; the file holds the slots
    {"run": slot}           ►                the slot's input is filled; answered in order
                            ◄ {"done": slot}  its outputs are filled
    end of file             ►                ends; so does any message it does not know
                            ◄ {"error": kind, "text": …}  kind: device, model, memory, lost

A slot is the input of one step, `slot_shape` of `type`, and then each output as float32 (steps ×
batch, width), each of them beginning at a multiple of 64 bytes. Slots lie one behind the other.
"""

import json
import mmap
import os
import platform
import signal
import sys
import time
from typing import Any, Dict, List, Tuple

ALIGNMENT = 64


class Failure(Exception):  # noqa: N818 - what is said, not what went wrong
    """What the session receives before this program ends."""

    def __init__(self, kind: str, text: str) -> None:
        Exception.__init__(self, text)
        self.kind = kind


def main() -> int:
    """Serve the session until its end of the pipe is closed."""
    # This file's folder comes first where modules are looked for.
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or os.curdir) != folder]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session decides
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever libraries print must not look like an answer

    def notify(message: Dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        if len(sys.argv) == 3:
            _end_with(int(sys.argv[2]))
        popart, here = _load()
        notify({"here": here})
        if len(sys.argv) == 3:
            _serve(popart, int(sys.argv[1]), notify)
    except Failure as failure:
        notify({"error": failure.kind, "text": " ".join(str(failure).split())})
        return 1
    except BrokenPipeError:
        return 1
    return 0


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux); elsewhere the
    closed pipe ends it after its step.
    """
    if parent and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _load() -> Tuple[Any, Dict[str, str]]:
    """The module popart, and what decides the answers here."""
    try:
        import popart
        import numpy  # isort: skip
    except Exception as error:  # a library that it needs may fail in any way
        raise Failure("device", "%s cannot import popart: %s" % (sys.executable, error))
    if not hasattr(popart, "InferenceSession"):
        where = getattr(popart, "__file__", None) or "somewhere"
        raise Failure(
            "device", "the popart in %s is not Graphcore's: it has no InferenceSession" % where
        )
    versions = {
        "popart": str(getattr(popart, "__version__", "unknown")),
        "popart_python": platform.python_version(),
    }
    versions["popart_numpy"] = numpy.__version__
    return popart, versions


def _serve(popart: Any, descriptor: int, notify: Any) -> None:
    lines = iter(sys.stdin.readline, "")
    order = _order(next(lines, ""))
    if order is None:
        return
    with _acquire(popart, order["patience_s"]) as device:  # leaving it detaches
        try:
            session, input_id, anchors, output_ids = _prepare(popart, device, descriptor, order)
        except popart.OutOfMemoryException as error:
            raise Failure("memory", str(error))
        except Exception as error:  # its compiler raises classes of many libraries
            raise Failure("model", "%s: %s" % (type(error).__name__, error))
        images = order["slot_shape"][0] * order["slot_shape"][1]
        widths = [anchors[name].size // images for name in output_ids]
        os.ftruncate(descriptor, 0)  # the model has been read
        slots = map_slots(descriptor, order, widths)
        notify({"ready": widths})
        for line in lines:
            message = _order(line)
            if set(message) != {"run"} or message["run"] not in range(len(slots)):
                raise Failure("lost", "the program received an unknown message: %s" % line[:200])
            x, outputs = slots[message["run"]]
            try:
                session.run(popart.PyStepIO({input_id: x if len(x) > 1 else x[0]}, anchors))
            except Exception as error:
                raise Failure("lost", "%s: %s" % (type(error).__name__, error))
            for goal, name in zip(outputs, output_ids):
                # Copied: anchors are used again by the next step.
                goal[...] = anchors[name].reshape(goal.shape)
            notify({"done": message["run"]})


def _order(line: str) -> Any:
    """One message of the session's; None at its end."""
    if not line:
        return None
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise Failure("lost", "the program received an unknown message: %s" % line[:200])
    return message


def _acquire(popart: Any, patience_s: float) -> Any:
    """Attach to any IPU that is free. One whose process has just died may take its time to come
    free.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            device = popart.DeviceManager().acquireAvailableDevice(1)
        except Exception as error:
            raise Failure("device", "no IPU can be attached: %s" % error)
        if device is not None:
            return device
        if time.monotonic() > deadline:
            raise Failure("device", "no IPU is free")
        time.sleep(0.2)


def _prepare(
    popart: Any, device: Any, descriptor: int, order: Dict[str, Any]
) -> Tuple[Any, str, Dict[str, Any], List[str]]:
    """Compile.

    The order has model_bytes, opset, convolutions (their outputs), memory_proportion (null:
    popart's own), half, slot_shape (steps, batch, …), slots (how many), cache (a folder, or null)
    and synthetic; and patience_s, see `_acquire`.
    """
    model = os.pread(descriptor, order["model_bytes"], 0)
    builder = popart.Builder(
        model, opsets={"ai.onnx": order["opset"], "ai.onnx.ml": 1, "ai.graphcore": 1}
    )
    input_id, output_ids = builder.getInputTensorIds()[0], list(builder.getOutputTensorIds())
    if order["memory_proportion"] is not None:
        for convolution in order["convolutions"]:
            builder.setAvailableMemoryProportion(convolution, order["memory_proportion"])
    graph = popart.GraphTransformer(builder.getModelProto())
    if order["half"]:
        graph.convertFloatsToHalfs()
    flow = popart.DataFlow(
        order["slot_shape"][0], {name: popart.AnchorReturnType("All") for name in output_ids}
    )
    options = popart.SessionOptions()
    modes = popart.SyntheticDataMode
    options.syntheticDataMode = modes.RandomNormal if order["synthetic"] else modes.Off
    if order["cache"]:
        options.enableEngineCaching = True
        options.cachePath = order["cache"]
    session = popart.InferenceSession(
        fnModel=graph.getModelProto(), dataFlow=flow, deviceInfo=device, userOptions=options
    )
    session.prepareDevice()
    anchors = session.initAnchorArrays()
    session.weightsFromHost()
    return session, input_id, anchors, output_ids


def map_slots(
    descriptor: int, order: Dict[str, Any], widths: List[int]
) -> List[Tuple[Any, List[Any]]]:
    """Make the file as large as the slots are, and return their input and outputs as arrays; both
    sides call it.
    """
    import numpy

    shape = order["slot_shape"]
    forms = [(shape, "f2" if order["half"] else "f4")]
    forms += [((shape[0] * shape[1], width), "f4") for width in widths]
    sizes = [int(numpy.prod(form)) * int(kind[1]) for form, kind in forms]
    sizes = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    os.ftruncate(descriptor, order["slots"] * sum(sizes))
    memory = mmap.mmap(descriptor, order["slots"] * sum(sizes))
    slots = []
    for slot in range(order["slots"]):
        at, arrays = slot * sum(sizes), []
        for (form, kind), size in zip(forms, sizes):
            arrays.append(numpy.ndarray(form, kind, memory, at))
            at += size
        slots.append((arrays[0], arrays[1:]))
    return slots


if __name__ == "__main__":
    sys.exit(main())
