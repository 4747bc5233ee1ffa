# imagemill for CPUs. Build it, and run a job on mounted folders as yourself:
#
#   docker build -t imagemill .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD/photos:/photos:ro" -v "$PWD/results:/results" \
#       imagemill run /photos --output /results/out --model efficientnet_lite0
#
# tests/test_dockerfile.py runs these steps without Docker.
FROM debian:bookworm-slim

ENV PATH=/opt/imagemill/bin:$PATH XDG_CACHE_HOME=/tmp/cache PYTHONDONTWRITEBYTECODE=1

COPY pyproject.toml README.md LICENSE MANIFEST.in /build/
COPY src /build/src

# The compiler is needed for one C file and leaves again. OpenVINO's plugins for other devices and its readers of other
# files go too: imagemill computes on the CPU, and reads ONNX and OpenVINO's own files.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev \
    && python3 -m venv /opt/imagemill \
    && pip install --no-cache-dir /build \
    && pip uninstall --yes pip setuptools \
    && cd /opt/imagemill/lib/python3*/site-packages/openvino/libs \
    && rm -f cache.json libopenvino_intel_gpu_plugin.so libopenvino_intel_npu_plugin.so \
    && rm -f libopenvino_gguf_frontend.so.* libopenvino_jax_frontend.so.* libopenvino_paddle_frontend.so.* \
        libopenvino_pytorch_frontend.so.* libopenvino_tensorflow*_frontend.so.* \
    && apt-get purge --yes --auto-remove --option APT::AutoRemove::SuggestsImportant=false \
        python3-dev python3-venv gcc libc6-dev \
    && apt-get clean \
    && rm -rf /build /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 imagemill
USER imagemill
WORKDIR /home/imagemill
ENTRYPOINT ["imagemill"]
CMD ["--help"]
